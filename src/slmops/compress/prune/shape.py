"""From sizes to the very layers, heads, channels and dimensions; of several sizes, the one that moves the model least.

The measure is the divergence from the whole model on calibration rows, before any training. Training changes the order
among neighbours; it is not tried for each, which would take as long as all trainings together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.compress.prune import depth as depths
from slmops.compress.prune.calibration import CalibrationBatch, first_tokens
from slmops.compress.prune.plan import Plan, plan_by_shares, plans_by_parameters
from slmops.compress.prune.stream import Stream, divergence
from slmops.compress.prune.subject import Subject
from slmops.compress.prune.width import (
    best,
    best_heads,
    channel_importance,
    head_importance,
    hidden_importance,
    measure_activity,
    rescaled_norms,
)
from slmops.models.cut import Cut
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import PruneConfig

DEPTH_TOKENS = 1024
"""Many layers are tried in every round, so few tokens have to do."""
TASK = "prune"


@dataclass
class Shaped:
    """``divergence``: of the smaller model from the whole one on the calibration rows, nats. ``gone``: the layers that
    were removed, in that order; ``tried``: sizes and divergences of all that were."""

    subject: Subject
    divergence: float
    gone: list[int]
    tried: list[dict[str, Any]] = field(default_factory=list)


def shaped(
    subject: Subject, batches: Sequence[CalibrationBatch], config: PruneConfig, *, progress: ProgressSink = ignore
) -> Shaped:
    """``subject`` at the sizes of ``config``; itself where these are its own.

    Raises:
        UsageError: such sizes are not possible.
    """
    plans = wanted_plans(subject, config)
    whole = Plan.whole(subject.sizes)
    if plans == [whole]:
        return Shaped(subject, 0.0, [])
    most = max(subject.sizes.layers - plan.layers for plan in plans)
    order = removal_order(subject, batches, most, config.depth_by, progress=progress) if most else []
    said = Stream(subject, batches).answers()
    chosen: Shaped | None = None
    tried: list[dict[str, Any]] = []
    for layers in sorted({plan.layers for plan in plans}, reverse=True):
        gone = order[: subject.sizes.layers - layers]
        if config.depth_by == "evenly":
            gone = depths.all_but_every_kth(subject.sizes.layers, subject.sizes.layers - layers)
        shorter = _without_layers(subject, gone)
        narrow = _Narrower(shorter, batches)
        for plan in (plan for plan in plans if plan.layers == layers):
            smaller = narrow.at(plan)
            moved = divergence(said, Stream(smaller, batches).answers())
            tried.append({**_told(plan), "divergence": moved})
            if chosen is None or moved < chosen.divergence:
                chosen = Shaped(smaller, moved, gone)
            progress(Progress(TASK, len(tried), len(plans), "sizes", f"KL {chosen.divergence:.3g}"))
    assert chosen is not None
    chosen.tried = tried
    return chosen


def wanted_plans(subject: Subject, config: PruneConfig) -> list[Plan]:
    """What the recipe allows."""
    if config.parameters:
        return plans_by_parameters(subject.sizes, config.parameters, config.by, tied=subject.tied)
    return [plan_by_shares(subject.sizes, config)]


def removal_order(
    subject: Subject,
    batches: Sequence[CalibrationBatch],
    count: int,
    how: str,
    *,
    progress: ProgressSink = ignore,
) -> list[int]:
    """``count`` layers, the one to go first first. ``evenly`` has no order: see :func:`all_but_every_kth`."""
    if how == "evenly":
        return []
    if how == "influence":
        return depths.least(depths.by_influence(Stream(subject, batches)), count)
    stream = Stream(subject, first_tokens(batches, DEPTH_TOKENS))
    return depths.by_divergence(stream, count, progress=progress)[0]


def _without_layers(subject: Subject, gone: Sequence[int]) -> Subject:
    if not gone:
        return subject
    return subject.cut(Cut(layers=tuple(n for n in range(subject.sizes.layers) if n not in gone)))


class _Narrower:
    """One depth at several widths: what its parts do is measured once."""

    def __init__(self, subject: Subject, batches: Sequence[CalibrationBatch]) -> None:
        self.subject, self.batches = subject, batches
        self._measured: Any = None

    def at(self, plan: Plan) -> Subject:
        subject, sizes = self.subject, self.subject.sizes
        whole = Plan.whole(sizes)
        if plan == whole:
            return subject
        if self._measured is None:
            self._measured = measure_activity(subject, self.batches)
        activity = self._measured
        heads = channels = hidden = None
        if (plan.groups, plan.queries) != (whole.groups, whole.queries):
            importance = head_importance(subject, activity)
            heads = tuple(best_heads(one, sizes, plan.groups, plan.queries) for one in importance)
        if plan.channels != whole.channels:
            channels = tuple(best(one, plan.channels) for one in channel_importance(subject, activity))
        if plan.hidden != whole.hidden:
            hidden = best(hidden_importance(activity), plan.hidden)
        cut = Cut(heads=heads, channels=channels, hidden=hidden)
        smaller = subject.cut(cut)
        if hidden is not None:
            prefix = "model." if subject.labels is None else "backbone."
            family = str(subject.config["model_type"])
            smaller.model.load_state_dict(
                rescaled_norms(smaller.model.state_dict(), prefix, cut, activity, family), strict=True
            )
        return smaller


def _told(plan: Plan) -> dict[str, int]:
    return {
        "layers": plan.layers,
        "heads": plan.groups * plan.queries,
        "groups": plan.groups,
        "channels": plan.channels,
        "hidden": plan.hidden,
    }
