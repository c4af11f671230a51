"""Do two samples come from one distribution: permutation tests, so that the share of false alarms is what it is set to.

Under the hypothesis that nothing changed, it does not matter which of the rows are called the reference and which the
window: each test's p-value is the share of random relabellings whose statistic is at least the observed one, that one
counted too. That is exact for every statistic and sample size, without a formula for its distribution (Fisher; Good,
"Permutation, Parametric and Bootstrap Tests of Hypotheses", 2005). Several tests are judged together by Holm (1979).

Guarantees: the same samples and seed give the same p-values; rows are the unit, so that what a row holds (its words)
may depend on each other. Not covered: rows that depend on each other, such as one caller's hundred repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

PERMUTATIONS = 1999
SEED = 20_261_126
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """How pooled rows are called window (the last ``window`` of them) or reference, as observed and permuted.

    ``shares``: float32 ``[1 + permutations, rows]``; 1/window for rows of the window, -1/reference for the others.
    """

    shares: F32
    window: int

    @classmethod
    @lru_cache(maxsize=2)  # most views of one check have as many rows
    def of(cls, reference: int, window: int, permutations: int = PERMUTATIONS, seed: int = SEED) -> Split:
        rows = reference + window
        order = np.random.default_rng(seed).random((permutations, rows)).argsort(axis=1)
        in_window = np.vstack([np.arange(rows)[None] >= reference, order < window])
        shares = np.where(in_window, np.float32(1 / window), np.float32(-1 / reference))
        return cls(shares.astype(np.float32), window)

    def p_value(self, statistics: F64) -> float:
        """``statistics``: ``[1 + permutations]``, the observed one first; larger is further apart."""
        tolerance = 1e-5 * abs(float(statistics[0]))  # sums in another order are the same statistic
        return float((statistics >= statistics[0] - tolerance).mean())


@dataclass(frozen=True)
class Test:
    """``statistic``: as observed, in its own unit; ``p_value``: alone, not yet judged with others."""

    statistic: float
    p_value: float

    __test__ = False  # pytest


def energy_test(reference: F32, window: F32, permutations: int = PERMUTATIONS, seed: int = SEED) -> Test:
    """Energy distance of two samples of vectors, ``[rows, dimensions]``: 2 E|X-Y| - E|X-X'| - E|Y-Y'|.

    Source: Székely and Rizzo, "Energy statistics: A class of statistics based on distances", 2013. It is the maximum
    mean discrepancy of the kernel -|x-y|, and needs no bandwidth to be chosen.
    """
    pooled = np.concatenate([reference, window]).astype(np.float32)
    distances = _distances(pooled)
    split = Split.of(len(reference), len(window), permutations, seed)
    statistics = -np.einsum("pn,pn->p", split.shares @ distances, split.shares, dtype=np.float64)
    return Test(float(statistics[0]), split.p_value(statistics))


def count_test(reference: F32, window: F32, permutations: int = PERMUTATIONS, seed: int = SEED) -> Test:
    """Pearson's chi-square of counts summed by class, ``[rows, classes]``; one-hot rows make it that of a label.

    ``statistic``: total variation of the two distributions, half the sum of differences, from 0 to 1.
    """
    pooled = np.concatenate([reference, window]).astype(np.float32)
    pooled = pooled[:, pooled.sum(axis=0) > 0]
    split = Split.of(len(reference), len(window), permutations, seed)
    inside = split.shares > 0
    of_window = (inside.astype(np.float32) @ pooled).astype(np.float64)
    total = pooled.sum(axis=0, dtype=np.float64)
    of_reference = total - of_window
    sums = of_window.sum(axis=1, keepdims=True), of_reference.sum(axis=1, keepdims=True)
    shares = total / total.sum() if len(total) else total
    statistics = np.zeros(len(split.shares))
    for counts, size in zip((of_window, of_reference), sums, strict=True):
        expected = np.maximum(size * shares, 1e-12)
        statistics += ((counts - expected) ** 2 / expected).sum(axis=1)
    apart = 0.5 * np.abs(of_window[0] / max(sums[0][0, 0], 1) - of_reference[0] / max(sums[1][0, 0], 1)).sum()
    return Test(float(apart), split.p_value(statistics))


def mean_test(
    reference: F32, window: F32, permutations: int = PERMUTATIONS, seed: int = SEED, *, upward: bool = False
) -> Test:
    """Difference of the means of numbers ``[rows]``; ``upward``: only a larger window counts. Where a few rows are far
    off and the others as before, it sees more than Kolmogorov-Smirnov does."""
    pooled = np.concatenate([reference, window]).astype(np.float32)
    split = Split.of(len(reference), len(window), permutations, seed)
    differences = (split.shares @ (pooled - pooled.mean())).astype(np.float64)
    return Test(float(differences[0]), split.p_value(differences if upward else np.abs(differences)))


def ks_test(reference: F32, window: F32, permutations: int = PERMUTATIONS, seed: int = SEED) -> Test:
    """Kolmogorov-Smirnov: the largest difference of two distribution functions of numbers ``[rows]``; ties are one."""
    pooled = np.concatenate([reference, window])
    order = np.argsort(pooled, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(pooled[order]) > 0), len(pooled) - 1)
    split = Split.of(len(reference), len(window), permutations, seed)
    statistics = np.abs(split.shares[:, order].cumsum(axis=1, dtype=np.float64)[:, ends]).max(axis=1)
    return Test(float(statistics[0]), split.p_value(statistics))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: rejecting those up to alpha keeps the chance of any false alarm at alpha, whatever depends on
    whatever. Source: S. Holm, "A simple sequentially rejective multiple test procedure", 1979."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: (p_values[name], name))):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _distances(vectors: F32) -> F32:
    """Euclidean distances, ``[rows, rows]``."""
    squares = np.einsum("nd,nd->n", vectors, vectors)
    squared = squares[:, None] + squares[None] - 2 * vectors @ vectors.T
    found: F32 = np.sqrt(np.maximum(squared, 0))
    np.fill_diagonal(found, 0)
    return found
