"""The slope of memory, its interval against a plain reference, and how often it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from slmops.evaluate.trend import trend


def reference(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Slope and standard error by the matrices of the paper, one term after the other."""
    design = np.column_stack([np.ones_like(x), x])
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ design.T @ y
    residuals = y - design @ beta
    lag = int(np.ceil(1.5 * len(x) ** (1 / 3)))
    meat = np.zeros((2, 2))
    for i in range(len(x)):
        for j in range(len(x)):
            weight = 1 - abs(i - j) / (lag + 1)
            if weight > 0:
                meat += weight * residuals[i] * residuals[j] * np.outer(design[i], design[j])
    covariance = inverse @ meat @ inverse * len(x) / (len(x) - 2)
    return float(beta[1]), float(np.sqrt(covariance[1, 1]))


def walk(random: np.random.Generator, count: int, hang: float) -> np.ndarray:
    """Noise of which each value keeps a share of the one before."""
    noise = random.normal(size=count)
    for at in range(1, count):
        noise[at] += hang * noise[at - 1]
    return noise


def test_slope_and_interval_are_the_papers() -> None:
    random = np.random.default_rng(0)
    x = np.cumsum(random.uniform(0.5, 1.5, 60))
    y = 3 * x + walk(random, 60, 0.5)
    slope, error = reference(x, y)
    found = trend(x, y)
    assert found.slope == pytest.approx(slope)
    assert found.ci95[1] - found.slope == pytest.approx(1.959964 * error)
    assert found.values == 60


def test_a_leak_is_seen_and_noise_that_hangs_together_seldom_taken_for_one() -> None:
    random = np.random.default_rng(1)
    x = np.arange(400.0)
    alarms = sum(trend(x, walk(random, 400, 0.6)).rises for _ in range(200))
    assert alarms <= 16  # 2.5 % are meant, and the interval is a little short for such noise
    assert all(trend(x, 0.05 * x + walk(random, 400, 0.6)).rises for _ in range(20))


def test_a_flat_line_does_not_rise() -> None:
    found = trend(range(30), [5.0] * 30)
    assert (found.slope, found.ci95, found.rises) == (0.0, (0.0, 0.0), False)


def test_too_few_values_are_refused() -> None:
    for x, y in ((range(5), range(5)), ([1] * 30, range(30)), (range(30), range(29))):
        with pytest.raises(ValueError, match="a trend needs"):
            trend(x, y)
