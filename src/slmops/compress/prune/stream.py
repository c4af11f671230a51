"""A model layer by layer over calibration batches: what goes into each layer, and what comes out without some.

The other arguments of each layer (masks, positions) are those that the model itself gave it, so a layer computes here
what it computes there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slmops.compress.prune.calibration import CalibrationBatch
from slmops.compress.prune.subject import Subject

States = list[Tensor]
"""Hidden states, one ``[rows, tokens, hidden]`` a batch."""


class Stream:
    """``first``: the states in front of the first layer."""

    def __init__(self, subject: Subject, batches: Sequence[CalibrationBatch]) -> None:
        self.subject, self.batches = subject, list(batches)
        self.first: States = []
        self._arguments: list[list[dict[str, Any]]] = []
        for batch in self.batches:
            self._record(batch)

    def through(self, states: States, layers: Sequence[int]) -> States:
        """``states`` behind ``layers``, one after the other."""
        for number in layers:
            states = self.step(states, number)
        return states

    def step(self, states: States, number: int) -> States:
        """``states`` behind layer ``number``."""
        layer = self.subject.layers[number]
        with torch.no_grad():
            return [
                _states_of(layer(one, **arguments[number]))
                for one, arguments in zip(states, self._arguments, strict=True)
            ]

    def says(self, states: States) -> list[Tensor]:
        """Log-probabilities of each batch, from the states behind the last layer."""
        with torch.no_grad():
            return [self.subject.log_probabilities(one, batch) for one, batch in zip(states, self.batches, strict=True)]

    def answers(self) -> list[Tensor]:
        """What the whole model says."""
        return self.says(self.through(self.first, range(len(self.subject.layers))))

    def _record(self, batch: CalibrationBatch) -> None:
        arguments: list[dict[str, Any]] = []

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            if not arguments:
                self.first.append(given[0].detach())
            arguments.append(named)

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self.subject.layers]
        try:
            with torch.no_grad():
                self.subject.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        self._arguments.append(arguments)


def divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean Kullback-Leibler divergence, nats: how far ``after`` is from ``before`` (log-probabilities)."""
    total, count = 0.0, 0
    for one, other in zip(before, after, strict=True):
        total += float((one.exp() * (one - other)).sum())
        count += len(one)
    return max(0.0, total / max(1, count))


@contextmanager
def inputs_of(modules: Sequence[nn.Module], seen: list[Tensor]) -> Iterator[None]:
    """Within, ``seen`` gets the input of each of ``modules`` when it is called."""

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        seen.append(given[0].detach())

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states_of(result: Any) -> Tensor:
    states: Tensor = result[0] if isinstance(result, tuple) else result
    return states
