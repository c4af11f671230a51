"""Feedback to rows that can be learnt from: what is right is kept, what cannot be known goes to quarantine. Pure.

An answer becomes a row with the target of, in this order: the correction that people gave; the answer itself where they
called it good; a teacher's answer where they called it bad and one is given. Guarantees: one text stands once; two
texts nearly alike with one target stand once; a text with two targets stands nowhere but in quarantine; no label takes
more than its share; each row names its event.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from slmops.artifacts import Message

GOOD = 0.5
"""A score from here up says that the answer is right."""
Source = Literal["correction", "confirmed", "teacher"]
Repeats = Callable[[Sequence[str]], list[bool]]
"""Texts -> whether each is nearly the same as an earlier one."""
Teacher = Callable[[Sequence[tuple[Message, ...]]], Sequence[str | None]]
"""Conversations -> answers; None where the teacher does not know."""


@dataclass(frozen=True)
class Curated:
    """A row: ``messages`` to ``target``, made from ``event``. ``new_label``: the model does not know it."""

    event: str
    messages: tuple[Message, ...]
    target: str
    source: Source
    at: float
    answered: str = ""
    new_label: bool = False

    @property
    def text(self) -> str:
        return self.messages[-1].content


@dataclass(frozen=True)
class Quarantined:
    event: str
    reason: str


@dataclass(frozen=True)
class Curation:
    rows: tuple[Curated, ...]
    quarantine: tuple[Quarantined, ...]
    summary: Mapping[str, Any]


def curate(
    events: Sequence[Mapping[str, Any]],
    feedback: Sequence[Mapping[str, Any]],
    *,
    labels: Sequence[str] = (),
    teacher: Teacher | None = None,
    repeats: Repeats | None = None,
    most_per_label: int | None = None,
    rows_per_label: int = 0,
) -> Curation:
    """``labels``: the model's, for a closed set; ``most_per_label``: rows of one label at most (the newest stay);
    ``rows_per_label``: what the model learnt of a label on average, which a new one may have too."""
    said: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in feedback:
        said[one["event"]].append(one)
    rows: list[Curated] = []
    asked: list[Curated] = []
    quarantine: list[Quarantined] = []
    for event in events:
        if event["id"] not in said:
            continue
        made = _row(event, said[event["id"]])
        if isinstance(made, Quarantined):
            quarantine.append(made)
        elif made.source == "teacher":
            asked.append(made)
        else:
            rows.append(made)
    rows += _asked(asked, teacher, quarantine)
    known = frozenset(labels)
    rows = [replace(row, new_label=bool(known) and row.target not in known) for row in rows]
    rows = _without_conflicts(rows, quarantine)
    kept, removed = _without_repeats(rows, repeats)
    balanced = _balanced(kept, most_per_label, rows_per_label) if known else kept
    return Curation(tuple(balanced), tuple(quarantine), _summary(balanced, quarantine, removed, len(kept), bool(known)))


def _row(event: Mapping[str, Any], said: Sequence[Mapping[str, Any]]) -> Curated | Quarantined:
    """What one event and all that was said of it teach."""
    if not event["messages"]:
        return Quarantined(event["id"], "its text was not kept")
    messages = tuple(Message(turn["role"], turn["content"]) for turn in json.loads(event["messages"]))
    if not messages or messages[-1].role != "user" or not messages[-1].content.strip():
        return Quarantined(event["id"], "it does not end with a user's turn")
    answered = event["output"] or ""
    corrections = {one["correction"].strip() for one in said if one["correction"] and one["correction"].strip()}
    scores = [one["score"] for one in said if one["score"] is not None]
    at = max(one["at"] for one in said)

    def made(target: str, source: Source) -> Curated:
        return Curated(event["id"], messages, target, source, at, answered)

    if len(corrections) > 1:
        return Quarantined(event["id"], "people corrected it to different answers")
    if corrections:
        return made(corrections.pop(), "correction")
    if not scores:
        return Quarantined(event["id"], "a comment alone")
    if sum(scores) / len(scores) >= GOOD:
        return made(answered, "confirmed") if answered.strip() else Quarantined(event["id"], "its answer was not kept")
    return made("", "teacher")


def _asked(rows: Sequence[Curated], teacher: Teacher | None, quarantine: list[Quarantined]) -> list[Curated]:
    """Answers that people called bad, answered anew."""
    if teacher is None:
        quarantine += [
            Quarantined(row.event, "called bad without a correction, and no teacher was given") for row in rows
        ]
        return []
    found = []
    for row, answer in zip(rows, teacher([row.messages for row in rows]) if rows else (), strict=True):
        if answer is None or not answer.strip():
            quarantine.append(Quarantined(row.event, "called bad, and the teacher is not sure either"))
        elif answer.strip() == row.answered.strip():
            quarantine.append(Quarantined(row.event, "called bad, and the teacher gives the same answer"))
        else:
            found.append(replace(row, target=answer.strip()))
    return found


def _without_conflicts(rows: Sequence[Curated], quarantine: list[Quarantined]) -> list[Curated]:
    targets: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        targets[folded(row)].add(row.target)
    for row in rows:
        if len(targets[folded(row)]) > 1:
            quarantine.append(Quarantined(row.event, "the same text was given different answers"))
    return [row for row in rows if len(targets[folded(row)]) == 1]


def _without_repeats(rows: Sequence[Curated], repeats: Repeats | None) -> tuple[list[Curated], int]:
    """One row a text, corrections first; near repeats are compared within one target."""
    rank = {"correction": 0, "confirmed": 1, "teacher": 2}
    ordered = sorted(rows, key=lambda row: (rank[row.source], row.at, row.event))
    kept: list[Curated] = []
    seen: set[str] = set()
    for row in ordered:
        if folded(row) not in seen:
            seen.add(folded(row))
            kept.append(row)
    if repeats is not None:
        groups: dict[str, list[Curated]] = defaultdict(list)
        for row in kept:
            groups[row.target].append(row)
        kept = [
            row
            for group in groups.values()
            for row, again in zip(group, repeats([folded(one) for one in group]), strict=True)
            if not again
        ]
    return sorted(kept, key=lambda row: (row.at, row.event)), len(rows) - len(kept)


def _balanced(rows: Sequence[Curated], most: int | None, rows_per_label: int) -> list[Curated]:
    """At most ``most`` rows a label: the newest, corrections first. By default three times the median label's, and of
    a new label ``rows_per_label`` where that is more: the model has seen none of it, and callers correct it most."""
    counts = Counter(row.target for row in rows)
    ordered = sorted(counts.values())
    share = max(10, 3 * ordered[len(ordered) // 2]) if ordered else 0
    known_most, new_most = (share, max(share, rows_per_label)) if most is None else (most, most)
    order = sorted(rows, key=lambda row: (row.source != "correction", -row.at, row.event))
    taken: Counter[str] = Counter()
    kept = set()
    for row in order:
        if taken[row.target] < (new_most if row.new_label else known_most):
            taken[row.target] += 1
            kept.add(row.event)
    return [row for row in rows if row.event in kept]


def _summary(
    rows: Sequence[Curated], quarantine: Sequence[Quarantined], removed: int, before_balance: int, closed: bool
) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "sources": dict(Counter(row.source for row in rows)),
        "quarantined": {"total": len(quarantine), "reasons": dict(Counter(one.reason for one in quarantine))},
        "duplicates_removed": removed,
        "over_balance": before_balance - len(rows),
        "balance": dict(Counter(row.target for row in rows).most_common()) if closed else None,
        "new_labels": sorted({row.target for row in rows if row.new_label}),
    }


def folded(row: Curated) -> str:
    """The form in which two rows ask the same."""
    return "\n".join(" ".join(turn.content.casefold().split()) for turn in row.messages if turn.role != "system")
