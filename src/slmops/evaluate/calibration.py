"""How sure a classifier may say it is: one temperature for all its logits, fitted on rows that it had not learnt from.

Temperature scaling after On Calibration of Modern Neural Networks, Guo et al. 2017; answering only above a threshold
after Selective Classification for Deep Neural Networks, Geifman and El-Yaniv 2017. Pure functions of probabilities and
truths. No answer changes: only how sure it says it is.
Not covered: a confidence that is right for each label by itself, and rows unlike those it was fitted on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.evaluate.scores import expected_calibration_error
from slmops.runtime.calibration import calibrated

LEAST_ROWS = 20
"""Fewer rows say nothing about confidence."""
COLDEST, HOTTEST = 0.05, 20.0
STEPS = 60


@dataclass(frozen=True)
class Calibration:
    """
    ``temperature``    fitted on ``rows`` validation rows; above 1: the classifier was too sure
    ``ece_before``     expected calibration error on the test rows, as the classifier came
    ``ece_after``      the same at the temperature
    ``nll_before``, ``nll_after``  negative log-likelihood on the test rows, nats a row
    ``threshold``      confidence below which it abstains; None where it always answers
    ``answered``       share of the test rows that are answered at the threshold
    ``answered_right`` share of those that are right; None where none is answered
    """

    temperature: float
    rows: int
    ece_before: float
    ece_after: float
    nll_before: float
    nll_after: float
    threshold: float | None = None
    answered: float = 1.0
    answered_right: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    def for_model(self) -> dict[str, Any]:
        """What the model's description keeps of it."""
        return {"temperature": self.temperature, "threshold": self.threshold}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Calibration:
        return cls(**raw)


def fit_temperature(probabilities: NDArray[np.floating[Any]], gold: NDArray[np.int64]) -> float:
    """The temperature under which the truths are likeliest, between :data:`COLDEST` and :data:`HOTTEST`.

    ``probabilities``: ``[rows, labels]``; ``gold``: ``[rows]``, the true label's column, -1 where it has none (such
    rows are left out). 1 where fewer than :data:`LEAST_ROWS` are left.
    """
    kept = gold >= 0
    if int(kept.sum()) < LEAST_ROWS:
        return 1.0
    tiny = np.finfo(np.float64).tiny
    logits = np.log(np.maximum(probabilities[kept].astype(np.float64), tiny))
    wanted = logits[np.arange(len(logits)), gold[kept]]
    # Over the inverse temperature the loss is convex: where its slope is 0, it is least.
    cold, hot = 1 / COLDEST, 1 / HOTTEST
    for _ in range(STEPS):
        middle = (cold * hot) ** 0.5
        if _slope(logits, wanted, middle) > 0:
            cold = middle
        else:
            hot = middle
    return float(1 / (cold * hot) ** 0.5)


def _slope(logits: NDArray[np.float64], wanted: NDArray[np.float64], inverse: float) -> float:
    """Derivative of the mean negative log-likelihood by the inverse temperature."""
    scaled = logits * inverse
    scaled -= scaled.max(axis=1, keepdims=True)
    weights = np.exp(scaled)
    weights /= weights.sum(axis=1, keepdims=True)
    return float(((weights * logits).sum(axis=1) - wanted).mean())


def threshold_for(confidence: NDArray[np.floating[Any]], right: NDArray[np.bool_], accuracy: float) -> float | None:
    """The lowest confidence at and above which at least ``accuracy`` of the answers are right; None where all answers
    together are, 1 where no threshold does it. ``confidence``, ``right``: ``[rows]``."""
    if not len(confidence) or float(right.mean()) >= accuracy:
        return None
    order = np.argsort(-confidence, kind="stable")
    share = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    # Rows of one confidence are answered together: only the last of them is a place to cut.
    last = np.append(confidence[order][:-1] != confidence[order][1:], True)
    good = np.flatnonzero((share >= accuracy) & last)
    return float(confidence[order][good[-1]]) if len(good) else 1.0


def calibrate(
    validation: NDArray[np.floating[Any]],
    validation_targets: Sequence[str],
    test: NDArray[np.floating[Any]],
    test_targets: Sequence[str],
    labels: Sequence[str],
    *,
    abstain_below: float | None = None,
    answered_accuracy: float | None = None,
) -> Calibration:
    """Fit on the validation rows, judge on the test rows. Probabilities: ``[rows, labels]``.

    ``abstain_below`` is the threshold itself; ``answered_accuracy`` the accuracy that answered validation rows must
    have, from which it follows.
    """
    gold, test_gold = _columns(validation_targets, labels), _columns(test_targets, labels)
    temperature = fit_temperature(validation, gold)
    confidence, right = _judged(validation, gold, temperature)
    threshold = abstain_below
    if answered_accuracy is not None:
        threshold = threshold_for(confidence, right, answered_accuracy)
    before, test_right = _judged(test, test_gold, 1.0)
    after, _ = _judged(test, test_gold, temperature)
    answered = after >= (0.0 if threshold is None else threshold)
    return Calibration(
        temperature,
        int((gold >= 0).sum()),
        expected_calibration_error(before, test_right.astype(np.float64)),
        expected_calibration_error(after, test_right.astype(np.float64)),
        _loss(test, test_gold, 1.0),
        _loss(test, test_gold, temperature),
        threshold,
        float(answered.mean()) if len(answered) else 1.0,
        float(test_right[answered].mean()) if answered.any() else None,
    )


def calibration_in_words(found: Calibration) -> str:
    """One or two sentences for people."""
    said = (
        f"Confidence is calibrated by the temperature {found.temperature:.2f}, fitted on {found.rows:,} validation "
        f"rows: on the test rows its expected error is {100 * found.ece_after:.1f} points, and was "
        f"{100 * found.ece_before:.1f}."
    )
    if found.threshold is None:
        return said
    right = "" if found.answered_right is None else f", {100 * found.answered_right:.1f} % of them rightly"
    return (
        f"{said} Below a confidence of {found.threshold:.3f} it abstains: {100 * found.answered:.1f} % of the test "
        f"rows are answered{right}."
    )


def _columns(targets: Sequence[str], labels: Sequence[str]) -> NDArray[np.int64]:
    column = {label: index for index, label in enumerate(labels)}
    return np.array([column.get(target, -1) for target in targets], dtype=np.int64)


def _judged(
    probabilities: NDArray[np.floating[Any]], gold: NDArray[np.int64], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Confidence of each row's answer, and whether it is right."""
    scaled = calibrated(probabilities.astype(np.float32), temperature)
    return scaled.max(axis=1).astype(np.float64), scaled.argmax(axis=1) == gold


def _loss(probabilities: NDArray[np.floating[Any]], gold: NDArray[np.int64], temperature: float) -> float:
    kept = gold >= 0
    if not kept.any():
        return 0.0
    scaled = calibrated(probabilities[kept].astype(np.float32), temperature)
    return float(-np.log(np.maximum(scaled[np.arange(len(scaled)), gold[kept]], 1e-12)).mean())
