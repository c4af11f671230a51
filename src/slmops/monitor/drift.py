"""Does traffic still look like the rows that the model was judged on: every view of it tested, all judged together.

========== ============================================================================ ====================
view       what of a request                                                            test
========== ============================================================================ ====================
novelty    words and 4-grams that the training texts do not have                        mean, upward
embedding  the sketch's vector                                                          energy distance
tokens     classes of words                                                             chi-square
length     characters of the input                                                      Kolmogorov-Smirnov
labels     what a classifier answers                                                    chi-square
confidence how sure it is                                                               mean
answer     characters of a written answer                                               Kolmogorov-Smirnov
format     whether an answer has the form that the task asks for                        chi-square
========== ============================================================================ ====================

All are permutation tests (:mod:`slmops.monitor.permutation`), so a check on unchanged traffic raises an alarm with a
chance of ``alpha`` at most. Pure. Not covered: what has changed in ways that none of these shows, above all that right
answers are other ones now; that is for feedback and judging.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.monitor.permutation import PERMUTATIONS, Test, count_test, energy_test, holm, ks_test, mean_test
from slmops.monitor.reference import UNKNOWN, Numbers, Reference, Sample
from slmops.monitor.sketch import vectors, word_buckets

ALPHA = 0.01
FEWEST = 50
"""Rows of a view in the window, and in the reference, below which it is not tested."""
MOST = 1000
"""Rows of a window that are tested: of more, evenly chosen ones. The reference may have twice as many: it is a sample
too, and what is by chance unusual about it would be an alarm again and again."""
LABELS_TOLD = 3
MOST_LABELS = 100


@dataclass(frozen=True)
class View:
    """One test. ``adjusted``: its p-value as one of all; ``words``: what has changed, for people."""

    name: str
    rows: int
    statistic: float
    p_value: float
    adjusted: float
    alarm: bool
    words: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class Drift:
    """``rows``: of the window; ``untested``: views with too few rows; ``alarm``: any view's."""

    rows: int
    reference: str
    alpha: float
    views: tuple[View, ...]
    untested: tuple[str, ...]

    @property
    def alarm(self) -> bool:
        return any(view.alarm for view in self.views)

    @property
    def sentence(self) -> str:
        if not self.views:
            return f"{self.rows} requests are too few to say anything; {FEWEST} are needed."
        if not self.alarm:
            return f"The last {self.rows} requests look like {self.reference}."
        told = "; ".join(view.words for view in self.views if view.alarm)
        return f"The last {self.rows} requests differ from {self.reference}: {told}."

    def to_json(self) -> dict[str, Any]:
        return {
            "alarm": self.alarm,
            "sentence": self.sentence,
            "rows": self.rows,
            "reference": self.reference,
            "alpha": self.alpha,
            "views": [view.to_json() for view in self.views],
            "untested": list(self.untested),
        }


def drift(
    reference: Reference, window: Sample, *, alpha: float = ALPHA, permutations: int = PERMUTATIONS, seed: int = 0
) -> Drift:
    """Compare a window of traffic with the reference."""
    views = _Views(reference.sample, window, permutations, seed)
    found = {name: view for name, run in views.tests().items() if (view := run()) is not None}
    adjusted = holm({name: test.p_value for name, (test, _, _) in found.items()})
    return Drift(
        rows=len(window),
        reference=reference.of,
        alpha=alpha,
        views=tuple(
            View(name, rows, test.statistic, test.p_value, adjusted[name], adjusted[name] <= alpha, words)
            for name, (test, rows, words) in found.items()
        ),
        untested=tuple(name for name in views.tests() if name not in found),
    )


Found = tuple[Test, int, str]


