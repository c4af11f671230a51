"""Losses, each a small pure function of tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100
"""Label of a row or position that has no gold answer; the value that PyTorch's cross-entropy skips."""


def softened_divergence(student_logits: Tensor, teacher_log_probabilities: Tensor, temperature: float) -> Tensor:
    """Forward KL(teacher ‖ student) at a temperature, scaled by its square so that gradients keep their size.

    Both are ``[rows, classes]``; the result is the mean over rows, a scalar. Teacher log-probabilities serve as logits:
    they differ from them by a constant in each row, which softmax does not see.
    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_log_probabilities.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def gold_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over rows with a gold label, divided by all rows of the batch.

    ``logits`` ``[rows, classes]``, ``labels`` int64 ``[rows]`` with :data:`IGNORED_LABEL` for none. Dividing by all
    rows keeps the weight of a gold row the same, however many rows without gold share its batch.
    """
    summed = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return summed / max(1, labels.numel())


def hidden_state_distance(projected_states: Tensor, teacher_states: Tensor) -> Tensor:
    """Mean squared distance between the student's projected states and the teacher's, both ``[rows, hidden]``.

    Give the teacher's standardized, so that each dimension counts the same and the result starts near 1.
    Source: Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv:1909.10351.
    """
    return F.mse_loss(projected_states.float(), teacher_states.float())
