"""Old rows and what callers corrected, as one data set of the same form.

Guarantees: a test row stays a test row with the answer it had, so that an old and a new version are judged by the same
rows; no text of the test rows, and nothing nearly the same, is learnt; each correction is in exactly one of a split,
the quarantine (with the reason) or the count of those that say nothing new. The same rows and seed give the same
splits.

A correction of a known training or validation row replaces its answer. Where corrections of one text contradict each
other the majority counts; without one, all of them go to quarantine. A label that is new needs several corrections:
one alone is likelier a slip of the pen. With closed label sets a correction is doubted, and kept out, where a linear
model that has not seen it is sure of another label (after C. Northcutt, L. Jiang, I. Chuang, "Confident Learning",
arXiv:1911.00068). What is wrong in a way that the other rows do not know is not found.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from slmops.artifacts import SPLITS, Draft, Row
from slmops.data.build import RowBuilder, UnusableRowError
from slmops.data.intake import records_of
from slmops.data.prepare import prepare
from slmops.data.readers import BadRecord
from slmops.data.sources import resolve_one
from slmops.data.text import fold
from slmops.errors import DataError
from slmops.progress import ProgressSink, ignore
from slmops.recipe import CLOSED_TASKS, DataConfig, ImproveConfig, SplitConfig, Task

MARK, EARLIER = "feedback-", "earlier-"
"""What the ids of corrections begin with, and what those of an earlier round do."""
MOST_COPIES = 4
FOLDS = 5
MOST_OLD_ROWS = 4000
"""That the linear model learns beside the corrections."""
LEAST_ROWS_TO_DOUBT = 50
DOUBT_BELOW = 0.05

Doubt = Callable[[Sequence[Row], Sequence[Row]], Mapping[str, str]]
"""(old training rows, corrections) -> id of a doubted correction -> why."""


@dataclass(frozen=True)
class Merged:
    """``splits``: split -> rows. ``quarantined``: corrections with the reason."""

    splits: Mapping[str, Sequence[Row]]
    quarantined: Sequence[tuple[Row, str]]
    known: int
    replaced: int
    new_labels: tuple[str, ...]
    copies: Mapping[str, int]


def read_corrections(path: Path, config: DataConfig, task: Task) -> tuple[list[Row], list[str]]:
    """The rows of a file with the recipe's columns, and why others cannot be used.

    Raises:
        DataError: no such file, or no usable row with an answer.
    """
    # A row's place in the old file says nothing here, and the file need not have the column of ids.
    plain = config.model_copy(update={"id": None, "split": SplitConfig(), "limit": None})
    source, builder = resolve_one("train", str(path), None), RowBuilder.of(plain, task)
    rows: list[Row] = []
    reasons: list[str] = []
    for _, record in records_of(source, builder, config.encoding):
        try:
            if isinstance(record, BadRecord):
                raise UnusableRowError(record.reason)
            row = builder.build(record, str(record.row), "").row
            if row.target is None:
                raise UnusableRowError("no answer")
            rows.append(row)
        except UnusableRowError as reason:
            reasons.append(f"row {record.row}: {reason}")
    if not rows:
        raise DataError(
            f"None of its rows can be used; the first: {reasons[0] if reasons else 'there is none'}.",
            path=path,
            remedy="Give rows with the columns of the recipe's data.input and data.target.",
        )
    return rows, reasons


def merge(
    old: Mapping[str, Sequence[Row]],
    corrections: Sequence[Row],
    settings: ImproveConfig,
    *,
    closed: bool,
    validation_share: float,
    seed: int,
    doubt: Doubt | None = None,
) -> Merged:
    """Decide for each correction what becomes of it. ``old``: split -> rows."""
    quarantined: list[tuple[Row, str]] = []
    agreed = _agreed(corrections, quarantined)
    known, replaced, splits, fresh = _against_old(old, agreed, quarantined)
    labels = {row.target for row in old["train"]} if closed else set()
    if closed:
        fresh = _with_enough(fresh, labels, settings, quarantined)
    if closed and doubt is not None:
        doubted = doubt(splits["train"], fresh)
        quarantined += [(row, doubted[row.id]) for row in fresh if row.id in doubted]
        fresh = [row for row in fresh if row.id not in doubted]
        fresh = _with_enough(fresh, labels, settings, quarantined)
    for split, rows in _divided(fresh, settings.test_share, validation_share, seed, closed=closed).items():
        splits[split] += rows
    new = {row.target for row in fresh if row.target} - labels if closed else set()
    copies = copies_of(splits["train"], settings.weight, closed=closed)
    return Merged(splits, quarantined, known, replaced, tuple(sorted(map(str, new))), copies)


def copies_of(train: Sequence[Row], weight: int | None, *, closed: bool) -> dict[str, int]:
    """How often each correction among ``train`` is learnt, where that is more than once.

    ``weight`` None: so often that its label has about as many rows as the others, at most :data:`MOST_COPIES` times.
    """
    own = [row for row in train if row.id.startswith(MARK)]
    if weight is not None or not closed:
        return {row.id: weight for row in own if weight is not None and weight > 1}
    rows_of = Counter(row.target for row in train)
    usual = median(rows_of.values()) if rows_of else 0
    times = {label: min(MOST_COPIES, max(1, round(usual / rows))) for label, rows in rows_of.items()}
    return {row.id: times[row.target] for row in own if times[row.target] > 1}


def improve_data(
    old: Mapping[str, Sequence[Row]],
    corrections: Sequence[Row],
    config: DataConfig,
    settings: ImproveConfig,
    task: Task,
    seed: int,
    draft: Draft,
    *,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with a Dataset of the old rows and the corrections; ``summary.json`` has ``improved`` besides.

    Raises:
        DataError: none of the corrections can be used.
    """
    closed = task in CLOSED_TASKS
    marked = [replace(row, id=f"{MARK}{_short(row)}-{number}") for number, row in enumerate(corrections)]
    doubt = doubted_by_linear(settings.doubt, seed) if closed and settings.doubt is not None else None
    named = {split: [replace(row, id=_bare_id(row.id)) for row in rows] for split, rows in old.items()}
    merged = merge(
        named, marked, settings, closed=closed, validation_share=config.split.validation, seed=seed, doubt=doubt
    )
    _check_anything(merged, len(marked))
    prepare(_as_files(merged, config, task, draft.work), task, seed, draft, progress=progress)
    _add_copies(draft.path / "train.jsonl", merged.copies)
    with (draft.path / "quarantine.jsonl").open("a", encoding="utf-8") as file:
        for row, reason in merged.quarantined:
            raw = json.dumps(row.to_json(), ensure_ascii=False)
            file.write(json.dumps({"source": "feedback", "row": row.id, "reason": reason, "raw": raw}) + "\n")
    told = _told(merged, len(marked))
    path = draft.path / "summary.json"
    summary = {**json.loads(path.read_text("utf-8")), "improved": told}
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    draft.metrics |= {"corrections": len(marked), "corrections_used": told["used"], "new_labels": told["new_labels"]}