class _Views:
    """Each view's two samples, its test, and its words; None where there is too little."""

    def __init__(self, reference: Sample, window: Sample, permutations: int, seed: int) -> None:
        self.reference, self.window = reference, window
        self.options = (permutations, seed)

    def tests(self) -> dict[str, Callable[[], Found | None]]:
        return {
            "novelty": self.novelty,
            "embedding": self.embedding,
            "tokens": self.tokens,
            "length": lambda: self.numbers(
                "input_chars", "inputs are {now:.0f} characters long (median), not {was:.0f}"
            ),
            "labels": self.labels,
            "confidence": self.confidence,
            "answer": self.answer,
            "format": self.format,
        }

    def novelty(self) -> Found | None:
        pair = self._pair("novelty")
        if pair is None:
            return None
        line = np.quantile(pair[0], 0.95)
        words = f"{100 * (pair[1] > line).mean():.0f} % of the texts are newer than 95 % of the reference"
        return mean_test(*pair, *self.options, upward=True), len(pair[1]), words

    def embedding(self) -> Found | None:
        pair = self._sketches()
        if pair is None:
            return None
        test = energy_test(vectors(pair[0]), vectors(pair[1]), *self.options)
        return test, len(pair[1]), f"texts lie {test.statistic:.2g} away (energy distance)"

    def tokens(self) -> Found | None:
        pair = self._sketches()
        if pair is None:
            return None
        test = count_test(word_buckets(pair[0]), word_buckets(pair[1]), *self.options)
        return test, len(pair[1]), f"{100 * test.statistic:.0f} % of the words fall into other classes"

    def numbers(self, column: str, words: str) -> Found | None:
        pair = self._pair(column)
        if pair is None:
            return None
        was, now = (float(np.median(part)) for part in pair)
        return ks_test(*pair, *self.options), len(pair[1]), words.format(was=was, now=now)

    def labels(self) -> Found | None:
        was, now = label_counts(self.reference), label_counts(self.window)
        names = sorted(set(was) | set(now), key=lambda name: -(was.get(name, 0) + now.get(name, 0)))
        if min(sum(was.values()), sum(now.values())) < FEWEST or len(names) < 2:
            return None
        place = {name: min(number, MOST_LABELS) for number, name in enumerate(names)}
        pair = [
            _one_hot([place[sample.names[number]] for number in _chosen(sample.labels[sample.labels != UNKNOWN], most)])
            for sample, most in ((self.reference, 2 * MOST), (self.window, MOST))
        ]
        width = max(part.shape[1] for part in pair)
        wide = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in pair]
        shares = [{name: counts.get(name, 0) / sum(counts.values()) for name in names} for counts in (was, now)]
        moved = sorted(names, key=lambda name: -abs(shares[1][name] - shares[0][name]))[:LABELS_TOLD]
        told = ", ".join(
            f"{name} {100 * shares[1][name]:.1f} % instead of {100 * shares[0][name]:.1f} %" for name in moved
        )
        return count_test(wide[0], wide[1], *self.options), len(wide[1]), f"labels have moved ({told})"

    def confidence(self) -> Found | None:
        pair = self._pair("confidence")
        if pair is None:
            return None
        words = f"mean confidence is {pair[1].mean():.2f}, not {pair[0].mean():.2f}"
        return mean_test(*pair, *self.options), len(pair[1]), words

    def answer(self) -> Found | None:
        if self.window.names:  # the length of a label is the label
            return None
        return self.numbers("output_chars", "answers are {now:.0f} characters long (median), not {was:.0f}")

    def format(self) -> Found | None:
        pair = self._pair("format_ok")
        if pair is None or min(part.min() for part in pair) == 1:
            return None
        words = f"{100 * pair[1].mean():.1f} % of the answers have the right form, not {100 * pair[0].mean():.1f} %"
        was, now = (np.stack([part, 1 - part], axis=1) for part in pair)
        return count_test(was, now, *self.options), len(pair[1]), words

    def _pair(self, column: str) -> tuple[Numbers, Numbers] | None:
        found = [getattr(sample, column) for sample in (self.reference, self.window)]
        was, now = (_chosen(v[~np.isnan(v)], most) for v, most in zip(found, (2 * MOST, MOST), strict=True))
        return None if min(len(was), len(now)) < FEWEST else (was, now)

    def _sketches(self) -> tuple[list[bytes], list[bytes]] | None:
        both = (self.reference.sketches, self.window.sketches)
        was, now = ([found[place] for place in _places(len(found), MOST)] for found in both)
        return None if min(len(was), len(now)) < FEWEST else (was, now)


def label_counts(sample: Sample) -> dict[str, int]:
    """Rows by label."""
    numbers, counts = np.unique(sample.labels[sample.labels != UNKNOWN], return_counts=True)
    return {sample.names[number]: int(count) for number, count in zip(numbers, counts, strict=True)}


def _one_hot(places: list[int]) -> Numbers:
    found = np.zeros((len(places), max(places, default=0) + 1), dtype=np.float32)
    found[np.arange(len(places)), places] = 1
    return found


def _chosen(values: NDArray[Any], most: int) -> NDArray[Any]:
    return values[_places(len(values), most)]


def _places(rows: int, most: int) -> NDArray[np.int64]:
    """Up to ``most`` rows, evenly."""
    return np.arange(rows) if rows <= most else np.linspace(0, rows - 1, most).astype(np.int64)
