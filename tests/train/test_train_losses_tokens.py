"""Losses over tokens, and those of what is inside, against sums written out in numpy; gradients against differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slmops.errors import ModelError
from slmops.train.losses import (
    IGNORED_LABEL,
    NOTHING,
    attention_divergence,
    bucket_logits,
    confidence_weights,
    doubt_of,
    generalized_jsd,
    in_chunks,
    reverse_divergence,
    softened_divergence,
    sorted_distance,
    weighted_sum,
)

Array = NDArray[np.float64]


def softmax(logits: Array) -> Array:
    out = np.empty_like(logits)
    for row in range(len(logits)):
        top = max(logits[row])
        total = sum(math.exp(value - top) for value in logits[row])
        for column in range(logits.shape[1]):
            out[row, column] = math.exp(logits[row, column] - top) / total
    return out


def kl(p: Array, q: Array) -> Array:
    """Of each row."""
    return np.array(
        [sum(a * math.log(a / b) for a, b in zip(pr, qr, strict=True) if a > 0) for pr, qr in zip(p, q, strict=True)]
    )


def reverse_reference(student: Array, teacher: Array, temperature: float) -> Array:
    return kl(softmax(student / temperature), softmax(teacher / temperature)) * temperature**2


def jsd_reference(student: Array, teacher: Array, beta: float, temperature: float) -> Array:
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    middle = beta * p + (1 - beta) * q
    return (beta * kl(p, middle) + (1 - beta) * kl(q, middle)) * temperature**2


def sorted_reference(student: Array, teacher: Array) -> Array:
    distances = []
    for ours, theirs in zip(softmax(student), teacher, strict=True):
        a, b = sorted(ours, reverse=True), sorted(theirs, reverse=True)
        width = max(len(a), len(b))
        a, b = a + [0.0] * (width - len(a)), b + [0.0] * (width - len(b))
        distances.append(sum(abs(x - y) for x, y in zip(a, b, strict=True)))
    return np.array(distances)


def differences(value: Callable[[Array], float], start: Array) -> Array:
    slopes = np.empty_like(start)
    for index in np.ndindex(*start.shape):
        up, down = start.copy(), start.copy()
        up[index] += 1e-5
        down[index] -= 1e-5
        slopes[index] = (value(up) - value(down)) / 2e-5
    return slopes


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(4)


# --- divergences ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_reverse_divergence_and_its_gradient(random: np.random.Generator, temperature: float) -> None:
    start, teacher, weights = random.normal(size=(3, 5)), random.normal(size=(3, 5)), random.uniform(size=3)
    student = torch.tensor(start, requires_grad=True)
    loss = reverse_divergence(student, torch.tensor(teacher), temperature, torch.tensor(weights))
    loss.backward()

    def value(logits: Array) -> float:
        return float((reverse_reference(logits, teacher, temperature) * weights).mean())

    assert loss.shape == ()
    assert loss.item() == pytest.approx(value(start), rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), differences(value, start), atol=1e-5)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_and_its_gradient(random: np.random.Generator, beta: float) -> None:
    start, teacher = random.normal(size=(3, 5)), random.normal(size=(3, 5))
    student = torch.tensor(start, requires_grad=True)
    loss = generalized_jsd(student, torch.tensor(teacher), beta, 2.0)
    loss.backward()

    def value(logits: Array) -> float:
        return float(jsd_reference(logits, teacher, beta, 2.0).mean())

    assert loss.item() == pytest.approx(value(start), rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), differences(value, start), atol=1e-5)


def test_jsd_tends_to_both_divergences(random: np.random.Generator) -> None:
    student, teacher = torch.tensor(random.normal(size=(4, 6))), torch.tensor(random.normal(size=(4, 6)))
    forward, reverse = softened_divergence(student, teacher, 1.0), reverse_divergence(student, teacher, 1.0)
    near = 1e-3
    assert generalized_jsd(student, teacher, near, 1.0).item() / near == pytest.approx(forward.item(), rel=0.01)
    assert generalized_jsd(student, teacher, 1 - near, 1.0).item() / near == pytest.approx(reverse.item(), rel=0.01)
    for beta in (0.0, 1.0):
        with pytest.raises(ValueError, match="not between"):
            generalized_jsd(student, teacher, beta, 1.0)


def test_equals_have_no_distance(random: np.random.Generator) -> None:
    logits = torch.tensor(random.normal(size=(4, 6)))
    for loss in (
        reverse_divergence(logits + 3, logits, 2.0),
        generalized_jsd(logits + 3, logits, 0.3, 2.0),
        sorted_distance(logits, logits.log_softmax(-1).sort(descending=True).values),
    ):
        assert loss.item() == pytest.approx(0, abs=1e-6)


# --- the k likeliest and the rest -------------------------------------------------------------------------------


def test_buckets_are_the_probabilities_of_the_tokens_and_of_the_rest(random: np.random.Generator) -> None:
    logits = random.normal(0, 2, size=(3, 7))
    ids = np.array([[4, 0, 2], [1, 6, 5], [0, -1, -1]])
    found = bucket_logits(torch.tensor(logits), torch.tensor(ids)).softmax(-1).numpy()
    whole = softmax(logits)
    for row in range(3):
        known = [token for token in ids[row] if token >= 0]
        expected = [whole[row, token] if token >= 0 else 0.0 for token in ids[row]]
        np.testing.assert_allclose(found[row], [*expected, 1 - whole[row, known].sum()], atol=1e-6)


def test_gradient_through_buckets(random: np.random.Generator) -> None:
    start, ids = random.normal(size=(2, 6)), np.array([[3, 1], [5, -1]])
    teacher = np.log(np.array([[0.6, 0.3, 0.1], [0.7, 1e-30, 0.3]]))

    def value(logits: Array) -> float:
        whole, p = softmax(logits), softmax(teacher)
        total = 0.0
        for row in range(2):
            known = [token for token in ids[row] if token >= 0]
            q = [whole[row, token] if token >= 0 else None for token in ids[row]] + [1 - whole[row, known].sum()]
            total += sum(a * math.log(a / b) for a, b in zip(p[row], q, strict=True) if b is not None)
        return total / 2

    student = torch.tensor(start, requires_grad=True)
    loss = softened_divergence(bucket_logits(student, torch.tensor(ids)), torch.tensor(teacher), 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(value(start), rel=1e-4)
    np.testing.assert_allclose(student.grad.numpy(), differences(value, start), atol=1e-4)


def test_buckets_of_all_tokens_and_of_a_certain_student_are_finite() -> None:
    certain = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.5, 0.3, NOTHING]]).log_softmax(-1)
    for ids in ([[0, 1]], [[1, 2]]):
        for divergence in (softened_divergence, reverse_divergence):
            loss = divergence(bucket_logits(certain, torch.tensor(ids)), teacher, 1.0)
            loss.backward()
            assert math.isfinite(loss.item())
            assert bool(torch.isfinite(certain.grad).all())
    everything = bucket_logits(certain, torch.tensor([[0, 1, 2]]))
    assert everything.softmax(-1)[0, -1].item() == 0
    everything.sum().backward()
    assert bool(torch.isfinite(certain.grad).all())


# --- other vocabularies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 5, 9])
def test_sorted_distance_and_its_gradient(random: np.random.Generator, width: int) -> None:
    start, teacher = random.normal(size=(3, 5)), softmax(random.normal(size=(3, width)))
    logs = torch.tensor(np.log(-np.sort(-teacher)))
    student = torch.tensor(start, requires_grad=True)
    loss = sorted_distance(student, logs)
    loss.backward()

    def value(logits: Array) -> float:
        return float(sorted_reference(logits, teacher).mean())

    assert loss.item() == pytest.approx(value(start), rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), differences(value, start), atol=1e-5)


def test_sorted_distance_of_the_likeliest_takes_the_rest_as_one(random: np.random.Generator) -> None:
    student, teacher = random.normal(size=(3, 8)), -np.sort(-softmax(random.normal(size=(3, 8))))
    head, tail = np.log(teacher[:, :3]), np.log(teacher[:, 3:].sum(1))
    ours = -np.sort(-softmax(student))
    expected = np.abs(ours[:, :3] - teacher[:, :3]).sum(1) + np.abs(ours[:, 3:].sum(1) - teacher[:, 3:].sum(1))
    weights = np.array([0.0, 1.0, 2.0])
    found = sorted_distance(torch.tensor(student), torch.tensor(head), torch.tensor(tail), torch.tensor(weights))
    assert found.item() == pytest.approx((expected * weights).mean(), rel=1e-5)


# --- inside -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [2, 3])
def test_attention_divergence(random: np.random.Generator, heads: int) -> None:
    """The same number of heads: head by head; else the heads' means."""
    start, teacher = random.normal(size=(2, 2, 4, 4)), random.normal(size=(2, heads, 4, 4))
    mask = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])

    def rows(scores: Array) -> Array:
        return softmax(scores.reshape(-1, 4)).reshape(scores.shape)

    def value(scores: Array) -> float:
        q, p = rows(scores), rows(teacher)
        if heads != 2:
            q, p = q.mean(1, keepdims=True), p.mean(1, keepdims=True)
        total = 0.0
        for text in range(2):
            for token in range(4):
                if mask[text, token]:
                    total += kl(p[text, :, token], q[text, :, token]).mean()
        return total / mask.sum()

    student = torch.tensor(start, requires_grad=True)
    loss = attention_divergence(student.softmax(-1), torch.tensor(teacher).softmax(-1), torch.tensor(mask))
    loss.backward()
    assert loss.item() == pytest.approx(value(start), rel=1e-5)
    np.testing.assert_allclose(student.grad.numpy(), differences(value, start), atol=1e-5)


