"""Which layers to remove: those without which the model says most nearly the same.

``divergence``: layers go one by one, each time the one whose removal moves what is left least (mean KL at the
calibration rows from the whole model), so that two layers that stand in for one another do not both go. The first round
tries every layer, later ones the :data:`POOL` that cost least when they were last tried; only what comes behind a layer
is computed again. Removing by the loss: Kim et al., "Shortened LLaMA", arXiv:2402.02834.

``influence``: 1 - cosine between what goes into a layer and what comes out, over tokens, all measured once:
Men et al., "ShortGPT", arXiv:2403.03853. Faster, and blind to what the answer needs.

``evenly``: every k-th, by number alone: what the others have to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from slmops.compress.prune.calibration import CalibrationBatch
from slmops.compress.prune.stream import States, Stream, divergence
from slmops.models.cut import evenly_spread
from slmops.progress import Progress, ProgressSink, ignore

TASK = "prune layers"
POOL = 8


def by_divergence(stream: Stream, count: int, *, progress: ProgressSink = ignore) -> tuple[list[int], list[float]]:
    """``count`` layers in the order in which they go, and how far the model is from the whole one after each, nats."""
    left = list(range(len(stream.subject.layers)))
    whole = stream.answers()
    before = _before_each(stream, stream.first, left)
    gone: list[int] = []
    moved: list[float] = []
    costs: dict[int, float] = {}
    for _ in range(count):
        for layer in sorted(left, key=lambda one: costs.get(one, 0.0))[: POOL if costs else None]:
            states = stream.through(before[left.index(layer)], left[left.index(layer) + 1 :])
            costs[layer] = divergence(whole, stream.says(states))
        cheapest = min(left, key=costs.__getitem__)
        place = left.index(cheapest)
        left.remove(cheapest)
        gone.append(cheapest)
        moved.append(costs[cheapest])
        before = [*before[:place], *_before_each(stream, before[place], left[place:])]
        progress(Progress(TASK, len(gone), count, "layers", f"KL {moved[-1]:.3g}"))
    return gone, moved


def by_influence(stream: Stream) -> list[float]:
    """The influence of each layer; the lower, the less it changes what goes through it."""
    found, states = [], stream.first
    for number in range(len(stream.subject.layers)):
        after = stream.step(states, number)
        found.append(_block_influence(states, after, stream.batches))
        states = after
    return found


def least(values: Sequence[float], count: int) -> list[int]:
    """The numbers of the ``count`` lowest values, lowest first."""
    return sorted(range(len(values)), key=lambda number: (values[number], number))[:count]


def all_but_every_kth(layers: int, count: int) -> list[int]:
    """``count`` layers to remove so that those that stay are spread evenly."""
    kept = set(evenly_spread(layers - count, layers))
    return [number for number in range(layers) if number not in kept]


def _before_each(stream: Stream, states: States, layers: Sequence[int]) -> list[States]:
    """The states in front of each of ``layers``."""
    found = [states]
    for number in layers[:-1]:
        found.append(stream.step(found[-1], number))
    return found if layers else []


def _block_influence(before: States, after: States, batches: Sequence[CalibrationBatch]) -> float:
    cosines = [_cosines(one, other, batch) for one, other, batch in zip(before, after, batches, strict=True)]
    return 1 - float(torch.cat(cosines).mean())


def _cosines(before: Tensor, after: Tensor, batch: CalibrationBatch) -> Tensor:
    real = batch.attention_mask.bool()
    return cosine_similarity(before[real], after[real], dim=-1)
