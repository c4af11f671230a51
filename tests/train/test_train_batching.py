"""The plan of batches: whole, the same each time, and sparing with padding."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.train.batching import plan_batches, steps_for


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=120),
    batch_size=st.integers(1, 40),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_row_once_an_epoch(lengths: list[int], batch_size: int, epochs: int, seed: int) -> None:
    an_epoch = -(-len(lengths) // batch_size)
    plan = plan_batches(lengths, batch_size=batch_size, steps=epochs * an_epoch, seed=seed)
    assert len(plan) == epochs * an_epoch
    for epoch in range(epochs):
        batches = plan[epoch * an_epoch : (epoch + 1) * an_epoch]
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert plan == plan_batches(lengths, batch_size=batch_size, steps=epochs * an_epoch, seed=seed)


def test_a_longer_plan_starts_with_the_shorter_one() -> None:
    lengths = [random.Random(1).randint(1, 50) for _ in range(100)]
    short = plan_batches(lengths, batch_size=8, steps=20, seed=4)
    assert plan_batches(lengths, batch_size=8, steps=60, seed=4)[:20] == short


def test_seeds_and_epochs_differ() -> None:
    lengths = [5] * 64
    first, second = (plan_batches(lengths, batch_size=8, steps=16, seed=seed) for seed in (0, 1))
    assert first != second
    assert first[:8] != first[8:]


def test_rows_of_like_length_share_a_batch() -> None:
    rng = random.Random(2)
    lengths = [rng.randint(1, 400) for _ in range(2000)]
    plan = plan_batches(lengths, batch_size=16, steps=125, seed=0)

    def padding(batches: list[list[int]]) -> float:
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        return padded / sum(lengths) - 1

    shuffled = list(range(2000))
    rng.shuffle(shuffled)
    assert padding([shuffled[i : i + 16] for i in range(0, 2000, 16)]) > 0.6
    assert padding(plan) < 0.1
    # and yet short and long batches take turns: no ordering by length over the epoch
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in plan]
    assert min(means[:30]) < 100 < 300 < max(means[:30])


def test_no_rows_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        plan_batches([], batch_size=4, steps=1, seed=0)


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "steps"),
    [(64, 64, 1, 1), (65, 64, 1, 2), (1, 64, 3, 3), (10, 64, 0.1, 1), (1000, 8, 2.5, 312), (100, 10, 0.5, 5)],
)
def test_steps_for(rows: int, batch_size: int, epochs: float, steps: int) -> None:
    assert steps_for(rows, batch_size, epochs) == steps