def test_attention_to_nothing_is_finite() -> None:
    """A causal mask gives probabilities of exactly 0."""
    teacher = torch.eye(3).expand(1, 1, 3, 3)
    student = torch.full((1, 1, 3, 3), 1 / 3, requires_grad=True)
    loss = attention_divergence(student, teacher, torch.ones(1, 3))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(3), rel=1e-5)
    assert bool(torch.isfinite(student.grad).all())


# --- several teachers -------------------------------------------------------------------------------------------


def test_the_surer_teacher_of_the_right_answer_counts_more(random: np.random.Generator) -> None:
    right = [torch.tensor(random.uniform(-5, 0, size=4)) for _ in range(3)]
    found = confidence_weights(right, equal=False)
    torch.testing.assert_close(torch.stack(found).sum(0), torch.ones(4))
    for row in range(4):
        costs = [math.exp(-one[row].item()) for one in right]
        for one, cost in zip(found, costs, strict=True):
            assert one[row].item() == pytest.approx((1 - cost / sum(costs)) / 2, rel=1e-5)
        assert torch.stack(found)[:, row].argmax() == torch.stack(right)[:, row].argmax()
    assert [one.tolist() for one in confidence_weights(right[:2], equal=True)] == [[0.5] * 4] * 2
    assert confidence_weights(right[:1], equal=False)[0].tolist() == [1.0] * 4


