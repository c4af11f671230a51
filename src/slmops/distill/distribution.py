"""Stage 1 with a local classifier: its whole distribution over the labels is kept for every row.

Guarantees: the files agree in rows and order with the splits beside them; what is written is finite and sums to one;
a killed run finds the finished pieces again in ``draft.work``. Memory does not grow with the rows.

Source: the teacher's distribution as a target, G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural
Network", arXiv:1503.02531. Softening by a temperature is the student's business: log-probabilities here are plain.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import SPLITS, Dataset, Draft
from slmops.distill.files import write_json, write_jsonl
from slmops.errors import DataError, TeacherError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.runtime import Classifier, StatefulClassifier
from slmops.trust import digest_json

_Number = TypeVar("_Number", np.float16, np.float32)

logger = logging.getLogger(__name__)

PIECE_ROWS = 512
FLOOR = 1e-9
"""Smallest probability that is kept: log(0) is of no use to a loss."""
HALF_LARGEST = float(np.finfo(np.float16).max)


def keep_distribution(
    dataset: Dataset,
    classifier: Classifier,
    draft: Draft,
    *,
    extra_texts: Sequence[str] = (),
    states: bool = False,
    progress: ProgressSink = ignore,
) -> None:
    """Write ``dataset`` with the classifier's log-probabilities into ``draft.path``.

    Splits, quarantine and summary are copied (the summary gains ``"teacher"``). ``teacher_train.npy`` and
    ``teacher_validation.npy``: float32 ``[rows, labels]`` log-probabilities, columns in the order of
    ``dataset.labels``. With ``extra_texts`` also ``transfer.jsonl`` (``{"text": ...}``) and ``teacher_transfer.npy``.
    With ``states``, where the classifier shows them, ``states_train.npy`` and ``states_transfer.npy``: its mean hidden
    states, float16 ``[rows, hidden]``.

    Raises:
        DataError: the data set has no closed label set.
        TeacherError: the classifier knows other labels, or answers with something that is no distribution.
    """
    started_s = time.monotonic()
    labels = dataset.labels
    if not labels:
        raise DataError(f"The data set {dataset.path} has no closed label set.", remedy="Ask a text teacher instead.")
    columns = _columns(labels, classifier.labels)
    for name in (*(f"{split}.jsonl" for split in SPLITS), "quarantine.jsonl"):
        if (dataset.path / name).exists():
            shutil.copyfile(dataset.path / name, draft.path / name)
    shown = classifier if states and isinstance(classifier, StatefulClassifier) else None
    counts = {split: sum(1 for _ in dataset.rows(split)) for split in ("train", "validation")}
    total = sum(counts.values()) + len(extra_texts)
    teacher: dict[str, Any] = {"asked": total, "agreement_with_gold": {}}
    work = _Pieces(classifier, shown, columns, draft, progress, total)
    for split, count in counts.items():
        kept = work.fill(split, count, (row.text for row in dataset.rows(split)))
        targets = (row.target for row in dataset.rows(split))
        teacher["agreement_with_gold"][split] = _agreement(kept, targets, labels)
    if extra_texts:
        write_jsonl(draft.path / "transfer.jsonl", ({"text": text} for text in extra_texts))
        work.fill("transfer", len(extra_texts), extra_texts)
    teacher["transfer_texts"] = len(extra_texts)
    write_json(draft.path / "summary.json", {**dataset.summary, "teacher": teacher})
    draft.metrics["teacher"] = {**teacher, "seconds": round(time.monotonic() - started_s, 3)}


def log_probabilities(probabilities: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """Natural logarithm of ``[rows, labels]`` distributions, none below log(:data:`FLOOR`) before renormalizing."""
    raised = np.maximum(probabilities.astype(np.float64), FLOOR)
    logs: NDArray[np.float32] = np.log(raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
    return logs


class _Pieces:
    """Asks the classifier piece by piece; a finished piece is a file named by the digest of what was asked."""

    def __init__(
        self,
        classifier: Classifier,
        shown: StatefulClassifier | None,
        columns: Sequence[int],
        draft: Draft,
        progress: ProgressSink,
        total: int,
    ) -> None:
        self._classifier, self._shown, self._columns = classifier, shown, list(columns)
        self._draft, self._progress, self._total = draft, progress, total
        self._done = 0

    def fill(self, split: str, rows: int, texts: Iterable[str]) -> NDArray[np.float32]:
        """Write the split's files; gives its log-probabilities."""
        labels = len(self._columns)
        kept = _open(self._draft.path / f"teacher_{split}.npy", (rows, labels), np.float32)
        states: NDArray[np.float16] | None = None
        at = 0
        remaining = iter(texts)
        while piece := list(islice(remaining, PIECE_ROWS)):
            answers = self._piece(piece)
            here = slice(at, at + len(piece))
            kept[here] = answers[:, :labels]
            if self._shown is not None and split != "validation":
                if states is None:
                    shape = (rows, answers.shape[1] - labels)
                    states = _open(self._draft.path / f"states_{split}.npy", shape, np.float16)
                states[here] = answers[:, labels:]
            at += len(piece)
            self._done += len(piece)
            self._progress(Progress("teacher", self._done, self._total, "texts"))
        for array in (kept, states):
            if isinstance(array, np.memmap):
                array.flush()
        return kept

    def _piece(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``[texts, labels]`` log-probabilities, with ``[texts, hidden]`` states to their right where they are kept."""
        kind = "distribution" if self._shown is None else "states"
        path = self._draft.work / f"{kind}-{digest_json([*self._classifier.labels, '', *texts])[:32]}.npy"
        shape = (len(texts), len(self._columns))
        if (known := _load(path, shape)) is not None:
            return known
        if self._shown is None:
            parts = []
            probabilities = np.asarray(self._classifier.probabilities(texts))
        else:
            states, probabilities = self._shown.states_and_probabilities(texts)
            parts = [np.clip(states, -HALF_LARGEST, HALF_LARGEST)]
        _check(probabilities, shape)
        piece = np.hstack([log_probabilities(probabilities[:, self._columns]), *parts])
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.save(file, piece)
        temporary.replace(path)
        return piece


def _load(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    try:
        known: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError, OSError):
        logger.warning("%s is damaged; the teacher is asked again.", path)
        return None
    fits = known.ndim == 2 and known.shape[0] == shape[0] and known.shape[1] >= shape[1]
    return known if fits and known.dtype == np.float32 else None


def _open(path: Path, shape: tuple[int, int], dtype: type[_Number]) -> np.memmap[Any, np.dtype[_Number]]:
    """An ``.npy`` file to fill in place, so that a million rows need no memory."""
    if shape[0] == 0:
        raise DataError(f"There is no row for {path.name}.", remedy="Give more rows, or another data.split.")
    return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)


def _columns(wanted: Sequence[str], known: Sequence[str]) -> list[int]:
    """Where each wanted label stands in the classifier's order."""
    if set(wanted) != set(known) or len(wanted) != len(known):
        missing, foreign = sorted(set(wanted) - set(known)), sorted(set(known) - set(wanted))
        raise TeacherError(
            f"The teacher's labels are not the data's: it lacks {missing[:5]}, and knows {foreign[:5]} besides.",
            remedy="Adapt the teacher to these rows (teacher.adapt: true).",
        )
    return [list(known).index(label) for label in wanted]


def _check(probabilities: NDArray[Any], shape: tuple[int, int]) -> None:
    if probabilities.shape != shape:
        raise TeacherError(f"The teacher answered {probabilities.shape} probabilities where {shape} were asked for.")
    sums = probabilities.sum(axis=1)
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all() and np.allclose(sums, 1, atol=1e-3)):
        raise TeacherError(
            "The teacher's probabilities are not a distribution: some are NaN, negative, or do not sum to one.",
            remedy="Adapt it again with a lower teacher.learning_rate.",
        )


def _agreement(kept: NDArray[np.float32], targets: Iterator[str | None], labels: Sequence[str]) -> float | None:
    """Share of rows with gold whose most likely label is the gold one; None where there is no gold."""
    place = {label: index for index, label in enumerate(labels)}
    right = known = 0
    for best, target in zip(kept.argmax(axis=1), targets, strict=True):
        if target is not None:
            known += 1
            right += int(best) == place.get(target)
    return right / known if known else None
