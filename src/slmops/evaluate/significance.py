"""Is a difference real: intervals and paired tests over per-row values.

Guarantees: the same seed gives the same numbers; memory stays near :data:`CHUNK_VALUES` values whatever the rows.
Not covered: a bootstrap knows only the rows it has. With one row, or rows that are all equal, its interval is a single
point, which says that the sample is silent about the spread, not that there is none. Rows are taken as independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
SIGNIFICANCE = 0.05
EXACT_BELOW = 1000  # discordant rows from which McNemar's chi-squared approximation is as good as the exact test
CHUNK_VALUES = 4_000_000

Values = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTest:
    """Two models on the same rows.

    ``difference``  mean of b less mean of a: above 0, b is better
    ``ci95``        bootstrap interval of the difference
    ``p_value``     two-sided, of no difference
    ``statistic``   McNemar: chi-squared with continuity correction; bootstrap: difference / its standard error
    ``a_only``      rows that only a has right (McNemar), or where a is above b
    ``b_only``      the other way round
    """

    method: str
    difference: float
    ci95: tuple[float, float]
    p_value: float
    statistic: float
    a_only: int
    b_only: int
    rows: int

    @property
    def significant(self) -> bool:
        """Whether the difference is beyond noise at :data:`SIGNIFICANCE`."""
        return self.p_value < SIGNIFICANCE

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "difference": self.difference,
            "ci95": list(self.ci95),
            "p_value": self.p_value,
            "statistic": self.statistic,
            "a_only": self.a_only,
            "b_only": self.b_only,
            "rows": self.rows,
            "significant": self.significant,
        }


def bootstrap_interval(
    values: ArrayLike, seed: int, confidence: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile interval of the mean of ``values`` ``[rows]`` (Efron 1979).

    Raises:
        ValueError: no values, or values that are not finite.
    """
    means = _resampled_means(_finite(values), seed, resamples)
    tail = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _resampled_means(values: Values, seed: int, resamples: int) -> Values:
    """Means of ``resamples`` samples with replacement, ``[resamples]``.

    Values that repeat a lot (right or wrong) are drawn as counts: a multinomial over the distinct values is the same
    distribution as drawing rows, at a cost that does not grow with the rows.
    """
    generator = np.random.default_rng(seed)
    distinct, counts = np.unique(values, return_counts=True)
    rows = len(values)
    # The mean of equal numbers can differ from them in the last bit; an interval should hold its own value.
    clipped = (float(distinct[0]), float(distinct[-1]))
    if len(distinct) <= 64:
        drawn = generator.multinomial(rows, counts / rows, size=resamples)
        return np.clip(drawn @ distinct / rows, *clipped)
    means = np.empty(resamples)
    step = max(1, CHUNK_VALUES // rows)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = values[generator.integers(0, rows, size=(size, rows))].mean(axis=1)
    return np.clip(means, *clipped)


def mcnemar(a_correct: ArrayLike, b_correct: ArrayLike, *, seed: int = 0) -> PairedTest:
    """McNemar's test on rows right or wrong (McNemar 1947): exact binomial below :data:`EXACT_BELOW` rows on which the
    two differ, chi-squared with continuity correction (Edwards 1948) from there.

    Raises:
        ValueError: unequal lengths, no rows, or values other than 0 and 1.
    """
    a, b = _paired(a_correct, b_correct)
    if not (_binary(a) and _binary(b)):
        raise ValueError("McNemar's test takes rows that are right (1) or wrong (0)")
    from scipy.stats import binomtest, chi2

    a_only, b_only = int(np.sum(a > b)), int(np.sum(b > a))
    differing = a_only + b_only
    statistic = max(0, abs(a_only - b_only) - 1) ** 2 / differing if differing else 0.0
    if differing < EXACT_BELOW:
        p_value = float(binomtest(min(a_only, b_only), differing).pvalue) if differing else 1.0
    else:
        p_value = float(chi2.sf(statistic, 1))
    return PairedTest(
        method="mcnemar",
        difference=float(np.mean(b) - np.mean(a)),
        ci95=bootstrap_interval(b - a, seed),
        p_value=p_value,
        statistic=float(statistic),
        a_only=a_only,
        b_only=b_only,
        rows=len(a),
    )


def paired_bootstrap(a: ArrayLike, b: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> PairedTest:
    """Paired bootstrap on per-row scores (Koehn 2004). The p-value counts resampled differences, centred on 0, that are
    at least as far from 0 as the observed one; the smallest that it can give is ``1 / (resamples + 1)``.

    Raises:
        ValueError: unequal lengths, no rows, or values that are not finite.
    """
    a, b = _paired(a, b)
    differences = b - a
    observed = float(differences.mean())
    means = _resampled_means(differences, seed, resamples)
    low, high = np.percentile(means, [2.5, 97.5])
    # A hair of tolerance: a resample that equals the observed difference must count whatever the rounding.
    extreme = int(np.sum(np.abs(means - observed) >= abs(observed) * (1 - 1e-9)))
    error = float(differences.std(ddof=1) / np.sqrt(len(a))) if len(a) > 1 else 0.0
    constant = bool(np.all(differences == differences[0]))
    return PairedTest(
        method="paired_bootstrap",
        difference=observed,
        ci95=(float(low), float(high)),
        # Rows that all differ by the same amount leave the bootstrap nothing to draw from: a sign test answers.
        p_value=min(1.0, 2.0 ** (1 - len(a))) if constant and observed else (extreme + 1) / (resamples + 1),
        statistic=observed / error if error and not constant else 0.0,
        a_only=int(np.sum(differences < 0)),
        b_only=int(np.sum(differences > 0)),
        rows=len(a),
    )


def compare(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> PairedTest:
    """How far ``b`` is above ``a`` on the same rows: McNemar for rows right or wrong, else the bootstrap."""
    first, second = _paired(a, b)
    if _binary(first) and _binary(second):
        return mcnemar(first, second, seed=seed)
    return paired_bootstrap(first, second, seed=seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for having made so many comparisons (Holm 1979), in the order given."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _binary(values: Values) -> bool:
    return bool(np.all((values == 0) | (values == 1)))


def _paired(a: ArrayLike, b: ArrayLike) -> tuple[Values, Values]:
    first, second = _finite(a), _finite(b)
    if len(first) != len(second):
        raise ValueError(f"a paired test needs the same rows: {len(first)} and {len(second)} were given")
    return first, second


def _finite(values: ArrayLike) -> Values:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"one value a row is needed, not an array of shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError("values must be finite")
    return array
