"""How much goes where: the recipe's shares, or a share of all parameters, as sizes that a model can have.

Pure: numbers in, numbers out. What is best among several sizes of the same number of parameters is for the caller to
measure (:mod:`slmops.compress.prune.shape`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from slmops.compress.prune.width import legal_heads, rounded, step_of
from slmops.errors import UsageError
from slmops.models.cut import Sizes
from slmops.recipe import PruneConfig

HIDDEN_SHARES = (0.0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
HEAD_SHARES = (0.0, 1 / 3, 1 / 2, 2 / 3)
DEPTH_SHARES = (0.0, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
LEAST_CHANNEL_SHARE = 1 / 8
"""Of the channels, fewer than this are not tried: a layer without a feed-forward is another kind of layer."""


@dataclass(frozen=True)
class Plan:
    """Sizes after pruning; ``queries`` each group keeps."""

    layers: int
    groups: int
    queries: int
    channels: int
    hidden: int

    @classmethod
    def whole(cls, sizes: Sizes) -> Plan:
        return cls(sizes.layers, sizes.groups, sizes.heads // sizes.groups, sizes.channels, sizes.hidden)

    def sizes(self, before: Sizes) -> Sizes:
        return replace(
            before,
            layers=self.layers,
            groups=self.groups,
            heads=self.groups * self.queries,
            channels=self.channels,
            hidden=self.hidden,
        )


def plan_by_shares(sizes: Sizes, config: PruneConfig) -> Plan:
    """The sizes that ``depth``, ``heads``, ``channels`` and ``hidden`` of the recipe leave, each at the nearest that is
    legal.

    Raises:
        UsageError: no layer would be left.
    """
    layers = round((1 - config.depth) * sizes.layers)
    if layers < 1:
        raise UsageError(
            f"compress.prune.depth is {config.depth:g}, which leaves none of the {sizes.layers} layers.",
            remedy=f"At most {(sizes.layers - 1) / sizes.layers:.2f} can go.",
        )
    groups, queries = legal_heads(sizes, config.heads, hidden_stays=config.hidden == 0)
    hidden = rounded(sizes.hidden, config.hidden, of=groups * queries)
    return Plan(layers, groups, queries, rounded(sizes.channels, config.channels), hidden)


def plans_by_parameters(sizes: Sizes, share: float, by: str, *, tied: bool) -> list[Plan]:
    """Sizes that leave ``1 - share`` of the parameters, within a step. ``by``: depth, width or both.

    Raises:
        UsageError: so much cannot go that way.
    """
    allowed = (1 - share) * sizes.parameters(tied=tied)
    if by == "depth":
        found = [_by_depth(sizes, allowed, tied=tied)]
    else:
        depths = DEPTH_SHARES if by == "both" else (0.0,)
        found = [
            plan
            for depth in depths
            for plan in _by_width(replace(sizes, layers=max(1, round((1 - depth) * sizes.layers))), allowed, tied=tied)
        ]
    possible = [plan for plan in dict.fromkeys(found) if plan is not None]
    if not possible:
        raise UsageError(
            f"compress.prune.parameters is {share:g}, and so much cannot be removed by {by}: the embeddings alone are "
            f"{sizes.tokens * sizes.hidden / sizes.parameters(tied=tied):.0%} of the model.",
            remedy="Set compress.prune.vocabulary: trim, by: both, or remove less.",
        )
    return possible


def _by_depth(sizes: Sizes, allowed: float, *, tied: bool) -> Plan | None:
    """As many layers as are nearest to ``allowed``; None where not even one is."""
    fixed = replace(sizes, layers=0).parameters(tied=tied)
    layers = round((allowed - fixed) / sizes.layer_parameters())
    return replace(Plan.whole(sizes), layers=layers) if layers >= 1 else None


def _by_width(sizes: Sizes, allowed: float, *, tied: bool) -> Iterator[Plan]:
    """For every hidden size and number of heads, the channels that fill ``allowed``."""
    for hidden_share, head_share in itertools.product(HIDDEN_SHARES, HEAD_SHARES):
        groups, queries = legal_heads(sizes, head_share, hidden_stays=hidden_share == 0)
        hidden = rounded(sizes.hidden, hidden_share, of=groups * queries)
        plan = Plan(sizes.layers, groups, queries, 0, hidden)
        without = plan.sizes(sizes).parameters(tied=tied)
        room = (allowed - without) / (3 * hidden * sizes.layers)
        step = step_of(sizes.channels)
        channels = min(sizes.channels, step * round(room / step))
        full = replace(plan, channels=channels)
        near = abs(full.sizes(sizes).parameters(tied=tied) - allowed) <= 1.5 * step * hidden * sizes.layers * 3
        if channels >= max(1, LEAST_CHANNEL_SHARE * sizes.channels) and near:
            yield full
