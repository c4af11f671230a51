"""Intervals and tests against scipy and plain loops."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slmops.evaluate import significance
from slmops.evaluate.significance import bootstrap_interval, compare, holm, mcnemar, paired_bootstrap

RANDOM = np.random.default_rng(5)
SKEWED = RANDOM.exponential(size=180)
RIGHT = (RANDOM.random(400) < 0.83).astype(float)


def plain_interval(values: np.ndarray, resamples: int = 4000) -> tuple[float, float]:
    """The bootstrap as a loop, with random numbers of its own."""
    random = np.random.default_rng(99)
    means = sorted(random.choice(values, len(values)).mean() for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


@pytest.mark.parametrize("values", [SKEWED, RIGHT, np.round(SKEWED)])
def test_the_interval_is_the_plain_loops(values: np.ndarray) -> None:
    error = values.std() / math.sqrt(len(values))
    np.testing.assert_allclose(bootstrap_interval(values, seed=1), plain_interval(values), atol=0.2 * error)


def test_the_interval_is_scipys() -> None:
    reference = stats.bootstrap((SKEWED,), np.mean, method="percentile", n_resamples=4000, rng=3).confidence_interval
    error = SKEWED.std() / math.sqrt(len(SKEWED))
    np.testing.assert_allclose(bootstrap_interval(SKEWED, seed=1), reference, atol=0.2 * error)


def test_a_lower_confidence_is_narrower_and_a_seed_repeats() -> None:
    wide, narrow = bootstrap_interval(SKEWED, 0, 0.99), bootstrap_interval(SKEWED, 0, 0.8)
    assert wide[0] < narrow[0] < SKEWED.mean() < narrow[1] < wide[1]
    assert bootstrap_interval(SKEWED, 0) == bootstrap_interval(SKEWED, 0)
    assert bootstrap_interval(SKEWED, 0) != bootstrap_interval(SKEWED, 1)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(8)
    covered = 0
    for trial in range(200):
        low, high = bootstrap_interval(random.random(150) < 0.9, seed=trial)
        covered += low <= 0.9 <= high
    assert 0.89 <= covered / 200 <= 0.985


@pytest.mark.parametrize("values", [[0.3], [1.0], [0.1] * 7, [1.0] * 1000])
def test_values_that_do_not_vary_give_a_point(values: list[float]) -> None:
    assert bootstrap_interval(values, seed=0) == (values[0], values[0])


@pytest.mark.parametrize("values", [[], [[1.0]], [math.nan], [1.0, math.inf]])
def test_values_that_cannot_be_used_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"one value a row|finite"):
        bootstrap_interval(values, seed=0)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=90), seed=st.integers(0, 2**32))
def test_the_interval_is_ordered_and_within_the_values(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, seed, resamples=200)
    assert min(values) <= low <= high <= max(values)


def test_many_rows_stay_in_bounded_memory() -> None:
    values = np.random.default_rng(0).random(300_000)
    tracemalloc.start()
    bootstrap_interval(values, seed=0, resamples=60)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 8 * significance.CHUNK_VALUES  # all at once would be 6 times that


def paired_rows(a_only: int, b_only: int, both: int = 5, neither: int = 3) -> tuple[list[int], list[int]]:
    a = [1] * a_only + [0] * b_only + [1] * both + [0] * neither
    b = [0] * a_only + [1] * b_only + [1] * both + [0] * neither
    return a, b


@pytest.mark.parametrize(("a_only", "b_only"), [(0, 1), (1, 9), (5, 5), (12, 30), (0, 20)])
def test_few_differing_rows_take_the_exact_binomial(a_only: int, b_only: int) -> None:
    found = mcnemar(*paired_rows(a_only, b_only))
    n, low = a_only + b_only, min(a_only, b_only)
    by_hand = min(1.0, 2 * sum(math.comb(n, k) for k in range(low + 1)) / 2**n)
    assert found.p_value == pytest.approx(by_hand, rel=1e-9)
    assert (found.a_only, found.b_only, found.rows) == (a_only, b_only, n + 8)
    assert found.difference == pytest.approx((b_only - a_only) / (n + 8))
    assert found.ci95[0] <= found.difference <= found.ci95[1]


def test_many_differing_rows_take_chi_squared() -> None:
    found = mcnemar(*paired_rows(560, 640))
    assert found.statistic == pytest.approx((80 - 1) ** 2 / 1200)
    assert found.p_value == pytest.approx(stats.chi2.sf(found.statistic, 1))
    assert found.p_value == pytest.approx(stats.binomtest(560, 1200).pvalue, abs=0.002)
    assert found.significant


def test_two_models_that_answer_alike_do_not_differ() -> None:
    found = mcnemar([1, 0, 1], [1, 0, 1])
    assert (found.p_value, found.statistic, found.difference, found.ci95) == (1.0, 0.0, 0.0, (0.0, 0.0))
    assert not found.significant


def test_mcnemar_takes_right_or_wrong_alone() -> None:
    with pytest.raises(ValueError, match="right"):
        mcnemar([0.5], [1.0])


def test_the_paired_bootstrap_agrees_with_the_t_test_and_a_permutation_test() -> None:
    random = np.random.default_rng(2)
    a = random.random(250)
    for shift in (0.0, 0.01, 0.02, 0.06):
        b = np.clip(a + random.normal(shift, 0.15, 250), 0, 1)
        found = paired_bootstrap(a, b, resamples=20_000)
        assert found.p_value == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
        assert found.statistic == pytest.approx(stats.ttest_rel(b, a).statistic)
        flips = random.choice([-1, 1], size=(5000, 250))
        permuted = np.abs((flips * (b - a)).mean(axis=1)) >= abs((b - a).mean())
        assert found.p_value == pytest.approx(permuted.mean(), abs=0.03)


def test_the_sign_says_which_one_is_better() -> None:
    a, b = np.linspace(0, 0.5, 60), np.linspace(0.1, 0.7, 60)
    up, down = paired_bootstrap(a, b), paired_bootstrap(b, a)
    assert up.difference == pytest.approx(0.15)
    assert down.difference == pytest.approx(-0.15)
    assert (up.b_only, up.a_only, down.a_only) == (60, 0, 60)
    assert 0 < up.ci95[0] < up.difference < up.ci95[1]
    assert up.p_value == pytest.approx(1 / 2001)


@pytest.mark.parametrize(("rows", "p_value"), [(1, 1.0), (2, 0.5), (11, 2**-10)])
def test_the_same_difference_in_every_row_is_judged_by_its_sign(rows: int, p_value: float) -> None:
    assert paired_bootstrap([0.25] * rows, [0.5] * rows).p_value == p_value
    assert paired_bootstrap([0.25] * rows, [0.25] * rows).p_value == 1.0


def test_compare_chooses_by_the_values() -> None:
    assert compare([1, 0, 1.0], [True, True, False]).method == "mcnemar"
    assert compare([0.5, 0], [1, 0]).method == "paired_bootstrap"
    with pytest.raises(ValueError, match="same rows: 1 and 2"):
        compare([1], [1, 0])
    with pytest.raises(ValueError, match="one value a row"):
        compare([], [])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_swapping_the_models_swaps_the_test(pairs: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    there, back = compare(a, b), compare(b, a)
    assert there.p_value == back.p_value
    assert there.difference == -back.difference
    assert (there.a_only, there.b_only) == (back.b_only, back.a_only)
    assert 0 <= there.p_value <= 1


def test_holm_is_step_down() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_test_is_plain_json() -> None:
    raw = mcnemar([1, 0], [1, 1]).to_json()
    assert raw["ci95"] == list(raw["ci95"])
    assert raw["significant"] is False
