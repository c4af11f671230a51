"""A temperature that was hidden is found again, against a plain search; thresholds keep their word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.evaluate.calibration import LEAST_ROWS, Calibration, calibrate, fit_temperature, threshold_for
from slmops.runtime.calibration import calibrated
from slmops.runtime.onnx_classifier import softmax

LABELS = ("a", "b", "c", "d")


def sample(rows: int, temperature: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of a classifier whose logits are ``temperature`` times too large, and truths drawn as the right
    ones say."""
    random = np.random.default_rng(seed)
    logits = random.normal(size=(rows, len(LABELS))) * 2
    honest = softmax(logits.astype(np.float32))
    gold = np.array([random.choice(len(LABELS), p=row / row.sum()) for row in honest.astype(np.float64)])
    return softmax((logits * temperature).astype(np.float32)), gold


def loss(probabilities: np.ndarray, gold: np.ndarray, temperature: float) -> float:
    scaled = calibrated(probabilities, temperature)
    return float(-np.log(scaled[np.arange(len(gold)), gold]).mean())


@pytest.mark.parametrize("hidden", [0.4, 1.0, 3.0])
def test_the_hidden_temperature_is_found(hidden: float) -> None:
    probabilities, gold = sample(4000, hidden, seed=1)
    found = fit_temperature(probabilities, gold)
    assert found == pytest.approx(hidden, rel=0.08)
    best = min(np.exp(np.linspace(math.log(0.05), math.log(20), 400)), key=lambda t: loss(probabilities, gold, t))
    assert loss(probabilities, gold, found) <= loss(probabilities, gold, float(best)) + 1e-6


def test_what_says_nothing_changes_nothing() -> None:
    probabilities, gold = sample(LEAST_ROWS - 1, 3.0, seed=2)
    assert fit_temperature(probabilities, gold) == 1.0
    assert fit_temperature(*sample(200, 3.0, seed=2)) > 1.5
    known, gold = sample(200, 3.0, seed=2)
    unknown = np.full(200, -1)
    assert fit_temperature(np.concatenate([known, known]), np.concatenate([gold, unknown])) == pytest.approx(
        fit_temperature(known, gold)
    )


def test_all_right_and_all_wrong_stay_finite() -> None:
    probabilities, _ = sample(100, 1.0, seed=3)
    assert fit_temperature(probabilities, probabilities.argmax(axis=1)) == pytest.approx(0.05, rel=0.01)
    assert fit_temperature(probabilities, probabilities.argmin(axis=1)) == pytest.approx(20, rel=0.01)
    certain = np.eye(4, dtype=np.float32)[[0] * 50]
    assert 0 < fit_temperature(certain, np.zeros(50, dtype=np.int64)) <= 20


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 20), st.integers(0, 2**31))
def test_no_answer_changes_and_rows_stay_distributions(temperature: float, seed: int) -> None:
    probabilities, _ = sample(20, 2.0, seed)
    scaled = calibrated(probabilities, temperature)
    assert (scaled.argmax(axis=1) == probabilities.argmax(axis=1)).all()
    assert scaled.sum(axis=1) == pytest.approx(1, abs=1e-5)
    reference = softmax((np.log(np.maximum(probabilities, 1e-300).astype(np.float64)) / temperature).astype(np.float32))
    assert scaled == pytest.approx(reference, abs=1e-4)


def test_at_1_nothing_is_touched() -> None:
    probabilities, _ = sample(3, 2.0, seed=4)
    assert calibrated(probabilities, 1.0) is probabilities


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([0.3, 0.5, 0.6, 0.9, 0.95]), st.booleans()), min_size=1, max_size=40),
    st.floats(0.1, 1),
)
def test_a_threshold_keeps_its_word_and_answers_as_many_as_it_can(rows: list[tuple[float, bool]], aim: float) -> None:
    confidence, right = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    found = threshold_for(confidence, right, aim)

    def kept(threshold: float) -> bool:
        answered = confidence >= threshold
        return bool(answered.any()) and bool(right[answered].mean() >= aim)

    if found is None:
        assert right.mean() >= aim
    elif found < 1:
        assert kept(found)
        assert not any(kept(lower) for lower in {*confidence.tolist()} if lower < found)
    else:
        assert not any(kept(one) for one in confidence.tolist())


def test_the_report_of_an_overconfident_classifier() -> None:
    probabilities, gold = sample(3000, 3.0, seed=5)
    targets = [LABELS[index] for index in gold]
    made = calibrate(
        probabilities[:1500], targets[:1500], probabilities[1500:], targets[1500:], LABELS, answered_accuracy=0.9
    )
    assert made.temperature == pytest.approx(3, rel=0.15)
    assert made.ece_after < 0.04 < 0.1 < made.ece_before
    assert made.nll_after < made.nll_before
    assert made.threshold is not None
    assert 0.1 < made.answered < 0.9
    assert made.answered_right == pytest.approx(0.9, abs=0.03)
    assert Calibration.from_json(made.to_json()) == made
    assert made.for_model() == {"temperature": made.temperature, "threshold": made.threshold}
    fixed = calibrate(probabilities, targets, probabilities, targets, LABELS, abstain_below=0.5)
    assert fixed.threshold == 0.5
    plain = calibrate(probabilities, targets, probabilities, targets, LABELS)
    assert (plain.threshold, plain.answered) == (None, 1.0)
