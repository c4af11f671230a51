"""How the model's own rows look: what traffic is compared with. Packed into the bundle, without a word of any text.

::

    reference/reference.json   labels, counts, what the rows are
    reference/rows.npz         a row each: novelty, lengths, label, confidence, form; of some, the sketch; and the
                               surprisal of the training texts' features

The rows are held-out ones: a model is surer of rows that it was trained on, and their words are never new. Redacted
before anything is computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import CorruptArtifactError
from slmops.monitor.sketch import F16, SCHEMA, SKETCH_BYTES, sketch, surprisals
from slmops.privacy import redact

FOLDER = "reference"
ABOUT, ROWS = "reference.json", "rows.npz"
MOST_ROWS = 2000
MOST_SKETCHES = 1000
FEWEST_ROWS = 30
"""Fewer tell too little."""
UNKNOWN = -1
Numbers = NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """A held-out row and what the model makes of it. ``label`` and ``confidence``: of a classifier."""

    text: str
    output: str
    label: str | None = None
    confidence: float | None = None
    format_ok: bool | None = None


@dataclass(frozen=True)
class Sample:
    """Rows as columns, NaN where a row does not know: ``[rows]`` each; ``sketches`` of some of them.

    ``labels``: numbers into ``names``; ``format_ok``: 1 or 0.
    """

    novelty: Numbers
    input_chars: Numbers
    output_chars: Numbers
    confidence: Numbers
    format_ok: Numbers
    labels: NDArray[np.int64]
    names: tuple[str, ...] = ()
    sketches: tuple[bytes, ...] = ()
    finish_reasons: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_chars)


@dataclass(frozen=True)
class Reference:
    """``surprisal`` is None where the training texts are not known; ``of`` says what the rows are."""

    sample: Sample
    surprisal: F16 | None = None
    of: str = "the model's test rows"
    about: Mapping[str, Any] = field(default_factory=dict)


def sample_of(rows: Sequence[Mapping[str, Any]]) -> Sample:
    """The columns of events as the log has them."""
    names = tuple(sorted({row["label"] for row in rows if row["label"] is not None}))
    index = {name: number for number, name in enumerate(names)}
    return Sample(
        novelty=_numbers(row["novelty"] for row in rows),
        input_chars=_numbers(row["input_chars"] for row in rows),
        output_chars=_numbers(row["output_chars"] for row in rows),
        confidence=_numbers(row["confidence"] for row in rows),
        format_ok=_numbers(row["format_ok"] for row in rows),
        labels=np.array([UNKNOWN if row["label"] is None else index[row["label"]] for row in rows], dtype=np.int64),
        names=names,
        sketches=tuple(row["sketch"] for row in rows if row["sketch"] is not None),
        finish_reasons=tuple(row["finish_reason"] or "" for row in rows),
    )


def build_reference(training_texts: Iterable[str], rows: Sequence[Seen], *, about: Mapping[str, Any]) -> Reference:
    """From the texts that the model was trained on, and held-out rows (the first :data:`MOST_ROWS`)."""
    surprisal = surprisals(redact(text) for text in training_texts)
    chosen = [(one, sketch(redact(one.text), surprisal)) for one in rows[:MOST_ROWS]]
    events = [
        {
            "novelty": numbers.novelty,
            "input_chars": len(one.text),
            "output_chars": len(one.output),
            "confidence": one.confidence,
            "format_ok": one.format_ok,
            "label": one.label,
            "sketch": numbers.numbers if index < MOST_SKETCHES else None,
            "finish_reason": None,
        }
        for index, (one, numbers) in enumerate(chosen)
    ]
    return Reference(sample_of(events), surprisal, about=about)


def write_reference(reference: Reference, folder: Path) -> None:
    """Fill ``folder``, which is made."""
    sample = reference.sample
    folder.mkdir(parents=True)
    about = {"schema": SCHEMA, "of": reference.of, "rows": len(sample), "labels": sample.names, **reference.about}
    (folder / ABOUT).write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", "utf-8")
    arrays: dict[str, NDArray[Any]] = {
        name: getattr(sample, name) for name in ("novelty", "input_chars", "output_chars", "confidence", "format_ok")
    }
    arrays |= {"labels": sample.labels, "sketches": np.frombuffer(b"".join(sample.sketches), dtype=np.uint8)}
    if reference.surprisal is not None:
        arrays["surprisal"] = reference.surprisal
    np.savez_compressed(folder / ROWS, allow_pickle=False, **arrays)


def read_reference(bundle: Path) -> Reference | None:
    """The reference of a bundle; None where it has none, or one of another schema.

    Raises:
        CorruptArtifactError: it cannot be read.
    """
    folder = bundle / FOLDER
    if not (folder / ABOUT).is_file():
        return None
    try:
        about = json.loads((folder / ABOUT).read_text("utf-8"))
        if about["schema"] != SCHEMA:
            return None
        with np.load(folder / ROWS, allow_pickle=False) as arrays:
            raw = arrays["sketches"].tobytes()
            sample = Sample(
                **{
                    name: arrays[name] for name in ("novelty", "input_chars", "output_chars", "confidence", "format_ok")
                },
                labels=arrays["labels"],
                names=tuple(about["labels"]),
                sketches=tuple(raw[start : start + SKETCH_BYTES] for start in range(0, len(raw), SKETCH_BYTES)),
            )
            surprisal = arrays.get("surprisal")
    except (OSError, ValueError, KeyError) as error:
        raise CorruptArtifactError(
            f"The reference in {folder} is damaged: {error}.", remedy="Fetch the bundle anew, or run again."
        ) from None
    return Reference(sample, surprisal, str(about["of"]), about)


def reference_from_events(rows: Sequence[Mapping[str, Any]]) -> Reference:
    """Earlier traffic as the reference, for a model that brings none."""
    return Reference(sample_of(rows), None, "earlier traffic")


def _numbers(values: Iterable[Any]) -> Numbers:
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float32)
