"""The tests of two samples, against scipy and plain loops; false alarms are what they are set to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from slmops.monitor.permutation import Split, count_test, energy_test, holm, ks_test, mean_test

RANDOM = np.random.default_rng(5)
A, B = RANDOM.normal(size=(60, 4)).astype(np.float32), RANDOM.normal(0.4, size=(45, 4)).astype(np.float32)


def permuted(statistic: object, a: np.ndarray, b: np.ndarray) -> float:
    return float(
        stats.permutation_test(
            (a, b), statistic, permutation_type="independent", n_resamples=1999, alternative="greater", rng=1
        ).pvalue
    )


def test_energy_distance_is_the_formula() -> None:
    found = energy_test(A, B)
    expected = 2 * cdist(A, B).mean() - cdist(A, A).mean() - cdist(B, B).mean()
    assert found.statistic == pytest.approx(expected, rel=1e-4)
    one = energy_test(A[:, :1], B[:, :1])
    assert one.statistic == pytest.approx(stats.energy_distance(A[:, 0], B[:, 0]) ** 2, rel=1e-3)
    assert one.p_value == pytest.approx(permuted(stats.energy_distance, A[:, 0], B[:, 0]), abs=0.02)


def test_kolmogorov_smirnov_is_scipys_with_ties_too() -> None:
    for a, b in ((A[:, 0], B[:, 0]), (A[:, 0].round(), B[:, 0].round())):
        found = ks_test(a, b)
        expected = stats.ks_2samp(a, b)
        assert found.statistic == pytest.approx(expected.statistic, abs=1e-5)
    assert ks_test(A[:, 0], B[:, 0]).p_value == pytest.approx(stats.ks_2samp(A[:, 0], B[:, 0]).pvalue, abs=0.02)


def test_counts_are_pearsons_chi_square() -> None:
    classes = RANDOM.integers(0, 3, 80), RANDOM.choice(3, 70, p=[0.5, 0.3, 0.2])
    a, b = (np.eye(4, dtype=np.float32)[part] for part in classes)
    table = np.stack([a.sum(axis=0), b.sum(axis=0)])[:, :3]
    found = count_test(a, b)
    assert found.p_value == pytest.approx(stats.chi2_contingency(table, correction=False).pvalue, abs=0.03)
    assert found.statistic == pytest.approx(0.5 * np.abs(table[0] / 80 - table[1] / 70).sum(), abs=1e-6)


def test_means_by_welch_and_one_sided() -> None:
    a, b = A[:, 1], B[:, 1]
    assert mean_test(a, b).statistic == pytest.approx(b.mean() - a.mean(), abs=1e-5)
    assert mean_test(a, b).p_value == pytest.approx(stats.ttest_ind(a, b).pvalue, abs=0.02)
    assert mean_test(a, b, upward=True).p_value < mean_test(b, a, upward=True).p_value


def test_the_observed_labelling_is_the_first_and_counts() -> None:
    split = Split.of(3, 2, 50, 1)
    assert split.shares.shape == (51, 5)
    assert split.shares[0].tolist() == pytest.approx([-1 / 3] * 3 + [1 / 2] * 2)
    assert np.allclose(split.shares.sum(axis=1), 0, atol=1e-6)
    assert split.p_value(np.zeros(51)) == 1.0
    assert split.p_value(np.array([1.0] + [0.0] * 50)) == pytest.approx(1 / 51)
    assert not np.allclose(split.shares, Split.of(3, 2, 50, 2).shares)


def test_equal_samples_are_never_different() -> None:
    same = np.ones((50, 3), dtype=np.float32)
    for test in (energy_test, count_test):
        assert test(same, same).p_value == 1.0
    assert ks_test(same[:, 0], same[:, 0]).p_value == mean_test(same[:, 0], same[:, 0]).p_value == 1.0


def test_false_alarms_are_what_they_are_set_to() -> None:
    chance = np.random.default_rng(9)

    def p_value(test: Any, seed: int) -> float:
        a, b = (chance.exponential(size=(rows, 2)).astype(np.float32) for rows in (40, 30))
        return test(a, b, 99, seed).p_value

    p_values = np.array([[p_value(test, seed) for seed in range(200)] for test in (energy_test, count_test)])
    # 200 draws at 0.1: 20 expected, 36 is beyond any luck worth considering.
    assert ((p_values <= 0.1).sum(axis=1) <= 36).all()
    assert ((p_values <= 0.1).sum(axis=1) >= 6).all()


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
