"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded one after the other, and what each loses is made up
for by the columns that are still to come, so that the products with the calibration rows change least.

Columns go in the order of how much goes through them (``act_order``), each block keeping its own columns and scale.
Scales are found before (:func:`slmops.compress.quantize.rounding.k_quant`). onnxruntime's own GPTQ gives the matrix
back in fp32 and rounds it once more, to scales that it did not use; it also has neither half-precision scales nor a
symmetric grid that its kernels share.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slmops.compress.quantize.rounding import importance_of, k_quant
from slmops.models.grid import Grid, Quantized

DAMPING = 0.01
"""Added to the diagonal, as a share of its mean."""
COLUMNS_AT_ONCE = 128
"""Later columns hear of an error after so many columns; the result is the same."""


def gptq(matrix: Tensor, gram: Tensor, grid: Grid, *, damping: float = DAMPING) -> Quantized:
    """``matrix`` ``[rows, width]`` on a grid. ``gram``: ``XᵀX`` of its inputs ``[tokens, width]``.

    Inputs through which nothing went are rounded to the nearest code.
    """
    start = k_quant(matrix, grid, importance_of(gram))
    order = gram.diagonal().argsort(descending=True)
    upper = _inverse_root(gram[order][:, order], damping)
    weights = matrix.float()[:, order].clone()
    codes = torch.empty_like(weights)
    block_of = order // grid.block_size
    scales, zeros = start.scales[:, block_of], start.zeros.float()[:, block_of]
    width = weights.shape[1]
    for first in range(0, width, COLUMNS_AT_ONCE):
        end = min(first + COLUMNS_AT_ONCE, width)
        errors = torch.zeros(len(weights), end - first)
        for column in range(first, end):
            scale, zero, weight = scales[:, column], zeros[:, column], weights[:, column]
            code = (weight / scale).round_().add_(zero).clamp_(0, grid.levels - 1)
            codes[:, column] = code
            error = (weight - (code - zero) * scale) / upper[column, column]
            weights[:, column:end] -= error[:, None] * upper[column, column:end]
            errors[:, column - first] = error
        weights[:, end:] -= errors @ upper[first:end, end:]
    found = start.codes.flatten(1).clone()
    found[:, order] = codes.to(torch.uint8)
    return Quantized(grid, found.view_as(start.codes), start.scales, start.zeros, start.width)


def _inverse_root(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular ``U`` with ``UᵀU`` the inverse of the damped ``gram``; more damping where that is needed."""
    gram = gram.double()
    diagonal = gram.diagonal()
    mean = float(diagonal.mean()) or 1.0
    while True:
        damped = gram + torch.diag(torch.full_like(diagonal, damping * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                root: Tensor = upper.float()
                return root
        damping *= 10


def output_error(matrix: Tensor, rounded: Tensor, gram: Tensor) -> float:
    """Squared change of the products with the calibration rows, summed over rows and tokens."""
    moved = rounded - matrix
    return float((moved @ gram * moved).sum())
