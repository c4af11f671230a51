"""Which heads, channels and hidden dimensions to remove, by what they do on calibration rows.

After Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron),
arXiv:2407.14679: no gradients, one pass over a few rows.

* a channel of the feed-forward counts by the size of its activation, times that of the column which carries it on;
* a head of queries by what it adds in the same way; of grouped heads whole groups stay, each with equally many queries;
* a hidden dimension by the size of its activation behind the norms, over all layers.

The norms divide by the root mean square over all dimensions, which is another number over those that stay. Their
weights are therefore multiplied by the ratio of both on the calibration rows (:func:`rescaled_norms`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slmops.compress.prune.calibration import CalibrationBatch
from slmops.compress.prune.subject import Subject
from slmops.models.cut import CENTRED, Cut, Sizes

LARGEST_STEP = 32


@dataclass(frozen=True)
class Activity:
    """Mean squares over the calibration tokens.

    ``channels``     of each layer, ``[channels]``: in front of the feed-forward's last matrix
    ``heads``        of each layer, ``[heads x head size]``: in front of the attention's last matrix
    ``norms_in``     of each norm by its name, ``[hidden]``: in front of it
    ``norms_out``    the same behind it
    """

    channels: list[Tensor]
    heads: list[Tensor]
    norms_in: dict[str, Tensor]
    norms_out: dict[str, Tensor]


def measure_activity(subject: Subject, batches: Sequence[CalibrationBatch]) -> Activity:
    """One pass of the model over ``batches``."""
    sums: dict[str, Tensor] = {}
    real = torch.zeros(0, dtype=torch.bool)

    def add(name: str, values: Tensor) -> None:
        squares = values[real].double().square().sum(dim=0)
        sums[name] = sums[name] + squares if name in sums else squares

    def entering(name: str) -> Any:
        return lambda _, given: add(name, given[0].detach())

    def leaving(name: str) -> Any:
        return lambda _, __, result: add(name, result.detach())

    handles = []
    for number in range(len(subject.layers)):
        for name in ("down_proj", "o_proj"):
            part = subject.part(number, name)
            if part is not None:
                handles.append(part.register_forward_pre_hook(entering(f"{name} {number}")))
    names = [name for name, _ in subject.norms()]
    for name, norm in subject.norms():
        handles.append(norm.register_forward_pre_hook(entering(f"in {name}")))
        handles.append(norm.register_forward_hook(leaving(f"out {name}")))
    try:
        with torch.no_grad():
            for batch in batches:
                real = batch.attention_mask.bool()
                subject.body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(batch.tokens for batch in batches)
    means = {name: (total / tokens).float() for name, total in sums.items()}
    layers = range(len(subject.layers))
    return Activity(
        [means[f"down_proj {number}"] for number in layers],
        [means[f"o_proj {number}"] for number in layers],
        {name: means[f"in {name}"] for name in names},
        {name: means[f"out {name}"] for name in names},
    )


def channel_importance(subject: Subject, activity: Activity) -> list[Tensor]:
    """Of each layer ``[channels]``."""
    return [_carried(subject.part(number, "down_proj"), squares) for number, squares in enumerate(activity.channels)]


def head_importance(subject: Subject, activity: Activity) -> list[Tensor]:
    """Of each layer ``[heads]``."""
    sizes = subject.sizes
    found = []
    for number, squares in enumerate(activity.heads):
        each = _carried(subject.part(number, "o_proj"), squares).square()
        found.append(each.view(sizes.heads, sizes.head_size).sum(dim=-1).sqrt())
    return found


def hidden_importance(activity: Activity) -> Tensor:
    """``[hidden]``: the norms' outputs, each norm counting the same."""
    return torch.stack(
        [squares.sqrt() / squares.sum().sqrt().clamp(min=1e-12) for squares in activity.norms_out.values()]
    ).sum(dim=0)


