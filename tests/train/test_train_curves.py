"""Curves and schedules: pure functions."""

from __future__ import annotations

import math

import pytest

from slmops.train.batching import divide
from slmops.train.curves import overfitting
from slmops.train.loop import LoopConfig, rate_factor


def curve(training: list[float], validation: list[float]) -> list[dict[str, float]]:
    return [
        point
        for step, (a, b) in enumerate(zip(training, validation, strict=True), start=1)
        for point in ({"step": step, "loss": a}, {"step": step, "validation_loss": b})
    ]


def test_overfitting() -> None:
    warning = overfitting(curve([3, 2, 1, 0.5], [3, 2.5, 2.8, 3]))
    assert warning is not None
    assert (
        "since step 2 the validation loss rose from 2.500 to 3.000 while the training loss fell from 2.000 to 0.500"
        in (warning)
    )
    assert overfitting(curve([3, 2, 1, 0.5], [3, 2.5, 2.4, 2.45])) is None, "hardly risen"
    assert overfitting(curve([3, 2, 3, 4], [3, 2.5, 2.8, 3])) is None, "both rise: the rate is too high"
    assert overfitting(curve([3], [3])) is None
    assert overfitting([]) is None


@pytest.mark.parametrize(
    ("schedule", "half", "last"),
    [("cosine", 0.5, 0.01), ("linear", 0.5, 0.01), ("constant", 1.0, 1.0), ("inverse_sqrt", math.sqrt(10 / 56), 0.316)],
)
def test_schedules(schedule: str, half: float, last: float) -> None:
    factor = rate_factor(LoopConfig(100, 1, 10, warmup_share=0.1, schedule=schedule))  # type: ignore[arg-type]
    assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factor(55) == pytest.approx(half, abs=1e-9)
    assert factor(99) == pytest.approx(last, abs=2e-3)


def test_divide() -> None:
    rows, lengths = [7, 3, 9, 1, 4], [5, 2, 8, 1, 3]
    assert divide(rows, lengths) == [rows]
    assert divide(rows, lengths, parts=2) == [[7, 3, 9], [1, 4]]
    assert divide(rows, lengths, parts=9) == [[7], [3], [9], [1], [4]]
    assert divide(rows, lengths, max_tokens=10) == [[7, 3], [9], [1, 4]]
    assert divide(rows, lengths, max_tokens=4) == [[7], [3], [9], [1], [4]]
    assert divide([], [], parts=3) == []
    for parts in range(1, 7):
        for most in (1, 6, 12, None):
            pieces = divide(rows, lengths, parts=parts, max_tokens=most)
            assert [row for piece in pieces for row in piece] == rows
            assert len(pieces) >= min(parts, 3)
