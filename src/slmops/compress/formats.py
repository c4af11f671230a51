"""The formats of ``compress.formats``: which of them can be made here, and each by its own module."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slmops.artifacts import Draft
from slmops.errors import MissingExtraError, RecipeError
from slmops.progress import ProgressSink, ignore
from slmops.recipe import FormatConfig, FormatName, Recipe

NEEDS: dict[FormatName, tuple[str, str]] = {
    "gguf": ("xllamacpp", "llamacpp"),
    "openvino": ("openvino", "openvino"),
    "olive": ("olive", "olive"),
}
"""The module that makes or runs the format, and the extra that brings it."""
CONTEXT_TOKENS = 2048
"""llama.cpp allocates the cache of its whole context when a model is opened: this much is room for a conversation."""


def check_formats(recipe: Recipe) -> None:
    """What of ``compress.formats`` is known to be impossible before anything is trained.

    Raises:
        MissingExtraError: the engine of a format, which measures the variant, is not installed.
        RecipeError: Olive's configuration cannot be used, or no adapter will be trained that could be kept apart.
    """
    for made in recipe.compress.formats:
        needs = [NEEDS[made.format]] if made.format in NEEDS else []
        if made.format == "openvino" and made.stored_as in ("int8", "int4"):
            needs.append(("nncf", "nncf"))
        for module, extra in needs:
            if find_spec(module) is None:
                raise MissingExtraError(f"compress.formats with {made.format} (it needs {module})", extra)
        if made.format == "olive":
            from slmops.compress.olive_config import read_olive_config

            read_olive_config(Path(made.config or ""))
        if made.format == "onnx-adapters" and (recipe.train.engine != "olive" or recipe.train.method == "qlora"):
            raise RecipeError(
                "compress.formats has onnx-adapters, and this run trains its student whole: no adapter is left that "
                "could be kept apart.",
                remedy="Set train.engine: olive; or fine-tune (slmops train) and keep the adapters apart by "
                "slmops adapters export.",
            )


def export_format(
    checkpoint_folder: Path,
    draft: Draft,
    settings: FormatConfig,
    *,
    base: Path | None = None,
    task: str,
    name: str,
    max_tokens: int,
    system: str | None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the language model at ``checkpoint_folder`` in the format of ``settings``.

    ``base``: the model that the checkpoint's adapter was trained on, for ``onnx-adapters``. ``max_tokens``: of prompt
    and answer, where the engine allocates its cache beforehand; at least :data:`CONTEXT_TOKENS`. Errors as the modules
    say.
    """
    common: dict[str, Any] = {
        "task": task,
        "name": name,
        "max_tokens": max_tokens,
        "system": system,
        "progress": progress,
    }
    match settings.format:
        case "gguf":
            from slmops.compress.gguf_export import export_gguf

            common["max_tokens"] = max(max_tokens, CONTEXT_TOKENS)
            export_gguf(checkpoint_folder, draft, quantization=settings.stored_as, **common)  # type: ignore[arg-type]
        case "openvino":
            from slmops.compress.openvino_export import export_openvino

            common["max_tokens"] = None
            export_openvino(checkpoint_folder, draft, precision=settings.stored_as, **common)  # type: ignore[arg-type]
        case "olive":
            from slmops.compress.olive_export import export_olive

            export_olive(checkpoint_folder, draft, config=Path(settings.config or ""), **common)
        case "onnx-adapters":
            from slmops.compress.adapters_export import export_adapters

            if base is None:
                raise RecipeError("onnx-adapters needs the base model of the adapter.")
            export_adapters(
                base,
                {name: checkpoint_folder / "adapter"},
                draft,
                precision=settings.stored_as,  # type: ignore[arg-type]
                **common,
            )
