"""Several answers to one row: what most of them say, and how many say it.

Pure. Answers that were rejected have no vote but count: what one of five samples says has an agreement of 0.2, whatever
became of the others. Ties go to what was said first, so the order of the samples decides and nothing else.

Source: X. Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language Models", arXiv:2203.11171. For
free text, where no two answers are equal, the one that is most like all others is kept (the medoid under token F1, as
in R. Kumar, W. Byrne, "Minimum Bayes-Risk Decoding for Statistical Machine Translation", 2004).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from slmops.distill.checks import Verdict, final_number
from slmops.recipe import CLOSED_TASKS, Task

COUNTED_TASKS = CLOSED_TASKS | {"math", "extraction"}
"""Tasks whose answers are the same or not; in the others they are more or less alike."""


@dataclass(frozen=True)
class Agreement:
    """
    ``chosen``  index of the sample that is kept, or None where none could be read
    ``share``   0 to 1: of the samples that say what it says; in free text, its mean likeness to the others
    ``votes``   what was said -> how many samples said it; empty for free text
    """

    chosen: int | None
    share: float
    votes: dict[str, int]


def agree(task: Task, verdicts: Sequence[Verdict]) -> Agreement:
    """What the samples of one row come to. An answer that differs from gold has its vote: gold has none."""
    said = [(index, verdict.normalized) for index, verdict in enumerate(verdicts) if verdict.normalized is not None]
    if not said:
        return Agreement(None, 0.0, {})
    if task in COUNTED_TASKS:
        keys = {index: vote_key(task, text) for index, text in said}
        votes = Counter(keys.values())
        winner, count = votes.most_common(1)[0]
        first = next(index for index, key in keys.items() if key == winner)
        return Agreement(first, count / len(verdicts), dict(votes))
    bags = [(index, Counter(text.casefold().split())) for index, text in said]
    likeness = {
        index: fmean([token_f1(bag, other) for at, other in bags if at != index] or [1.0]) for index, bag in bags
    }
    best = max(likeness, key=lambda index: likeness[index])  # the first of equals
    others = max(1, len(verdicts) - 1)
    share = likeness[best] * (len(said) - 1) / others if len(verdicts) > 1 else 1.0
    return Agreement(best, share, {})


def vote_key(task: Task, text: str) -> str:
    """Equal for answers that say the same."""
    if task == "math":
        number = final_number(text)[0]
        # Rounded as same_number() does, so that 0.333333 and 1/3 are one vote.
        return text if number is None else f"{float(number):.6g}" if abs(number) < 10**300 else str(number)
    if task == "extraction":
        return json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
    return text


def token_f1(left: Counter[str], right: Counter[str]) -> float:
    """Harmonic mean of precision and recall over words; 1 for two empty texts."""
    shared, total = (left & right).total(), left.total() + right.total()
    return 2 * shared / total if total else 1.0