def doubted_by_linear(sure: float, seed: int) -> Doubt:
    """Doubts a correction where a linear model, trained without it, gives another label at least ``sure``."""

    def doubt(old: Sequence[Row], fresh: Sequence[Row]) -> dict[str, str]:
        from slmops.models.linear import calibrated, fit_linear

        if len(old) + len(fresh) < LEAST_ROWS_TO_DOUBT:
            return {}
        base = [_pair(row) for row in sorted(old, key=lambda row: _place(row, seed))[:MOST_OLD_ROWS]]
        found: dict[str, str] = {}
        for fold_number in range(FOLDS):
            held = [row for row in fresh if int(_place(row, seed) * FOLDS) == fold_number]
            learnt = [_pair(row) for row in fresh if int(_place(row, seed) * FOLDS) != fold_number]
            unseen = base[fold_number::FOLDS]
            seen = [pair for number, pair in enumerate(base) if number % FOLDS != fold_number]
            model = fit_linear([*seen, *learnt], [], seed) if held else None
            if model is None:
                continue
            model = calibrated(model, unseen)
            for row, likely in zip(held, model.probabilities([row.text for row in held]), strict=True):
                best = int(likely.argmax())
                own = float(likely[model.labels.index(row.target)]) if row.target in model.labels else 1.0
                if likely[best] >= sure and own < DOUBT_BELOW:
                    found[row.id] = f"doubted: the other rows say {model.labels[best]!r}"
        return found

    return doubt


def _agreed(corrections: Sequence[Row], quarantined: list[tuple[Row, str]]) -> list[Row]:
    """One correction a text: the majority's."""
    of_text: dict[str, list[Row]] = defaultdict(list)
    for row in corrections:
        of_text[_content(row)].append(row)
    agreed = []
    for rows in of_text.values():
        votes = Counter(row.target for row in rows).most_common()
        if len(votes) > 1 and votes[0][1] == votes[1][1]:
            quarantined += [(row, "corrections of this text contradict each other") for row in rows]
            continue
        agreed.append(next(row for row in rows if row.target == votes[0][0]))
        quarantined += [
            (row, "most others say something else of this text") for row in rows if row.target != votes[0][0]
        ]
    return agreed


def _against_old(
    old: Mapping[str, Sequence[Row]], corrections: Sequence[Row], quarantined: list[tuple[Row, str]]
) -> tuple[int, int, dict[str, list[Row]], list[Row]]:
    """How many say nothing new, how many replace an answer, the old splits after that, and the others."""
    place = {_content(row): (split, row) for split in SPLITS for row in old[split]}
    said: dict[str, str | None] = {}
    known, fresh = 0, []
    for row in corrections:
        split, before = place.get(_content(row), ("", None))
        if before is None:
            fresh.append(row)
        elif before.target == row.target:
            known += 1
        elif split == "test":
            quarantined.append((row, "a test row, which judges old and new versions alike and stays as it is"))
        else:
            said[_content(row)] = row.target
    splits = {
        split: [
            replace(row, target=said.get(_content(row), row.target)) if split != "test" else row for row in old[split]
        ]
        for split in SPLITS
    }
    return known, len(said), splits, fresh


