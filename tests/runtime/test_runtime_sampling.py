"""One token out of a distribution, against the plain way: sort all, cut, choose."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from slmops.runtime.sampling import LIKELIEST, draw, log_softmax, nucleus


def plain_nucleus(logprobs: NDArray[np.float64], top_p: float) -> list[int]:
    order = np.argsort(-logprobs, kind="stable")
    mass = np.cumsum(np.exp(logprobs[order]))
    return [int(one) for one in order[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]]


@pytest.mark.parametrize("size", [5, LIKELIEST + 1, 20_000])
@pytest.mark.parametrize("width", [0.01, 3.0])
def test_the_likeliest_are_those_of_a_whole_sort(size: int, width: float) -> None:
    logprobs = log_softmax(np.random.default_rng(0).normal(size=size) * width).astype(np.float64)
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        assert sorted(nucleus(logprobs, top_p)) == sorted(plain_nucleus(logprobs, top_p))
    assert sorted(nucleus(logprobs, 1.0)) == list(range(size))


def test_draws_follow_the_distribution() -> None:
    logprobs = log_softmax(np.log(np.array([0.5, 0.3, 0.15, 0.05])))
    random = np.random.default_rng(0)
    drawn = [draw(logprobs, 1.0, 0.9, random) for _ in range(4000)]
    shares = np.bincount(drawn, minlength=4) / 4000
    assert shares == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.03)
    cold = [draw(logprobs, 0.5, 1.0, random) for _ in range(4000)]
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    assert np.bincount(cold, minlength=4) / 4000 == pytest.approx(squared / squared.sum(), abs=0.03)
    assert draw(logprobs, 1.0, 1.0, np.random.default_rng(5)) == draw(logprobs, 1.0, 1.0, np.random.default_rng(5))
