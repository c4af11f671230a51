"""A checkpoint as a variant in few bits: exported in fp32, and rewritten as ``compress.quantize`` says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.artifacts import Draft
from slmops.compress.classifier import export_classifier
from slmops.compress.generator import export_generator
from slmops.compress.quantize.folder import quantize_folder
from slmops.progress import ProgressSink, ignore
from slmops.recipe import QuantizeConfig

if TYPE_CHECKING:
    from slmops.compress.quantize.statistics import TokenRow


def export_quantized(
    checkpoint: Path,
    draft: Draft,
    settings: QuantizeConfig,
    rows: Sequence[TokenRow],
    *,
    closed: bool,
    task: str,
    name: str,
    max_tokens: int,
    system: str | None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the model at ``checkpoint`` in few bits. ``rows``: to calibrate on; none where nothing is.

    Raises:
        ModelError, ConversionError: as exporting in fp32 does, and as :func:`quantize_folder`.
    """
    common: dict[str, Any] = {"task": task, "name": name, "max_tokens": max_tokens, "progress": progress}
    told: dict[str, Any] = {}

    def change(folder: Path) -> None:
        told.update(quantize_folder(folder, settings, rows, progress=progress))

    stored = f"int{settings.bits}"
    if closed:
        export_classifier(checkpoint, draft, precision="fp32", stored_as=stored, change=change, **common)
    else:
        export_generator(checkpoint, draft, precision="fp32", stored_as=stored, change=change, system=system, **common)
    draft.metrics |= {"quantization": {**settings.model_dump(mode="json", exclude={"name", "recover"}), **told}}
