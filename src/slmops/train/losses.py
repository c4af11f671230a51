"""Losses, each a small pure function of tensors.

Divergences take logits or log-probabilities, ``[rows, classes]``: softmax does not see a constant in a row. A row is an
example of a closed label set or a token to predict. The result is the mean over rows, a scalar in float32; ``weights``
``[rows]`` multiply each row before the mean. A temperature softens both sides, and its square keeps the gradients'
size (Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.errors import ModelError

IGNORED_LABEL = -100
"""Label of a row or position that has no gold answer; the value that PyTorch's cross-entropy skips."""

NOTHING = -1e4
"""A logit whose probability is 0 in float32, and whose products with 0 are still numbers, as those of -inf are not."""


def softened_divergence(
    student_logits: Tensor, teacher_log_probabilities: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """Forward KL(teacher ‖ student): the student covers all that the teacher holds possible.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.
    """
    student, teacher = _softened(student_logits, teacher_log_probabilities, temperature)
    return _mean(F.kl_div(student, teacher, reduction="none", log_target=True), temperature, weights)


def reverse_divergence(
    student_logits: Tensor, teacher_log_probabilities: Tensor, temperature: float, weights: Tensor | None = None
) -> Tensor:
    """Reverse KL(student ‖ teacher): the student keeps to what the teacher holds likely.

    Source: Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", arXiv:2306.08543.
    """
    student, teacher = _softened(student_logits, teacher_log_probabilities, temperature)
    return _mean(F.kl_div(teacher, student, reduction="none", log_target=True), temperature, weights)


def generalized_jsd(
    student_logits: Tensor,
    teacher_log_probabilities: Tensor,
    beta: float,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """``beta`` KL(teacher ‖ M) + (1 - ``beta``) KL(student ‖ M) with M = ``beta`` teacher + (1 - ``beta``) student.

    ``beta`` lies between 0 and 1, both excluded: divided by ``beta`` it tends to the forward KL for ``beta`` → 0, and
    divided by 1 - ``beta`` to the reverse one for ``beta`` → 1.
    Source: Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, equation 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}, not between 0 and 1")
    student, teacher = _softened(student_logits, teacher_log_probabilities, temperature)
    middle = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    of_teacher = F.kl_div(middle, teacher, reduction="none", log_target=True)
    of_student = F.kl_div(middle, student, reduction="none", log_target=True)
    return _mean(beta * of_teacher + (1 - beta) * of_student, temperature, weights)


def gold_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over rows with a gold label, divided by all rows of the batch.

    ``logits`` ``[rows, classes]``, ``labels`` int64 ``[rows]`` with :data:`IGNORED_LABEL` for none. Dividing by all
    rows keeps the weight of a gold row the same, however many rows without gold share its batch.
    """
    summed = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return summed / max(1, labels.numel())


def bucket_logits(logits: Tensor, ids: Tensor) -> Tensor:
    """The logits of the tokens ``ids`` and, in the last column, of all others together: ``[rows, k + 1]``.

    ``logits`` ``[rows, vocabulary]``; ``ids`` int64 ``[rows, k]``, distinct in a row, or -1 for none, which gets
    probability 0. Softmax over the buckets gives each token its probability and the last the mass of the rest, so that
    any divergence over buckets is one over distributions.
    """
    buckets: Tensor = _Buckets.apply(logits.float(), ids)  # type: ignore[no-untyped-call]
    return buckets


class _Buckets(torch.autograd.Function):
    """Forward makes one copy of the logits, and backward one tensor of their width: wide passes are what it costs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> Tensor:
        known = ids >= 0
        picked = logits.gather(-1, ids.clamp(min=0)).masked_fill(~known, NOTHING)
        # An id of -1 stands for another of its row here, so that nothing is hidden for it.
        places = torch.where(known, ids, ids.max(dim=-1, keepdim=True).values)
        none = places[:, 0] < 0
        others = logits.scatter(-1, places.clamp(min=0), NOTHING)
        if bool(none.any()):
            others[none] = logits[none]
        rest = torch.logsumexp(others, dim=-1, keepdim=True)
        ctx.save_for_backward(others, rest, ids)
        return torch.cat([picked, rest], dim=-1)

    @staticmethod
    def backward(ctx: Any, *arrived: Any) -> Any:
        [factor] = arrived
        others, rest, ids = ctx.saved_tensors
        gradient = (others - rest).exp_().mul_(factor[:, -1:])
        of_picked = factor[:, :-1].masked_fill(ids < 0, 0.0)
        return gradient.scatter_add_(-1, ids.clamp(min=0), of_picked), None


def sorted_distance(
    student_logits: Tensor,
    teacher_log_probabilities: Tensor,
    teacher_log_tail: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Distance of two distributions over vocabularies that have nothing in common, both sorted from the likeliest on.

    The sum of absolute differences at equal rank: ``student_logits`` ``[rows, vocabulary]``,
    ``teacher_log_probabilities`` ``[rows, k]`` in descending order. The shorter is continued with zeros. With
    ``teacher_log_tail`` ``[rows]`` the teacher's are its first k of more, and all ranks behind count as one.
    Source: Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
    arXiv:2402.12030.
    """
    student = student_logits.float().softmax(dim=-1)
    teacher = teacher_log_probabilities.float().exp()
    ranks = min(student.shape[-1], teacher.shape[-1])
    top = student.topk(ranks, dim=-1).values
    distance = (top - teacher[:, :ranks]).abs().sum(dim=-1)
    rest = teacher[:, ranks:].sum(dim=-1)
    if teacher_log_tail is None:
        distance = distance + rest + (1 - top.sum(dim=-1)).clamp(min=0)
    else:
        distance = distance + (1 - top.sum(dim=-1) - rest - teacher_log_tail.float().exp()).abs()
    return distance.mean() if weights is None else (distance * weights).mean()


def hidden_state_distance(projected_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Mean squared distance between the student's projected states and the teacher's, both ``[rows, hidden]``.

    Give the teacher's standardized, so that each dimension counts the same and the result starts near 1.
    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351.
    """
    return F.mse_loss(projected_states.float(), teacher_states.float())


def attention_divergence(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher ‖ student) of where each token looks, mean over heads and over the tokens of ``mask``.

    ``student`` and ``teacher`` ``[batch, heads, tokens, tokens]``, each row a distribution; ``mask``
    ``[batch, tokens]`` is 1 for tokens that count. Where the numbers of heads differ, the heads' means are compared.
    Source: Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
    Transformers", arXiv:2002.10957.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    smallest = torch.finfo(torch.float32).tiny
    difference = teacher.clamp(min=smallest).log() - student.clamp(min=smallest).log()
    rows = (teacher * difference).sum(dim=-1).mean(dim=1)
    counted = mask.to(rows.dtype)
    return (rows * counted).sum() / counted.sum().clamp(min=1)


def confidence_weights(following: Sequence[Tensor], *, equal: bool) -> list[Tensor]:
    """How much each teacher counts for each token; they sum to 1. ``following``: log-probability of the right answer,
    one ``[rows]`` a teacher.

    A teacher that finds the right answer less likely than the others do counts less:
    (1 - softmax of the cross-entropies) / (teachers - 1).
    Source: Zhang, Chen, Wang, "Confidence-Aware Multi-Teacher Knowledge Distillation", arXiv:2201.00007.
    """
    teachers = len(following)
    if teachers == 1 or equal:
        return [torch.full_like(one, 1 / teachers) for one in following]
    doubt = torch.softmax(torch.stack([-one.float() for one in following]), dim=0)
    return list((1 - doubt) / (teachers - 1))


def doubt_of(teacher_log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """How unsure a teacher is of each row, ``[rows]``: its cross-entropy with the gold label; its entropy where there
    is none (:data:`IGNORED_LABEL`). ``teacher_log_probabilities`` ``[rows, classes]``.
    """
    logs = teacher_log_probabilities.float()
    known = labels != IGNORED_LABEL
    right = -logs.gather(-1, labels.masked_fill(~known, 0)[:, None])[:, 0]
    return torch.where(known, right, -(logs.exp() * logs).sum(dim=-1))


def weighted_sum(parts: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The sum of ``parts``, each a scalar, times its weight.

    Raises:
        ModelError: a part is no scalar, or the sum is no number: the part to blame is named.
    """
    for name, part in parts.items():
        if part.ndim:
            raise ModelError(
                f"The loss {name} has the shape {tuple(part.shape)}, not that of a single number.",
                remedy="A loss returns a scalar, the mean over the batch.",
            )
    total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    if not math.isfinite(total.item()):
        blamed = next((name for name, part in parts.items() if not math.isfinite(part.item())), next(iter(parts)))
        raise ModelError(
            f"The loss {blamed} became {parts[blamed].item()}.",
            remedy=f"Lower the learning rate, set train.precision: fp32, or leave out distill.losses.{blamed}.",
        )
    return total


LossOfRows = Callable[[Tensor, slice], dict[str, Tensor]]


def in_chunks(
    head: nn.Module, states: Tensor, rows_each: int, loss_of: LossOfRows, weights: Mapping[str, float]
) -> Tensor:
    """The weighted sum of losses over ``head(states)``, whose full width exists for at most ``rows_each`` rows at once.

    ``states`` ``[rows, hidden]``; ``loss_of(logits, rows)`` gives scalars that are *sums* over the rows of that slice.
    The gradients of ``states`` and of the head are computed piece by piece along with the loss, and kept instead of
    the logits: backward has nothing left to compute.

    Raises:
        ModelError: as :func:`weighted_sum`.
    """
    pieces = [slice(start, min(start + rows_each, len(states))) for start in range(0, len(states), rows_each)]
    if len(pieces) <= 1 or not torch.is_grad_enabled():
        return torch.stack([weighted_sum(loss_of(head(states[piece]), piece), weights) for piece in pieces]).sum()
    names = [name for name, parameter in head.named_parameters() if parameter.requires_grad]
    parameters = [head.get_parameter(name) for name in names]
    total: Tensor = _Chunked.apply(head, names, pieces, loss_of, weights, states, *parameters)  # type: ignore[no-untyped-call]
    return total


class _Chunked(torch.autograd.Function):
    """Forward computes the gradients too; backward multiplies them by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        names: list[str],
        pieces: list[slice],
        loss_of: LossOfRows,
        weights: Mapping[str, float],
        states: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        of_states = torch.zeros_like(states)
        of_leaves = [torch.zeros_like(leaf, requires_grad=False) for leaf in leaves]
        total = torch.zeros((), device=states.device)
        for piece in pieces:
            with torch.enable_grad():
                leaf = states[piece].detach().requires_grad_()
                logits = torch.func.functional_call(head, dict(zip(names, leaves, strict=True)), (leaf,))
                loss = weighted_sum(loss_of(logits, piece), weights)
            first, *others = torch.autograd.grad(loss, [leaf, *leaves])
            of_states[piece] = first
            for gathered, gradient in zip(of_leaves, others, strict=True):
                gathered += gradient
            total += loss.detach()
        ctx.save_for_backward(of_states, *of_leaves)
        return total

    @staticmethod
    def backward(ctx: Any, *arrived: Any) -> Any:
        [factor] = arrived
        return (None, None, None, None, None, *(factor * gradient for gradient in ctx.saved_tensors))


def _softened(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return (
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
    )


def _mean(each: Tensor, temperature: float, weights: Tensor | None) -> Tensor:
    rows = each.sum(dim=-1)
    return (rows if weights is None else rows * weights).mean() * temperature**2
