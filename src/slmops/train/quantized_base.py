"""A model whose matrices are kept in 4 bits while adapters on it are trained (QLoRA, Dettmers et al. 2023).

nf4 with doubly quantized scales, by bitsandbytes, on the CPU as on CUDA. Guarantees: no kernel is looked for on a hub;
:func:`round_to_nf4` gives the very weights that training sees, so that a merged model answers as the trained one did.
Not covered: embeddings and the output layer, which stay as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slmops.errors import MissingExtraError
from slmops.models.quiet import load_bitsandbytes, quiet_transformers


def load_nf4(folder: Path, auto_class: Any) -> Any:
    """The model at ``folder`` by ``auto_class`` (``AutoModelForCausalLM``, ``AutoModel``), its matrices in nf4.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    quiet_transformers()
    check_bitsandbytes()
    model = auto_class.from_pretrained(folder, dtype=torch.float32)
    quantize_nf4(model)
    return model


def check_bitsandbytes() -> None:
    if not load_bitsandbytes():
        raise MissingExtraError("train.method: qlora", "qlora")


def quantize_nf4(model: Any) -> None:
    """Replace every matrix of the layers by its nf4 form, in place; the output layer stays."""
    import bitsandbytes as bnb

    for name, linear in _matrices(model):
        quantized = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
            compress_statistics=True,
        )
        # On a processor with AVX512-BF16 a pass in eval mode would lay the weights out for a kernel without a backward,
        # and training after it would lose the gradients of all layers below, without an error.
        quantized.support_avx512bf16_for_cpu = False
        device = linear.weight.device
        quantized.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        if linear.bias is not None:
            quantized.bias = nn.Parameter(linear.bias.data, requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, quantized.to(device))
    model.is_loaded_in_4bit = True  # what peft looks at to choose its adapter


def round_to_nf4(model: Any) -> None:
    """Give every matrix of the layers the values that :func:`quantize_nf4` would compute with, in place, in fp32."""
    from bitsandbytes import functional as bits

    for _, linear in _matrices(model):
        packed, state = bits.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
        linear.weight.data = bits.dequantize_4bit(packed, state).to(linear.weight.dtype)


def _matrices(model: Any) -> list[tuple[str, nn.Linear]]:
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [(name, part) for name, part in model.named_modules() if type(part) is nn.Linear and part is not output]
