from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.data.split import TEST, TRAIN, VALIDATION, divide, draw, order_keys, quota

SHARES = {TEST: 0.1, VALIDATION: 0.1}


def keys_of(rows: int, seed: int = 0) -> np.ndarray:
    return order_keys(np.arange(rows, dtype=np.uint64) * np.uint64(7919), seed)


def alone(rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.int64)


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    test=st.floats(0.01, 0.45),
    validation=st.floats(0.01, 0.44),
    seed=st.integers(0, 2**40),
    small=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_disjoint_complete_and_stratified(
    counts: list[int], test: float, validation: float, seed: int, small: bool
) -> None:
    strata = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    rows = len(strata)
    splits = divide(keys_of(rows, seed), strata, alone(rows), {TEST: test, VALIDATION: validation}, small_get_one=small)
    assert splits.shape == (rows,)
    assert set(splits.tolist()) <= {TRAIN, VALIDATION, TEST}
    for stratum, count in enumerate(counts):
        within = splits[strata == stratum]
        if count >= 10:
            assert (within == TEST).sum() == math.floor(test * count + 0.5)
            assert (within == VALIDATION).sum() == min(
                math.floor(validation * count + 0.5), count - math.floor(test * count + 0.5)
            )
        elif small and count >= 3 and test + validation < 0.5:
            assert {TRAIN, VALIDATION, TEST} == set(within.tolist())
        elif count < 3 and max(test, validation) < 0.25:
            assert set(within.tolist()) == {TRAIN}


@given(
    clusters=st.lists(st.integers(0, 25), min_size=30, max_size=200),
    labels=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_clusters_never_straddle_and_shares_are_never_exceeded(clusters: list[int], labels: int, seed: int) -> None:
    numbers = np.array(clusters, dtype=np.int64)
    strata = np.arange(len(numbers), dtype=np.int64) % labels
    splits = divide(keys_of(len(numbers), seed), strata, numbers, SHARES, small_get_one=False)
    for number in set(clusters):
        assert len(set(splits[numbers == number].tolist())) == 1
    for stratum in range(labels):
        within = splits[strata == stratum]
        assert (within == TEST).sum() <= quota(len(within), 0.1, small_get_one=False)
        assert (within == VALIDATION).sum() <= quota(len(within), 0.1, small_get_one=False)


def test_a_few_pairs_among_many_single_rows_leave_the_shares_exact() -> None:
    numbers = alone(400)
    numbers[1:40:2] = numbers[0:40:2]
    strata = np.arange(400, dtype=np.int64) // 100
    splits = divide(keys_of(400), strata, numbers, SHARES, small_get_one=True)
    for stratum in range(4):
        assert np.bincount(splits[strata == stratum], minlength=3).tolist() == [80, 10, 10]


def test_the_seed_decides() -> None:
    strata = np.zeros(200, dtype=np.int64)
    one, again, other = (
        divide(keys_of(200, seed), strata, alone(200), SHARES, small_get_one=False) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_added_rows_move_few_others() -> None:
    keys = keys_of(1100)
    strata = np.zeros(1100, dtype=np.int64)
    before = divide(keys[:1000], strata[:1000], alone(1000), SHARES, small_get_one=False)
    after = divide(keys, strata, alone(1100), SHARES, small_get_one=False)
    assert (before != after[:1000]).mean() < 0.05


def test_order_of_rows_does_not_matter() -> None:
    keys = keys_of(300)
    strata = np.arange(300, dtype=np.int64) % 3
    shuffled = np.random.default_rng(0).permutation(300)
    splits = divide(keys, strata, alone(300), SHARES, small_get_one=True)
    other = divide(keys[shuffled], strata[shuffled], alone(300), SHARES, small_get_one=True)
    assert np.array_equal(splits[shuffled], other)


def test_an_inner_grouping_keeps_its_shares_too() -> None:
    strata = np.repeat([0, 1], 500).astype(np.int64)
    inner = (np.arange(1000) % 5 == 0).astype(np.int64)
    splits = divide(keys_of(1000), strata, alone(1000), SHARES, small_get_one=False, inner=inner)
    for stratum in (0, 1):
        for split in (TEST, VALIDATION):
            chosen = (strata == stratum) & (splits == split)
            assert chosen.sum() == 50
            assert abs(int(inner[chosen].sum()) - 10) <= 1


@given(counts=st.lists(st.integers(1, 80), min_size=1, max_size=12), limit=st.integers(1, 400))
@settings(max_examples=150, deadline=None)
def test_a_subset_is_drawn_evenly(counts: list[int], limit: int) -> None:
    strata = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    kept = draw(keys_of(len(strata)), strata, limit)
    assert kept.sum() == min(limit, len(strata))
    for stratum, count in enumerate(counts):
        taken = int(kept[strata == stratum].sum())
        if limit >= len(counts):
            assert taken >= 1
        if limit >= len(strata):
            assert taken == count
    if min(counts) * limit >= 2 * len(strata):  # everybody's share is above one
        shares = np.bincount(strata, weights=kept) - np.array(counts) * min(limit / len(strata), 1)
        assert np.abs(shares).max() < 1 + 1e-9
