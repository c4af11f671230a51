"""Tests that may be looked at after every answer, and stopped at any.

Each function gives the logarithm of an e-value: a number whose expectation is at most 1 while the hypothesis holds,
however often it is looked at. So the chance that it ever reaches ``1 / alpha`` is at most ``alpha`` (Ville's
inequality), without a number of rows that is fixed beforehand.

Values are in [0, 1], higher is better. An arm is told by its number of rows and their sum alone: for values between 0
and 1 the logarithm is concave, so counting a value as that share of a 1 can only lower the evidence (the sub-Bernoulli
bound of Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences",
arXiv:1810.08240). Bets are a mixture over :data:`BETS` (Robbins 1970; Waudby-Smith and Ramdas, "Estimating means of
bounded random variables by betting", arXiv:2010.09686). Two arms with means that nobody knows are compared through the
least product of evidence over all means that the hypothesis allows.

Guarantees hold where rows of an arm have one mean given what came before, and where the arms are drawn by chance. Not
covered: one person's many answers, which count as if they were many people's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BETS = np.array([0.004, 0.012, 0.03, 0.08, 0.2, 0.4, 0.65, 0.9, 0.999])
"""Shares of what has been won so far that are bet on the next row; each gets the same start."""
GRID = 96
"""Parts that the range of means is looked at in."""
_ENDS = np.sin(np.pi * np.arange(GRID + 1) / (2 * GRID)) ** 2  # finer towards 0 and 1, where shares of failures lie
_LOW, _HIGH = _ENDS[:-1], _ENDS[1:]


@dataclass(frozen=True)
class Arm:
    """``rows`` values in [0, 1] and their sum."""

    rows: int = 0
    total: float = 0.0

    def add(self, value: float) -> Arm:
        return Arm(self.rows + 1, self.total + value)

    @property
    def mean(self) -> float:
        """NaN where there are no rows."""
        return self.total / self.rows if self.rows else math.nan

    @property
    def mirrored(self) -> Arm:
        """The same values seen from 1."""
        return Arm(self.rows, self.rows - self.total)


@dataclass(frozen=True)
class Paired:
    """Two versions on the same rows: how often the new one was better, the same, worse."""

    better: int = 0
    same: int = 0
    worse: int = 0

    def add(self, difference: int) -> Paired:
        """``difference``: 1, 0 or -1."""
        return Paired(self.better + (difference > 0), self.same + (difference == 0), self.worse + (difference < 0))

    @property
    def rows(self) -> int:
        return self.better + self.same + self.worse

    @property
    def mean(self) -> float:
        """Of the difference; NaN where there are no rows."""
        return (self.better - self.worse) / self.rows if self.rows else math.nan


def log_e_above(arm: Arm, mean: float) -> float:
    """Evidence against "the arm's mean is at most ``mean``"."""
    return float(_above(arm, np.array([mean]))[0])


def log_e_below(arm: Arm, mean: float) -> float:
    """Evidence against "the arm's mean is at least ``mean``"."""
    return log_e_above(arm.mirrored, 1 - mean)


def log_e_worse(new: Arm, old: Arm, margin: float) -> float:
    """Evidence against "the new mean is at least the old one less ``margin``": that the new one is worse."""
    # Both factors are monotone in the unknown mean, so the ends of each part bound them in all of it.
    of_new = np.where(margin < _LOW, _above(new.mirrored, 1 - _LOW + margin), 0.0)
    return float((of_new + _above(old, _HIGH)).min())


def log_e_not_worse(new: Arm, old: Arm, margin: float) -> float:
    """Evidence against "the new mean is at most the old one less ``margin``": that it is no worse than that."""
    possible = margin < _HIGH
    of_new, of_old = _above(new, _HIGH[possible] - margin), _above(old.mirrored, 1 - _LOW[possible])
    return float((of_new + of_old).min())


def log_e_paired_worse(pairs: Paired, margin: float) -> float:
    """As :func:`log_e_worse`, for the mean difference of pairs."""
    return _paired(pairs.worse, pairs.same, pairs.better, -margin)


def log_e_paired_not_worse(pairs: Paired, margin: float) -> float:
    """As :func:`log_e_not_worse`, for the mean difference of pairs."""
    return _paired(pairs.better, pairs.same, pairs.worse, margin)


def interval(arm: Arm, alpha: float) -> tuple[float, float]:
    """A confidence sequence: at all times together, the arm's mean is in it with probability 1 - ``alpha``."""
    if not arm.rows:
        return 0.0, 1.0
    limit = math.log(2 / alpha)
    low = _last(lambda mean: log_e_above(arm, mean) >= limit, arm.mean)
    high = 1 - _last(lambda mean: log_e_above(arm.mirrored, mean) >= limit, 1 - arm.mean)
    return low, high


def _above(arm: Arm, means: Floats) -> Floats:
    """:func:`log_e_above` for each of ``means`` ``[means]``."""
    bounds = np.clip(means, 1e-300, 1.0)[:, None]
    terms = arm.total * np.log1p(BETS * (1 / bounds - 1)) + (arm.rows - arm.total) * np.log1p(-BETS)
    return _mixed(terms)


def _paired(won: int, same: int, lost: int, shift: float) -> float:
    """Bets that the mean of (1, 0, -1) lies above ``-shift``; each is a share of the most that leaves something."""
    bets = BETS / (1 - shift)
    terms = won * np.log1p(bets * (1 + shift)) + same * np.log1p(bets * shift) + lost * np.log1p(bets * (shift - 1))
    return float(_mixed(terms[None])[0])


def _mixed(logarithms: Floats) -> Floats:
    """Logarithms of the means of what these, ``[..., bets]``, are logarithms of."""
    largest = logarithms.max(axis=-1)
    mixed: Floats = largest + np.log(np.exp(logarithms - largest[..., None]).mean(axis=-1))
    return mixed


def _last(rejected: Callable[[float], bool], most: float) -> float:
    """The end of the means from 0 on that are rejected; ``most`` is not."""
    low, high = 0.0, most
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low
