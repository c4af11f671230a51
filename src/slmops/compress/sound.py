"""Is a language model's checkpoint fit to be converted? Asked before minutes of work, and answered by name.

Guarantees: head counts that grouped attention cannot share out, a head that rotary positions cannot turn, and weights
that are not finite are refused here, with the weight's name, instead of by an engine's words or by a model that
answers nonsense. Reads one tensor at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.errors import ConversionError, ModelError
from slmops.models.folder import read_config, read_tensors, refuse_bottlenecks, weight_files

OTHER_MODEL = "Choose another student, or change its shape and train it again."


def check_language_model(folder: Path) -> dict[str, Any]:
    """The configuration of the language model at ``folder``.

    Raises:
        ModelError: no model, a classifier, or one with bottleneck adapters.
        ConversionError: a shape or weights that no engine could run.
    """
    refuse_bottlenecks(folder)
    config = read_config(folder)
    if (folder / "labels.json").exists():
        raise ModelError(f"{folder} is a classifier, not a language model.", remedy="Export it as a classifier.")
    if problem := shape_problem(config):
        raise ConversionError(f"{folder}: {problem}", remedy=OTHER_MODEL)
    check_finite(folder)
    return config


def shape_problem(config: Mapping[str, Any]) -> str | None:
    """What is impossible about the heads, in a sentence; None where nothing is. An odd number of heads is possible."""
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        return None  # an architecture that names its parts otherwise
    shared = config.get("num_key_value_heads") or heads
    if heads % shared:
        return (
            f"{heads} heads of queries cannot share {shared} heads of keys: the one has to be a multiple of the other."
        )
    hidden, size = config.get("hidden_size"), config.get("head_dim")
    if not size and isinstance(hidden, int):
        if hidden % heads:
            return f"a hidden size of {hidden} cannot be divided among {heads} heads."
        size = hidden // heads
    if isinstance(size, int) and size % 2:
        return f"a head has {size} numbers, and rotary positions turn them in pairs."
    return None


def check_finite(folder: Path) -> None:
    """Raises :class:`ConversionError` that names the first weight which holds NaN or infinity."""
    import torch
    from safetensors import safe_open

    for path in weight_files(folder):
        names = [tensor.name for tensor in read_tensors(path) if tensor.dtype in FLOATS]
        with safe_open(path, framework="pt") as file:
            for name in names:
                values = file.get_tensor(name)
                if not torch.isfinite(values).all():
                    raise not_finite(name, folder)


FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def not_finite(weight: str, folder: object) -> ConversionError:
    return ConversionError(
        f"The weight {weight} of {folder} holds values that are not finite.",
        remedy="Train again with a smaller learning rate, or fetch the model anew.",
    )