def test_doubt_is_cross_entropy_where_gold_is_known_and_entropy_elsewhere() -> None:
    logs = torch.log(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))
    found = doubt_of(logs, torch.tensor([1, IGNORED_LABEL]))
    assert found.tolist() == pytest.approx([-math.log(0.1), math.log(2)], rel=1e-5)


# --- sums -------------------------------------------------------------------------------------------------------


def test_the_sum_names_what_is_wrong() -> None:
    good = torch.tensor(2.0)
    assert weighted_sum({"gold": good, "jsd": good}, {"gold": 0.5, "jsd": 3, "hidden": 9}).item() == 7
    with pytest.raises(ModelError, match="The loss jsd became nan") as caught:
        weighted_sum({"gold": good, "jsd": torch.tensor(math.nan)}, {"gold": 1, "jsd": 1})
    assert "distill.losses.jsd" in (caught.value.remedy or "")
    with pytest.raises(ModelError, match=r"The loss hidden has the shape \(3,\)"):
        weighted_sum({"gold": good, "hidden": torch.ones(3)}, {"gold": 1, "hidden": 1})


@pytest.mark.parametrize("rows_each", [1, 3, 7, 100])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_give_the_same_loss_and_gradients(rows_each: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    head = nn.Linear(5, 11, bias=bias)
    start = torch.randn(8, 5, generator=generator)
    targets, teacher = torch.arange(8) % 11, torch.randn(8, 11, generator=generator)
    widest: list[int] = []

    def loss_of(logits: Tensor, rows: slice) -> dict[str, Tensor]:
        widest.append(len(logits))
        share = len(logits) / 8
        return {
            "gold": nn.functional.cross_entropy(logits, targets[rows]) * share,
            "jsd": generalized_jsd(logits, teacher[rows], 0.3, 1.0) * share,
        }

    def run(work: Callable[[Tensor], Tensor]) -> tuple[float, list[Any]]:
        head.zero_grad()
        states = start.clone().requires_grad_()
        loss = 3 * work(states)
        loss.backward()
        return loss.item(), [states.grad, *(parameter.grad.clone() for parameter in head.parameters())]

    weights = {"gold": 0.4, "jsd": 2.0}
    expected, slopes = run(lambda states: weighted_sum(loss_of(head(states), slice(0, 8)), weights))
    widest.clear()
    found, ours = run(lambda states: in_chunks(head, states, rows_each, loss_of, weights))
    assert max(widest) == min(8, rows_each)
    assert found == pytest.approx(expected, rel=1e-6)
    for one, other in zip(ours, slopes, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert in_chunks(head, start, rows_each, loss_of, weights).item() == pytest.approx(expected / 3, rel=1e-6)


def test_chunks_leave_a_frozen_head_alone() -> None:
    head = nn.Linear(4, 6).requires_grad_(False)
    states = torch.randn(5, 4, requires_grad=True)
    in_chunks(head, states, 2, lambda logits, rows: {"gold": logits.square().mean()}, {"gold": 1.0}).backward()
    assert head.weight.grad is None
    assert states.grad is not None