def legal_heads(sizes: Sizes, share: float, *, hidden_stays: bool = True) -> tuple[int, int]:
    """Groups, and queries of each group, that are nearest to what is left when ``share`` of the heads go.

    Every group has equally many queries, or attention has no shape. Of two that are equally near, the one with more
    groups: keys and values are what a group adds. Where the hidden size stays (else it follows the heads), heads divide
    it if they did: some families take no other configuration.
    """
    wanted = (1 - share) * sizes.heads
    each = sizes.heads // sizes.groups
    legal = [
        (groups, queries)
        for groups in range(1, sizes.groups + 1)
        for queries in range(1, each + 1)
        if not hidden_stays or sizes.hidden % sizes.heads or sizes.hidden % (groups * queries) == 0
    ]
    return min(legal, key=lambda pair: (abs(pair[0] * pair[1] - wanted), -pair[0]))


def best_heads(importance: Tensor, sizes: Sizes, groups: int, queries: int) -> tuple[int, ...]:
    """The heads of one layer that stay: the ``queries`` best of each group, and of these the ``groups`` best groups."""
    by_group = importance.view(sizes.groups, -1)
    best = by_group.topk(queries, dim=-1)
    chosen = sorted(best.values.square().sum(dim=-1).topk(groups).indices.tolist())
    each = by_group.shape[1]
    return tuple(group * each + head for group in chosen for head in sorted(best.indices[group].tolist()))


def best(importance: Tensor, count: int) -> tuple[int, ...]:
    """The numbers of the ``count`` highest, in their order."""
    return tuple(sorted(importance.topk(count).indices.tolist()))


def step_of(size: int, *, of: int = 1) -> int:
    """The multiples that ``size`` is cut to: always of ``of``, and of 32 where it has eight of it, else of fewer.

    Kernels work in blocks, and four-bit weights share their scales by 32.
    """
    step = LARGEST_STEP
    while step > 1 and size < 8 * math.lcm(step, of):
        step //= 2
    return math.lcm(step, of)


def rounded(size: int, share: float, *, of: int = 1) -> int:
    """What is left of ``size`` when ``share`` goes, at the nearest multiple; all of it where nothing goes."""
    if share == 0:
        return size
    step = step_of(size, of=of)
    return min(size, max(step, step * round((1 - share) * size / step)))


def rescaled_norms(
    weights: Mapping[str, Tensor], prefix: str, cut: Cut, activity: Activity, family: str
) -> dict[str, Tensor]:
    """``weights`` of the cut model with its norms' weights corrected for the hidden dimensions that went.

    ``prefix``: of the body's names in ``weights``; ``activity``: of the model before, its layers counted as there. In
    :data:`CENTRED` families the embeddings grow with the root of the hidden size, so what the layers add to them is
    made smaller by as much.
    """
    if cut.hidden is None:
        return dict(weights)
    kept = list(cut.hidden)
    first = next(iter(activity.norms_in.values()))
    grown = (len(kept) / len(first)) ** 0.5
    place = None if cut.layers is None else {old: new for new, old in enumerate(cut.layers)}
    found = dict(weights)
    for name, squares in activity.norms_in.items():
        target = _renamed(name, place)
        if target is None:
            continue
        factor = float((squares[kept].mean() / squares.mean().clamp(min=1e-30)).sqrt())
        if family in CENTRED and name.rsplit(".", 1)[-1] in ("post_attention_layernorm", "post_feedforward_layernorm"):
            factor *= grown
        key = f"{prefix}{target}.weight"
        one = 1.0 if family in CENTRED else 0.0
        found[key] = (found[key] + one) * factor - one
    return found


def _renamed(name: str, place: Mapping[int, int] | None) -> str | None:
    parts = name.split(".")
    if place is None or parts[0] != "layers":
        return name
    new = place.get(int(parts[1]))
    return None if new is None else ".".join(["layers", str(new), *parts[2:]])


def _carried(part: nn.Linear | None, squares: Tensor) -> Tensor:
    """Size of each input of ``part``, times the length of its column."""
    assert part is not None
    carried: Tensor = squares.sqrt() * part.weight.detach().norm(dim=0)
    return carried
