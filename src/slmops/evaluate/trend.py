"""Whether a series rises: the slope of a line, with an interval that holds for values that hang together.

Memory of a process is such a series: what is held now was mostly held a moment ago. The error of an ordinary slope
would be far too small there; these are those of Newey and West (1987), "A Simple, Positive Semi-definite,
Heteroskedasticity and Autocorrelation Consistent Covariance Matrix", with Bartlett's weights over a lag that grows with
the cube root of the number of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

NORMAL_95 = 1.959964
FEWEST = 20


@dataclass(frozen=True)
class Trend:
    """
    ``slope``   of y for one of x
    ``ci95``    its interval
    ``values``  how many were used
    """

    slope: float
    ci95: tuple[float, float]
    values: int

    @property
    def rises(self) -> bool:
        """The interval is above zero."""
        return self.ci95[0] > 0


def trend(x: ArrayLike, y: ArrayLike) -> Trend:
    """Slope of ``y`` over ``x``, both ``[values]``, in the order of time.

    Raises:
        ValueError: fewer than :data:`FEWEST` values, or all at one x.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if xs.shape != ys.shape or xs.ndim != 1 or len(xs) < FEWEST or np.ptp(xs) == 0:
        raise ValueError(f"a trend needs {FEWEST} values at different places, not {xs.shape} and {ys.shape}")
    centred = xs - xs.mean()
    spread = float(centred @ centred)
    slope = float(centred @ (ys - ys.mean())) / spread
    scores = centred * (ys - ys.mean() - slope * centred)
    variance = _long_run(scores, _lag(len(xs))) / spread**2 * len(xs) / (len(xs) - 2)
    margin = NORMAL_95 * float(np.sqrt(max(variance, 0.0)))
    return Trend(slope, (slope - margin, slope + margin), len(xs))


def _lag(values: int) -> int:
    return int(np.ceil(1.5 * values ** (1 / 3)))


def _long_run(scores: np.ndarray, lag: int) -> float:
    """Sum over all pairs of scores no further apart than ``lag``, weighted down with their distance."""
    total = float(scores @ scores)
    for distance in range(1, min(lag, len(scores) - 1) + 1):
        total += 2 * (1 - distance / (lag + 1)) * float(scores[distance:] @ scores[:-distance])
    return total
