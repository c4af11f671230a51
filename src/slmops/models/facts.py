"""What a model is, read from ``config.json`` and the headers of its weight files before anything is loaded.

Guarantees: ``parameters`` is what ``sum(p.numel() for p in model.parameters())`` gives after loading, with tied
embeddings counted once; a few kilobytes are read, whatever the size of the model.
Not covered: models whose weights are packed (quantized already) are refused; the cache of models with a sliding window
or a compressed cache is an upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.errors import ModelError
from slmops.models.folder import Tensor, check_model_folder, read_config, read_tensors, weight_files
from slmops.recipe import Precision

INT4_BLOCK = 32  # weights that share one fp16 scale
_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias")  # saved by some models, trained by none
_COMPARED_BYTES = 1 << 16


@dataclass(frozen=True)
class ModelFacts:
    """
    ``parameters``                 all weights, shared ones once
    ``bytes_by_precision``         of the weights alone, for fp32, fp16, int8, int4. int8: matrices at one byte and an
                                   fp32 scale a row; int4: matrices at half a byte and an fp16 scale for 32 weights;
                                   vectors (norms, biases) stay fp32. An engine may keep more in fp32: measure.
    ``kv_cache_bytes_per_token``   keys and values of one token over all layers, in fp32 (engines on a CPU); half of it
                                   in fp16; 0 for models that do not generate
    ``attention_size``             query heads x head size
    ``key_value_size``             key-value heads x head size
    ``context_tokens``             longest input that positions are defined for; None where the config says none
    """

    architecture: str
    parameters: int
    bytes_by_precision: Mapping[Precision, int]
    kv_cache_bytes_per_token: int
    vocab_size: int
    layers: int
    hidden_size: int
    intermediate_size: int
    attention_size: int
    key_value_size: int
    context_tokens: int | None
    tied_embeddings: bool


def model_facts(path: Path) -> ModelFacts:
    """Facts of the model folder at ``path``.

    Raises:
        ModelNotFoundError: there is nothing at ``path``.
        ModelError: what is there is not a model, is damaged, or is quantized already.
    """
    check_model_folder(path)
    config = read_config(path)
    quantized = config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else "unknown"
        raise ModelError(
            f"{path} is quantized already (method: {method}).",
            remedy="Name the model it was made from: only full weights can be trained and converted.",
        )
    tensors = [tensor for file in weight_files(path) for tensor in read_tensors(file)]
    weights, tied = _distinct_weights(tensors, config)
    text = _text_config(config)
    hidden_size = _integer(path, text, "hidden_size", "n_embd", "d_model", "dim")
    layers = _integer(path, text, "num_hidden_layers", "n_layer", "num_layers", "n_layers")
    heads = _integer(path, text, "num_attention_heads", "n_head", "num_heads", "n_heads")
    head_size = _optional(text, "head_dim", "d_kv") or hidden_size // heads
    key_value_size = (_optional(text, "num_key_value_heads") or heads) * head_size
    architecture = str((config.get("architectures") or [config.get("model_type", "unknown")])[0])
    return ModelFacts(
        architecture=architecture,
        parameters=sum(tensor.elements for tensor in weights),
        bytes_by_precision=bytes_by_precision([tensor.shape for tensor in weights]),
        kv_cache_bytes_per_token=_caching_layers(text, layers) * 2 * key_value_size * 4 if _generates(config) else 0,
        vocab_size=_integer(path, text, "vocab_size"),
        layers=layers,
        hidden_size=hidden_size,
        intermediate_size=_optional(text, "intermediate_size", "n_inner", "d_ff", "hidden_dim") or 4 * hidden_size,
        attention_size=heads * head_size,
        key_value_size=key_value_size,
        context_tokens=_optional(text, "max_position_embeddings", "n_positions", "max_seq_len"),
        tied_embeddings=tied,
    )


def bytes_by_precision(shapes: Sequence[tuple[int, ...]]) -> dict[Precision, int]:
    """Bytes that weights of these ``shapes`` take in each precision; see :class:`ModelFacts` for what is counted."""
    total = vectors = rows = blocks = 0
    for shape in shapes:
        elements = 1
        for size in shape:
            elements *= size
        total += elements
        if len(shape) < 2:
            vectors += elements
        else:
            rows += elements // shape[-1] if shape[-1] else 0
            blocks += -(-elements // INT4_BLOCK)
    matrices = total - vectors
    return {
        "fp32": 4 * total,
        "fp16": 2 * total,
        "int8": matrices + 4 * rows + 4 * vectors,
        "int4": -(-matrices // 2) + 2 * blocks + 4 * vectors,
    }


def _distinct_weights(tensors: Sequence[Tensor], config: Mapping[str, Any]) -> tuple[list[Tensor], bool]:
    """The tensors that are parameters, shared ones once, and whether the output layer is the input embedding."""
    weights = [tensor for tensor in tensors if not _is_buffer(tensor)]
    heads = [tensor for tensor in weights if tensor.name.endswith("lm_head.weight")]
    embeddings = [tensor for tensor in weights if tensor.name.endswith(("embed_tokens.weight", "wte.weight"))]
    if not heads:
        return weights, bool(embeddings) and _generates(config)
    declared = config.get("tie_word_embeddings", _text_config(config).get("tie_word_embeddings"))
    if not embeddings:  # saved under the output layer's name alone
        return weights, bool(declared)
    tied = declared if declared is not None else _same_content(heads[0], embeddings[0])
    return ([tensor for tensor in weights if tensor not in heads] if tied else weights), bool(tied)


def _is_buffer(tensor: Tensor) -> bool:
    return tensor.name.endswith(_BUFFERS) or (tensor.name.endswith(".attn.bias") and len(tensor.shape) == 4)


def _same_content(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors begin with the same bytes; a config that does not say leaves nothing else to go by."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (_head_bytes(tensor) for tensor in (one, other))
    return first == second


def _head_bytes(tensor: Tensor) -> bytes:
    with tensor.path.open("rb") as file:
        file.seek(tensor.start)
        return file.read(min(_COMPARED_BYTES, tensor.end - tensor.start))


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model, for models that also see or hear."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def _generates(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures") or []
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)


def _caching_layers(config: Mapping[str, Any], layers: int) -> int:
    """Layers that keep keys and values; those with a recurrent state of fixed size do not."""
    kinds = config.get("layer_types")
    if not isinstance(kinds, list):
        return layers
    return sum(1 for kind in kinds if "attention" in str(kind) and "linear" not in str(kind))


def _optional(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    return None


def _integer(path: Path, config: Mapping[str, Any], *names: str) -> int:
    value = _optional(config, *names)
    if value is None or value <= 0:
        raise ModelError(
            f"{path / 'config.json'} says no {names[0]} ({config.get(names[0])!r}).",
            remedy="Name a language model in the layout of transformers.",
        )
    return value
