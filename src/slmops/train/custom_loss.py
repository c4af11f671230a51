"""A loss of the user's own: a function in a file beside the recipe, or one passed in Python.

``loss(logits, targets)`` or ``loss(logits, targets, batch)``. For open tasks ``logits`` are ``[learnt tokens,
vocabulary]`` and ``targets`` int64 ``[learnt tokens]``; for closed label sets ``[rows, labels]`` and ``[rows]``. It
gives the mean over them, as a tensor with one value. The file is run as it is: it is the user's own code, like the
recipe.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slmops.errors import ModelError, RecipeError
from slmops.plugins import load_function

LossFunction = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""Always called with three arguments; :func:`adapt_signature` makes it so."""


def load_loss(reference: str) -> LossFunction:
    """The function that ``reference`` (``path/to/file.py:function``) names.

    Raises:
        RecipeError: no such file or function, or the file cannot be run.
    """
    return adapt_signature(load_function(reference, key="train.loss"))


def adapt_signature(function: Callable[..., Any]) -> LossFunction:
    """``function`` as one of three arguments, whether it wants the batch or not.

    Raises:
        RecipeError: it takes neither two nor three arguments.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return function
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters) or len(needed) >= 3:
        return function
    if len(needed) == 2:
        return lambda logits, targets, _batch: function(logits, targets)
    name = getattr(function, "__name__", "the loss")
    raise RecipeError(
        f"{name} takes {len(needed)} arguments.", remedy="Give it two or three: logits, targets, and perhaps batch."
    )


def check_loss(loss: Any, name: str) -> None:
    """What a loss gave for the first batch, before training starts.

    Raises:
        ModelError: not a tensor, not one value, not a number, or without a way back to the weights.
    """
    if not isinstance(loss, Tensor):
        raise ModelError(f"{name} returned a {type(loss).__name__}.", remedy="Return a torch tensor with one value.")
    if loss.numel() != 1 or loss.ndim > 1:
        raise ModelError(
            f"{name} returned a tensor of shape {list(loss.shape)}.", remedy="Return one value: take the mean."
        )
    if not math.isfinite(loss.item()):
        raise ModelError(f"{name} returned {loss.item()} for the first batch.", remedy="Look for log(0) or 0/0 in it.")
    if not loss.requires_grad or not torch.is_grad_enabled():
        raise ModelError(
            f"{name} returned a value that does not depend on the logits: nothing could be learnt.",
            remedy="Compute it from the logits, without .item(), .detach() or argmax.",
        )