def _with_enough(
    fresh: Sequence[Row], labels: set[str | None], settings: ImproveConfig, quarantined: list[tuple[Row, str]]
) -> list[Row]:
    rows_of = Counter(row.target for row in fresh)
    kept = []
    for row in fresh:
        if row.target in labels or (settings.new_labels and rows_of[row.target] >= settings.least_label_rows):
            kept.append(row)
        elif settings.new_labels:
            needed = f"{rows_of[row.target]} of the {settings.least_label_rows} rows that a new label needs"
            quarantined.append((row, f"the label {row.target!r} is new: {needed}"))
        else:
            quarantined.append((row, f"the label {row.target!r} is new, and improve.new_labels is false"))
    return kept


def _divided(
    rows: Sequence[Row], test_share: float, validation_share: float, seed: int, *, closed: bool
) -> dict[str, list[Row]]:
    """By label: a share for the test, one for the validation, the rest to learn from."""
    of_label: dict[str | None, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: _place(row, seed)):
        of_label[row.target if closed else None].append(row)
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for own in of_label.values():
        tests = math.ceil(test_share * len(own)) if len(own) >= 3 else 0
        checks = round(validation_share * len(own))
        splits["test"] += own[:tests]
        splits["validation"] += own[tests : tests + checks]
        splits["train"] += own[tests + checks :]
    return splits


def _as_files(merged: Merged, config: DataConfig, task: Task, folder: Path) -> DataConfig:
    """The rows as three files, and how to read them as they are."""
    for split in SPLITS:
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in merged.splits[split]:
                file.write(json.dumps(_record(row), ensure_ascii=False) + "\n")
    single = RowBuilder.of(config, task).single_column
    shape: dict[str, Any] = {"input": "{text}", "target": "{target}"} if single else {"messages": "messages"}
    files = {split: str(folder / f"{split}.jsonl") for split in SPLITS}
    system = config.system if single else None
    return DataConfig(**files, **shape, system=system, id="id", near_duplicates=config.near_duplicates)


def _record(row: Row) -> dict[str, Any]:
    messages = [message.to_json() for message in row.messages]
    if row.target is not None:
        messages.append({"role": "assistant", "content": row.target})
    return {"id": row.id, "text": row.text, "target": row.target, "messages": messages}


def _bare_id(name: str) -> str:
    """Without the place in a split, which a file of its own adds, and which would grow with every round."""
    for split in ("validation-", "test-"):
        bare = name.removeprefix(split)
        name = name if bare.isdigit() else bare
    return EARLIER + name.removeprefix(MARK) if name.startswith(MARK) else name


def _add_copies(path: Path, copies: Mapping[str, int]) -> None:
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            for number in range(2, copies.get(row["id"], 1) + 1):
                file.write(json.dumps({**row, "id": f"{row['id']}#{number}"}, ensure_ascii=False) + "\n")


def _check_anything(merged: Merged, given: int) -> None:
    used = merged.replaced + sum(row.id.startswith(MARK) for rows in merged.splits.values() for row in rows)
    if used:
        return
    reasons = Counter(reason for _, reason in merged.quarantined).most_common(1)
    why = f"{merged.known} say what the rows say already" if not reasons else f"the commonest reason: {reasons[0][0]}"
    raise DataError(
        f"None of the {given} corrections brings anything new; {why}.", remedy="Wait for more feedback, and run again."
    )


def _told(merged: Merged, given: int) -> dict[str, Any]:
    by_split = {split: sum(row.id.startswith(MARK) for row in merged.splits[split]) for split in SPLITS}
    return {
        "corrections": given,
        "used": sum(by_split.values()) + merged.replaced,
        "rows": by_split,
        "replaced": merged.replaced,
        "known": merged.known,
        "quarantined": dict(Counter(reason for _, reason in merged.quarantined).most_common()),
        "new_labels": list(merged.new_labels),
        "copies": sum(times - 1 for times in merged.copies.values()),
    }


def _content(row: Row) -> str:
    return fold("\n".join(message.content for message in row.messages if message.role != "system"))


def _pair(row: Row) -> tuple[str, str]:
    return row.text, row.target or ""


def _short(row: Row) -> str:
    return hashlib.blake2b(f"{_content(row)}\0{row.target}".encode(), digest_size=4).hexdigest()


def _place(row: Row, seed: int) -> float:
    """Where in [0, 1) a row stands, by its text alone."""
    digest = hashlib.blake2b(f"{seed}\0{_content(row)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
