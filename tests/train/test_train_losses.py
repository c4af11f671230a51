"""Losses against the sums written out in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from slmops.train.losses import IGNORED_LABEL, gold_cross_entropy, hidden_state_distance, softened_divergence

Array = NDArray[np.float64]


def log_softmax(logits: Array) -> Array:
    out = np.empty_like(logits)
    for row in range(len(logits)):
        highest = max(logits[row])
        total = sum(math.exp(value - highest) for value in logits[row])
        for column in range(logits.shape[1]):
            out[row, column] = logits[row, column] - highest - math.log(total)
    return out


def divergence_reference(student: Array, teacher: Array, temperature: float) -> float:
    q, p = log_softmax(student / temperature), log_softmax(teacher / temperature)
    total = 0.0
    for row in range(len(p)):
        for column in range(p.shape[1]):
            total += math.exp(p[row, column]) * (p[row, column] - q[row, column])
    return total / len(p) * temperature**2


def cross_entropy_reference(logits: Array, labels: list[int]) -> float:
    log_probabilities = log_softmax(logits)
    return sum(-log_probabilities[row, label] for row, label in enumerate(labels) if label >= 0) / len(labels)


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.5])
@pytest.mark.parametrize("shape", [(1, 2), (5, 3), (4, 77)])
def test_divergence_equals_the_sum_written_out(
    random: np.random.Generator, temperature: float, shape: tuple[int, int]
) -> None:
    student, teacher = random.normal(0, 3, shape), log_softmax(random.normal(0, 3, shape))
    found = softened_divergence(torch.tensor(student), torch.tensor(teacher), temperature)
    assert found.shape == ()
    assert found.item() == pytest.approx(divergence_reference(student, teacher, temperature), rel=1e-5)


def test_divergence_does_not_see_a_constant_in_the_teachers_row(random: np.random.Generator) -> None:
    """Log-probabilities or logits: the same."""
    student, logits = torch.tensor(random.normal(size=(6, 9))), random.normal(size=(6, 9))
    by_logits = softened_divergence(student, torch.tensor(logits), 2.0)
    by_log_probabilities = softened_divergence(student, torch.tensor(log_softmax(logits)), 2.0)
    assert by_logits.item() == pytest.approx(by_log_probabilities.item(), rel=1e-5)


def test_divergence_is_nothing_for_equals_and_positive_else(random: np.random.Generator) -> None:
    logits = torch.tensor(random.normal(size=(6, 9)))
    assert softened_divergence(logits + 5.0, torch.log_softmax(logits, -1), 3.0).item() == pytest.approx(0.0, abs=1e-5)
    assert softened_divergence(logits.flip(1), logits, 3.0).item() > 0.01


def test_divergence_survives_a_certain_teacher() -> None:
    """log(1e-9) beside log(1) must not become NaN, and a far-off student is finite."""
    teacher = torch.log(torch.tensor([[1.0, 1e-9, 1e-9]]))
    student = torch.tensor([[-1e4, 1e4, 0.0]], requires_grad=True)
    loss = softened_divergence(student, teacher, 1.0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert bool(torch.isfinite(student.grad).all())


def test_gradients_keep_their_size_over_temperatures(random: np.random.Generator) -> None:
    """Without the factor T² they would shrink by it: at high temperature the gradient tends to (z − v) / N."""
    shape = (8, 10)
    start, teacher = random.normal(size=shape), torch.tensor(random.normal(size=shape))
    norms = {}
    for temperature in (1.0, 2.0, 4.0, 64.0, 128.0):
        student = torch.tensor(start, requires_grad=True)
        softened_divergence(student, teacher, temperature).backward()
        norms[temperature] = student.grad
    assert norms[64.0].norm().item() == pytest.approx(norms[128.0].norm().item(), rel=0.02)
    assert 0.3 < (norms[4.0].norm() / norms[1.0].norm()).item() < 3.0
    centred = (start - start.mean(1, keepdims=True)) - (teacher.numpy() - teacher.numpy().mean(1, keepdims=True))
    expected = centred / shape[1] / shape[0]  # Hinton et al., equation 4, for T → ∞
    np.testing.assert_allclose(norms[128.0].numpy(), expected, atol=0.02 * np.abs(expected).max())


def test_gradient_equals_finite_differences(random: np.random.Generator) -> None:
    start, teacher = random.normal(size=(2, 4)), random.normal(size=(2, 4))
    labels = [3, IGNORED_LABEL]

    def value(logits: Array) -> float:
        soft = divergence_reference(logits, teacher, 2.0)
        return 0.7 * soft + 0.3 * cross_entropy_reference(logits, labels)

    student = torch.tensor(start, requires_grad=True)
    soft = softened_divergence(student, torch.tensor(teacher), 2.0)
    (0.7 * soft + 0.3 * gold_cross_entropy(student, torch.tensor(labels))).backward()
    for index in np.ndindex(*start.shape):
        moved = start.copy()
        moved[index] += 1e-5
        slope = (value(moved) - value(start)) / 1e-5
        assert student.grad[index].item() == pytest.approx(slope, abs=1e-4)


def test_gold_rows_are_averaged_over_the_whole_batch(random: np.random.Generator) -> None:
    logits = random.normal(size=(5, 3))
    labels = [0, IGNORED_LABEL, 2, IGNORED_LABEL, 1]
    found = gold_cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert found.item() == pytest.approx(cross_entropy_reference(logits, labels), rel=1e-5)
    # One more row without gold only makes the share of gold smaller.
    wider = gold_cross_entropy(torch.tensor(np.vstack([logits, logits])), torch.tensor(labels + [IGNORED_LABEL] * 5))
    assert wider.item() == pytest.approx(found.item() / 2, rel=1e-5)


def test_rows_without_gold_have_no_gold_gradient(random: np.random.Generator) -> None:
    logits = torch.tensor(random.normal(size=(3, 4)), requires_grad=True)
    gold_cross_entropy(logits, torch.tensor([1, IGNORED_LABEL, 2])).backward()
    assert bool((logits.grad[1] == 0).all())
    assert bool((logits.grad[0] != 0).all())


def test_a_batch_without_any_gold_is_finite(random: np.random.Generator) -> None:
    logits = torch.tensor(random.normal(size=(3, 4)), requires_grad=True)
    teacher = torch.tensor(random.normal(size=(3, 4)))
    labels = torch.tensor([IGNORED_LABEL] * 3)
    assert gold_cross_entropy(logits, labels).item() == 0.0
    loss = softened_divergence(logits, teacher, 2.0) + gold_cross_entropy(logits, labels)
    loss.backward()
    assert loss.item() == pytest.approx(divergence_reference(logits.detach().numpy(), teacher.numpy(), 2.0), rel=1e-5)


def test_distance_of_hidden_states_is_the_mean_square(random: np.random.Generator) -> None:
    ours, theirs = random.normal(size=(3, 5)), random.normal(size=(3, 5))
    found = hidden_state_distance(torch.tensor(ours).to(torch.bfloat16), torch.tensor(theirs).to(torch.float16))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(sum((ours - theirs).ravel() ** 2) / 15, rel=0.02)


def test_low_precision_logits_are_summed_in_fp32() -> None:
    logits = torch.full((1, 4096), 1.0).to(torch.bfloat16)
    found = gold_cross_entropy(logits, torch.tensor([0]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(math.log(4096), rel=1e-5)
