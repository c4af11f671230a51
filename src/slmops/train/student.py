"""Cut a student out of a teacher: fewer layers, a narrower model, a smaller vocabulary.

Two ways, by what the student is for:

* :func:`narrow_encoder`: a small bidirectional encoder for closed label sets. Its embeddings are the teacher's,
  projected onto the principal components of the kept tokens; its layers start fresh, since a layer learned at one
  width says little at another.
* :func:`shallow_copy`: a language model with some of the teacher's layers, copied whole, for open tasks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slmops.errors import ModelError
from slmops.models.cut import LISTED_BY_LAYER, evenly_spread, renumber_special_ids

HEAD_SIZE = 64
EMBEDDING_SCALE = 0.5
"""Standard deviation of the projected embeddings. Measured: fresh layers of this size learn fastest around it."""


@dataclass(frozen=True)
class StudentShape:
    """The size of a student. ``hidden_size`` must be a multiple of 64 for a narrow encoder."""

    layers: int
    hidden_size: int
    intermediate_size: int


def narrow_encoder(teacher_folder: Path, kept_ids: tuple[int, ...], shape: StudentShape) -> nn.Module:
    """A fresh bidirectional Llama encoder of ``shape`` with the teacher's embeddings, projected.

    Raises:
        ModelError: the shape is not possible.
    """
    from transformers import LlamaConfig, LlamaModel

    if shape.hidden_size % HEAD_SIZE:
        raise ModelError(
            f"student.hidden_size is {shape.hidden_size}.", remedy=f"Choose a multiple of {HEAD_SIZE}, for example 256."
        )
    embeddings = teacher_embeddings(teacher_folder)[list(kept_ids)]
    if shape.hidden_size > min(embeddings.shape):
        raise ModelError(
            f"student.hidden_size is {shape.hidden_size}, but the teacher's kept embeddings have only "
            f"{min(embeddings.shape)} dimensions.",
            remedy="Choose a smaller hidden_size.",
        )
    heads = shape.hidden_size // HEAD_SIZE
    config = LlamaConfig(
        vocab_size=len(kept_ids),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    config.is_causal = False
    student = LlamaModel(config)
    with torch.no_grad():
        student.embed_tokens.weight.copy_(principal_components(embeddings, shape.hidden_size))
    return student  # type: ignore[no-any-return]


def shallow_copy(teacher_folder: Path, kept_ids: tuple[int, ...] | None, layers: int) -> nn.Module:
    """A causal language model with ``layers`` of the teacher's, spread evenly, the first and the last among them.

    Raises:
        ModelError: more layers are asked for than the teacher has, or its layers cannot be taken apart.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.float32)
    if not hasattr(getattr(model, "model", None), "layers"):
        raise ModelError(
            f"No student can be cut from a {type(model).__name__}: its layers are not where Llama's are.",
            remedy="Name a student.model instead.",
        )
    available = model.config.num_hidden_layers
    if layers > available:
        raise ModelError(f"student.layers is {layers}, but the teacher has {available}.", remedy="Choose fewer.")
    chosen = evenly_spread(layers, available)
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in chosen)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = layers
    for name in LISTED_BY_LAYER:
        if listed := getattr(model.config, name, None):
            setattr(model.config, name, [listed[index] for index in chosen])
    if kept_ids is not None:
        _keep_rows(model, kept_ids)
    return model  # type: ignore[no-any-return]


def teacher_embeddings(folder: Path) -> Tensor:
    """The input embeddings ``[vocabulary, hidden]`` of the model at ``folder``, in float32."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if name.endswith("embed_tokens.weight"):
                    tensor: Tensor = weights.get_tensor(name)
                    return tensor.float()
    raise ModelError(f"{folder} has no embeddings named embed_tokens.weight.", remedy="Name a student.model instead.")


def principal_components(embeddings: Tensor, dimensions: int) -> Tensor:
    """``embeddings`` ``[tokens, hidden]`` on their first components, ``[tokens, dimensions]``, rescaled as a whole."""
    centred = embeddings - embeddings.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    projected = centred @ directions[:dimensions].T
    scaled: Tensor = projected * (EMBEDDING_SCALE / projected.std())
    return scaled


def _keep_rows(model: Any, kept_ids: tuple[int, ...]) -> None:
    """Shrink embeddings (and an untied output layer) to the kept tokens, and renumber the special ones."""
    rows = torch.tensor(kept_ids)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = output.weight is embedding.weight
    # In place: the modules do more than look up and multiply in some families (Gemma scales its embeddings).
    embedding.weight = nn.Parameter(embedding.weight.detach()[rows].clone())
    embedding.num_embeddings, embedding.padding_idx = len(kept_ids), None
    output.weight = embedding.weight if tied else nn.Parameter(output.weight.detach()[rows].clone())
    output.out_features = len(kept_ids)
    if output.bias is not None:
        output.bias = nn.Parameter(output.bias.detach()[rows].clone())
    for config in (model.config, model.generation_config):
        config.vocab_size = len(kept_ids)
        renumber_special_ids(config, kept_ids)
