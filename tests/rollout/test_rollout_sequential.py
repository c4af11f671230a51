"""The tests hold what they promise when they are looked at all the time, and find what is there."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from slmops.rollout import Arm, Paired, interval
from slmops.rollout.sequential import (
    BETS,
    log_e_above,
    log_e_below,
    log_e_not_worse,
    log_e_paired_not_worse,
    log_e_paired_worse,
    log_e_worse,
)

LIMIT = math.log(20)  # alpha = 0.05
Test = Callable[[Arm, Arm, float], float]


def stopped_at(
    test: Test, new: float, old: float, margin: float, *, rows: int, seed: int, every: int = 10
) -> int | None:
    """The row of each arm at which the evidence reaches the limit first."""
    rng = np.random.default_rng(seed)
    ones_new, ones_old = rng.random(rows) < new, rng.random(rows) < old
    totals = np.cumsum(ones_new), np.cumsum(ones_old)
    for count in range(every, rows + 1, every):
        arms = [Arm(count, float(total[count - 1])) for total in totals]
        if test(arms[0], arms[1], margin) >= LIMIT:
            return count
    return None


def share_stopped(test: Test, new: float, old: float, margin: float, *, rows: int, runs: int = 40) -> float:
    found = [stopped_at(test, new, old, margin, rows=rows, seed=seed) for seed in range(runs)]
    return sum(one is not None for one in found) / runs


def test_evidence_of_one_arm_is_the_mixture_of_bets_row_by_row() -> None:
    """Against the plain product over rows, for values that are 0 or 1."""
    values = [1, 1, 0, 1, 1, 1, 0, 1]
    for mean in (0.2, 0.5, 0.9):
        capital = [math.prod(1 - bet + bet * value / mean for value in values) for bet in BETS]
        assert log_e_above(Arm(8, 6.0), mean) == pytest.approx(math.log(sum(capital) / len(capital)))


def test_values_in_between_never_count_for_more_than_their_share_of_ones() -> None:
    values = [0.3, 0.9, 0.75, 0.6, 0.95]
    exact = [math.prod(1 - bet + bet * value / 0.5 for value in values) for bet in BETS]
    assert log_e_above(Arm(5, sum(values)), 0.5) <= math.log(sum(exact) / len(exact)) + 1e-12


def test_pairs_are_the_mixture_of_bets_row_by_row() -> None:
    differences = [1, 0, 0, -1, 1, 0]
    pairs = Paired()
    for difference in differences:
        pairs = pairs.add(difference)
    margin = 0.1
    better = [math.prod(1 + bet / (1 - margin) * (d + margin) for d in differences) for bet in BETS]
    worse = [math.prod(1 - bet / (1 + margin) * (d + margin) for d in differences) for bet in BETS]
    assert log_e_paired_not_worse(pairs, margin) == pytest.approx(math.log(sum(better) / len(better)))
    assert log_e_paired_worse(pairs, margin) == pytest.approx(math.log(sum(worse) / len(worse)))


def test_two_arms_are_at_most_the_evidence_at_any_mean() -> None:
    new, old = Arm(80, 60.0), Arm(120, 110.0)
    for mean in np.linspace(0.11, 0.99, 50):
        assert log_e_worse(new, old, 0.05) <= log_e_below(new, mean - 0.05) + log_e_above(old, mean) + 1e-9
        assert log_e_not_worse(new, old, 0.05) <= log_e_above(new, mean - 0.05) + log_e_below(old, mean) + 1e-9


@pytest.mark.parametrize(("test", "margin"), [(log_e_worse, 0.05), (log_e_not_worse, 0.05)])
def test_at_the_margin_peeking_is_wrong_at_most_so_often(test: Test, margin: float) -> None:
    """The hardest case that the hypothesis allows, looked at every 10 rows."""
    assert share_stopped(test, 0.9 - margin, 0.9, margin, rows=1500) <= 0.05


def test_peeking_at_pairs_is_wrong_at_most_so_often() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(300):
        drawn = rng.choice([1, 0, -1], p=[0.1, 0.75, 0.15], size=800)  # mean -0.05: at the margin
        won, lost = np.cumsum(drawn == 1), np.cumsum(drawn == -1)
        looks = [Paired(int(won[n]), int(n + 1 - won[n] - lost[n]), int(lost[n])) for n in range(0, 800, 8)]
        wrong += any(log_e_paired_worse(pairs, 0.05) >= LIMIT for pairs in looks)
        wrong += any(log_e_paired_not_worse(pairs, 0.05) >= LIMIT for pairs in looks)
    assert wrong / 600 <= 0.05


def test_what_is_there_is_found() -> None:
    assert share_stopped(log_e_worse, 0.7, 0.9, 0.05, rows=1000, runs=30) == 1.0
    assert share_stopped(log_e_not_worse, 0.9, 0.9, 0.05, rows=3000, runs=30) >= 0.9
    assert share_stopped(log_e_worse, 0.9, 1.0, 0.01, rows=400, runs=30) == 1.0  # one in ten fails


def test_a_confidence_sequence_holds_the_mean_at_all_times() -> None:
    missed = 0
    for seed in range(25):
        total = np.cumsum(np.random.default_rng(seed).random(600) < 0.8)
        bounds = [interval(Arm(n, float(total[n - 1])), 0.05) for n in range(20, 601, 20)]
        missed += any(not low <= 0.8 <= high for low, high in bounds)
    assert missed / 25 <= 0.05
    low, high = interval(Arm(600, 480.0), 0.05)
    assert high - low < 0.15


def test_nothing_seen_is_no_evidence() -> None:
    assert interval(Arm(), 0.05) == (0.0, 1.0)
    assert log_e_worse(Arm(), Arm(), 0.05) == log_e_not_worse(Arm(), Arm(), 0.05) == 0.0
    assert log_e_paired_worse(Paired(), 0.05) == log_e_paired_not_worse(Paired(), 0.05) == 0.0


@pytest.mark.parametrize("arm", [Arm(50, 50.0), Arm(50, 0.0)])
def test_all_right_and_all_wrong_are_finite(arm: Arm) -> None:
    low, high = interval(arm, 0.05)
    assert 0 <= low <= high <= 1
    for other in (Arm(50, 50.0), Arm(50, 0.0), Arm(1, 1.0)):
        assert math.isfinite(log_e_worse(arm, other, 0.01))
        assert not math.isnan(log_e_not_worse(arm, other, 0.01))
