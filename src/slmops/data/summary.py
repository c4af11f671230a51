"""What the stage tells of the data: ``summary.json``, and the checks that need the whole.

Keys: ``rows`` by split, ``read`` and ``sources`` by role, ``quarantined`` by reason, ``duplicates_removed`` and
``overlap_removed`` (exact, near), ``kept_together``, ``over_limit``, ``labels``, ``balance`` (label -> rows by split),
``label_entropy_bits``, ``lengths`` (quantiles of kept rows), ``warnings``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from slmops.artifacts import SPLITS
from slmops.data.dedupe import Fate
from slmops.data.intake import Taken
from slmops.data.shingles import U8
from slmops.data.sources import ROLES, Source
from slmops.data.split import TEST, TRAIN, VALIDATION
from slmops.data.text import fold
from slmops.errors import DataError

SCHEMA = 1
QUANTILES = (0.05, 0.5, 0.95, 0.99)
MANY_QUARANTINED = 0.05
FEW_ROWS = 3
MAX_NAMED = 10


def summarize(
    *,
    taken: Taken,
    fates: U8,
    splits: U8,
    together: int,
    read: Mapping[str, int],
    reasons: Counter[str],
    sources: Sequence[Source],
    near_duplicates: float | None,
    remove_near: bool,
    labelled: bool,
    warnings: Sequence[str],
) -> dict[str, Any]:
    """The content of ``summary.json``: plain JSON."""
    kept = fates == Fate.KEPT
    counts = {fate: int((fates == fate).sum()) for fate in Fate}
    quarantined = sum(reasons.values())
    balance = _balance(taken, kept, splits) if labelled else None
    return {
        "schema": SCHEMA,
        "rows": {split: int((splits[kept] == index).sum()) for index, split in enumerate(SPLITS)},
        "read": dict(read),
        "sources": {
            source.role: {"name": source.name, "sha256": source.digest(), "rows": read[source.role]}
            for source in sources
        },
        "quarantined": {"total": quarantined, "reasons": dict(reasons.most_common())},
        "duplicates_removed": {
            "exact": counts[Fate.EXACT],
            "near": counts[Fate.NEAR],
            "why": f"same text and answer as an earlier row of the file; {_near_words(near_duplicates, remove_near)}",
        },
        "overlap_removed": {
            "exact": counts[Fate.OVERLAP_EXACT],
            "near": counts[Fate.OVERLAP_NEAR],
            "why": "in the validation or test file too",
        },
        "kept_together": together,
        "over_limit": counts[Fate.OVER_LIMIT],
        "labels": None if balance is None else [*balance],
        "balance": balance,
        "label_entropy_bits": None if balance is None else _entropy_bits([sum(n.values()) for n in balance.values()]),
        "lengths": {
            "characters": _quantiles(taken.chars[kept]),
            "words": _quantiles(taken.words[kept]),
            "answer_characters": _quantiles(taken.answer_chars[kept]),
        },
        "warnings": [*warnings, *_quarantine_warnings(reasons, quarantined, sum(read.values()))],
    }


def check_labels(taken: Taken, fates: U8, splits: U8, sources: Sequence[Source]) -> list[str]:
    """Check the labels of a closed set; returns warnings.

    A class of fewer than 3 rows is no error: its rows are for training, and the warning says that it is not tested.

    Raises:
        DataError: one class only, targets that are no labels, labels that only a held-out file has.
    """
    kept = fates == Fate.KEPT
    path = sources[0].files[0]
    own = kept & (taken.columns.files == ROLES.index("train"))
    names = taken.label_names
    trained = np.unique(taken.labels[own])
    for source in sources[1:]:
        held_out = np.unique(taken.labels[kept & (taken.columns.files == ROLES.index(source.role))])
        unseen = sorted(names[number] for number in np.setdiff1d(held_out, trained))
        if unseen:
            raise DataError(
                f"{_named(unseen)} in data.{source.role} but never in data.train.",
                path=source.files[0],
                remedy="Correct the labels, or add rows of them to data.train.",
            )
    if len(trained) == 1:
        raise DataError(
            f"All {int(own.sum())} rows have the label {names[int(trained[0])]!r}: there is nothing to tell apart.",
            path=path,
            remedy="Give rows of at least two labels, or check data.target.",
        )
    if own.sum() >= 20 and len(trained) * 2 > own.sum():
        raise DataError(
            f"There are {len(trained)} different targets in {int(own.sum())} rows: they look like free text, not like "
            "labels.",
            path=path,
            remedy="Set data.target to the column of labels, or task: generation.",
        )
    return _label_warnings(taken, kept, splits)


def _label_warnings(taken: Taken, kept: npt.NDArray[np.bool_], splits: U8) -> list[str]:
    balance = _balance(taken, kept, splits)
    warnings: list[str] = []
    few = [label for label, rows in balance.items() if sum(rows.values()) < FEW_ROWS]
    if few:
        warnings.append(f"{_named(few)} in fewer than {FEW_ROWS} rows: not split; all of them are for training.")
    for split in (TEST, VALIDATION):
        absent = [label for label, rows in balance.items() if not rows[SPLITS[split]] and label not in few]
        if absent:
            warnings.append(f"{_named(absent)} not in the {SPLITS[split]} split: too few rows, or all alike.")
    for split in (TRAIN,):
        absent = [label for label, rows in balance.items() if not rows[SPLITS[split]]]
        if absent:
            warnings.append(f"{_named(absent)} not in the {SPLITS[split]} split.")
    folded: dict[str, list[str]] = {}
    for label in balance:
        folded.setdefault(fold(label), []).append(label)
    warnings += [
        f"The labels {', '.join(map(repr, same))} differ in case or blanks only, and count as different."
        for same in folded.values()
        if len(same) > 1
    ]
    return warnings


def _named(labels: Sequence[str]) -> str:
    shown = ", ".join(repr(label[:60]) for label in labels[:MAX_NAMED])
    more = f" and {len(labels) - MAX_NAMED} more" if len(labels) > MAX_NAMED else ""
    return f"The label {shown} is" if len(labels) == 1 else f"The labels {shown}{more} are"


def _balance(taken: Taken, kept: npt.NDArray[np.bool_], splits: U8) -> dict[str, dict[str, int]]:
    size = len(taken.label_names)
    labels = taken.labels
    columns = [
        np.bincount(labels[kept & (splits == split) & (labels >= 0)], minlength=size)
        for split in (TRAIN, VALIDATION, TEST)
    ]
    return {
        taken.label_names[number]: {split: int(column[number]) for split, column in zip(SPLITS, columns, strict=True)}
        for number in sorted(range(size), key=lambda number: taken.label_names[number])
        if sum(column[number] for column in columns)
    }


def _entropy_bits(counts: Sequence[int]) -> float:
    shares = np.array(counts) / sum(counts)
    return round(float(-(shares * np.log2(shares)).sum()), 4)


def _near_words(near_duplicates: float | None, remove_near: bool) -> str:
    if near_duplicates is None:
        return "near: not looked for"
    measure = f"Jaccard index of character 5-grams of at least {near_duplicates:g}"
    if remove_near:
        return f"near: {measure}"
    return f"near ({measure}): kept, each with its like in one split, because a row joins several columns or turns"


def _quantiles(values: npt.NDArray[np.int32]) -> dict[str, int]:
    """Observed values at the quantiles, not interpolations."""
    found = np.quantile(values, QUANTILES, method="inverted_cdf")
    named = {f"p{round(share * 100):02d}": int(value) for share, value in zip(QUANTILES, found, strict=True)}
    return {"min": int(values.min()), **named, "max": int(values.max())}


def _quarantine_warnings(reasons: Counter[str], quarantined: int, read: int) -> list[str]:
    if quarantined <= read * MANY_QUARANTINED:
        return []
    reason, count = reasons.most_common(1)[0]
    return [f"{quarantined} of {read} rows are in the quarantine; the most common reason ({count} rows): {reason}."]
