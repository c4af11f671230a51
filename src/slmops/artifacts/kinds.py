"""The kinds of artifact, in the order of a model's life, and how to read each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slmops.artifacts.base import Artifact
from slmops.artifacts.rows import Row

SPLITS = ("train", "validation", "test")
MODEL_DESCRIPTION = "slmops.json"
ROWS_NAME = "rows.jsonl"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, one at a time."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


@dataclass(frozen=True)
class Dataset(Artifact):
    """Checked rows in three splits.

    Files: ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` (one :class:`Row` a line), ``quarantine.jsonl`` (bad
    rows with the reason), ``summary.json`` (counts, removed duplicates, balance, ``labels``: sorted, or null for an
    open task). A teacher's answers add ``teacher.jsonl`` and, for a closed label set, ``teacher_<split>.npy``:
    float32 ``[rows, labels]`` log-probabilities in the order of the split's rows.
    """

    kind: ClassVar[str] = "dataset"

    def rows(self, split: str) -> Iterator[Row]:
        """Rows of one split, in their fixed order."""
        return (Row.from_json(raw) for raw in read_jsonl(self.path / f"{split}.jsonl"))

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The closed label set, sorted, or None for an open task."""
        labels = self.summary.get("labels")
        return None if labels is None else tuple(labels)


@dataclass(frozen=True)
class Signals(Artifact):
    """What a teacher thinks of every token of a data set's answers: see :mod:`slmops.artifacts.token_signals`."""

    kind: ClassVar[str] = "signals"


@dataclass(frozen=True)
class Checkpoint(Artifact):
    """Trained weights in the layout of transformers: ``config.json``, ``model.safetensors``, ``tokenizer.json``,
    ``tokenizer_config.json``, ``chat_template.jinja`` where the model chats; ``labels.json`` for a classifier;
    ``history.json``: the loss curve, a list of ``{"step", "epoch", "loss", "validation_loss", ...}``.
    """

    kind: ClassVar[str] = "checkpoint"

    @property
    def labels(self) -> tuple[str, ...] | None:
        path = self.path / "labels.json"
        return tuple(json.loads(path.read_text("utf-8"))) if path.exists() else None


@dataclass(frozen=True)
class _WithModel(Artifact):
    """An artifact with a folder ``model/`` that stands alone: all that a runtime needs.

    ``model/slmops.json`` says ``{"runtime": "onnx" | "onnx-genai" | "torch", "form": "classifier" | "generator",
    "precision": "int8", "parameters": int, "labels": [...] or null, "max_tokens": int}``.
    """

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def description(self) -> dict[str, Any]:
        description: dict[str, Any] = json.loads((self.model_path / MODEL_DESCRIPTION).read_text("utf-8"))
        return description

    @property
    def model_bytes(self) -> int:
        """Bytes of everything in ``model/``: weights, graph, tokenizer."""
        return sum(f.size_bytes for name, f in self.manifest.files.items() if name.startswith("model/"))


@dataclass(frozen=True)
class Variant(_WithModel):
    """A model in a form that a runtime loads, at one precision."""

    kind: ClassVar[str] = "variant"


@dataclass(frozen=True)
class Report(Artifact):
    """Measurements: ``report.json``, and ``report.html`` for the report of a whole run."""

    kind: ClassVar[str] = "report"

    @property
    def content(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "report.json").read_text("utf-8"))
        return content


@dataclass(frozen=True)
class Bundle(_WithModel):
    """What is shipped: ``model/`` (a variant's), ``report.json``, ``MODEL_CARD.md``, ``licenses/``."""

    kind: ClassVar[str] = "bundle"

    @property
    def report(self) -> dict[str, Any]:
        """Its measurements; empty where there are none."""
        path = self.path / "report.json"
        found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
        return found


@dataclass(frozen=True)
class Curated(Artifact):
    """Feedback that can be learnt from.

    Files: ``rows.jsonl`` (the columns that the bundle's recipe reads, and ``event``, ``source``, ``answered``),
    ``quarantine.jsonl`` (events that were left out, with the reason), ``summary.json``.
    """

    kind: ClassVar[str] = "curated"

    @property
    def rows_path(self) -> Path:
        """A file for ``data.train`` of a recipe."""
        return self.path / ROWS_NAME

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text("utf-8"))
        return summary


KINDS: dict[str, type[Artifact]] = {
    kind.kind: kind for kind in (Dataset, Signals, Checkpoint, Variant, Report, Bundle, Curated)
}


def open_artifact(path: Path | str) -> Artifact:
    """Open an artifact as the type that its manifest names (plain :class:`Artifact` for a kind not known here)."""
    artifact = Artifact.open(path)
    return KINDS.get(artifact.manifest.kind, Artifact)(artifact.path, artifact.manifest)
