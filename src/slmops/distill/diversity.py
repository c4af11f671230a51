"""How evenly and how variedly a set of answers is spread: figures for the summary. Pure; one pass, linear in the words.

Source of the share of distinct n-grams: J. Li et al., "A Diversity-Promoting Objective Function for Neural Conversation
Models", arXiv:1510.03055. It falls as a set grows: compare sets of like size.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

MOST_WORDS = 2_000_000
"""Words that n-grams are counted over; a larger set is represented by its first ones."""


def balance(targets: Iterable[str], labels: Sequence[str]) -> dict[str, Any]:
    """Rows by label, and how even they are: the entropy of the shares over that of equal ones (1: even, 0: one label).

    Labels that nobody has are counted with 0.
    """
    found = Counter(targets)
    counts = {label: found.get(label, 0) for label in labels}
    return {
        "labels": counts,
        "evenness": _evenness(counts),
        "missing": sorted(label for label, count in counts.items() if count == 0),
    }


def diversity(texts: Iterable[str]) -> dict[str, Any]:
    """``texts``, how many of them differ, the shares of distinct words and word pairs, and lengths in words."""
    words: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    lengths: list[int] = []
    seen: set[int] = set()
    counted = 0
    for text in texts:
        found = text.casefold().split()
        lengths.append(len(found))
        seen.add(hash(" ".join(found)))
        if counted < MOST_WORDS:
            counted += len(found)
            words.update(found)
            pairs.update(itertools.pairwise(found))
    p5, p50, p95 = (int(value) for value in np.percentile(lengths or [0], [5, 50, 95]))
    return {
        "texts": len(lengths),
        "distinct_texts": len(seen),
        "distinct_1": _share(len(words), words.total()),
        "distinct_2": _share(len(pairs), pairs.total()),
        "words": {"p5": p5, "p50": p50, "p95": p95},
    }


def _evenness(counts: Mapping[str, int]) -> float:
    total, classes = sum(counts.values()), len(counts)
    if not total or classes < 2:
        return 1.0
    entropy = -sum(count / total * math.log(count / total) for count in counts.values() if count)
    return round(entropy / math.log(classes), 4) + 0.0


def _share(some: int, every: int) -> float:
    return round(some / every, 4) if every else 0.0
