"""Training that leaves zeros where they are."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

LEAST_SHARE = 0.05
"""A matrix with fewer zeros than this was not made sparse."""


def keep_zeros(model: nn.Module) -> int:
    """Weights of matrices that are exactly zero get no gradient from now on; how many they are.

    Without a gradient Adam does not move a weight, and decay makes nothing of zero. Matrices with hardly any zeros are
    trained whole.
    """
    kept = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            zeros = module.weight == 0
            count = int(zeros.sum())
            if count >= LEAST_SHARE * zeros.numel():
                module.weight.register_hook(partial(_without, zeros))  # type: ignore[no-untyped-call]
                kept += count
    return kept


def _without(zeros: Tensor, gradient: Tensor) -> Tensor:
    return gradient.masked_fill(zeros, 0.0)
