"""Where the dots, lines and labels of the plots lie, in units of an SVG view box :data:`WIDTH` wide. Pure.

Guarantees: labels do not overlap one another, nor dots, while there is room for it; the same report gives the same
places. Widths of texts are estimates, because no font is at hand here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slmops.evaluate.report_html import words
from slmops.evaluate.report_html.figures import Report, models

WIDTH = 480
LEFT, RIGHT = 46, 12
FONT = 11
GLYPH = 0.57 * FONT  # width of a mean letter of a system font
MOST_POINTS = 150  # of a loss curve
FAR = 1.0  # a baseline further below the models than this many of their spans is told in words, not drawn


class Tick(NamedTuple):
    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high`` on a line from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self, text: Callable[[float], str]) -> list[Tick]:
        return [Tick(self.at(value), text(value)) for value in self._round_values()]

    def _round_values(self) -> list[float]:
        if not self.log:
            return _round_steps(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            values = [step * 10.0**power for power in decades for step in steps]
            inside = [value for value in values if self.low <= value <= self.high]
            if len(inside) >= 3:
                return inside
        return inside or [self.low, self.high]


def _round_steps(low: float, high: float, most: int = 6) -> list[float]:
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def size_axis(values: Sequence[float], start: float, end: float) -> Axis:
    spread = math.log10(max(values) / min(values))
    pad = 10 ** max(0.08 * spread, 0.25)
    return Axis(min(values) / pad, max(values) * pad, start, end, log=True)


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)


@dataclass(frozen=True)
class Label:
    """Text that starts at ``x`` on the base line ``y``."""

    text: str
    x: float
    y: float


class _Labels:
    """Puts texts where least is under them."""

    def __init__(self, area: Box, taken: Sequence[Box]) -> None:
        self.area, self.taken = area, list(taken)

    def put(self, text: str, places: Iterator[tuple[float, float]]) -> Label:
        """``places``  left and middle of the text, the best first."""
        width = GLYPH * len(text)
        boxes = [Box(x, y - FONT / 2, x + width, y + FONT / 2) for x, y in places]
        best = min(boxes, key=self._cost)
        self.taken.append(best)
        return Label(text, round(best.left, 1), round(best.top + 0.85 * FONT, 1))

    def _cost(self, box: Box) -> float:
        area = (box.right - box.left) * (box.bottom - box.top)
        outside = area - box.overlap(self.area)
        return 3 * outside + sum(box.overlap(other) for other in self.taken)


@dataclass(frozen=True)
class Dot:
    """A model at ``x``, ``y`` with its interval ``low`` to ``high``. ``role``: teacher or student."""

    x: float
    y: float
    low: float
    high: float
    role: str
    shipped: bool
    label: Label
    tip: str


@dataclass(frozen=True)
class Level:
    """A score without a size: a line over the whole width."""

    y: float
    label: Label
    role: str


@dataclass(frozen=True)
class Tradeoff:
    """Score against size. ``elsewhere``: scores too far from the models for the plot's scale."""

    height: int
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    dots: Sequence[Dot]
    levels: Sequence[Level]
    elsewhere: Sequence[str]


def tradeoff(report: Report, height: int = 300) -> Tradeoff | None:
    """None where no model's size is known."""
    found = models(report)
    sized = [entry for entry in found if entry["size_bytes"]]
    if not sized:
        return None
    flat = {entry["id"]: entry for entry in found if not entry["size_bytes"]} | dict(report["baselines"])
    near, far = _near_and_far(flat, sized)
    bottom = height - 38
    x = size_axis([entry["size_bytes"] for entry in sized], LEFT, WIDTH - RIGHT)
    y = _share_axis(sized, [entry["score"]["value"] for entry in near.values()], bottom, 26)
    spots = {entry["id"]: _spot(entry, x, y) for entry in sized}
    taken = [Box(left - 6, middle - 6, left + 6, middle + 6) for left, middle, _, _ in spots.values()]
    taken += [Box(left - 2, high, left + 2, low) for left, _, low, high in spots.values()]
    taken += [Box(LEFT, y.at(value), WIDTH, y.at(value) + 1) for value in (e["score"]["value"] for e in near.values())]
    labels = _Labels(Box(LEFT + 2, 20, WIDTH - 2, bottom - 2), taken)
    levels = [
        Level(at, labels.put(name, _along(at, GLYPH * len(name))), "teacher" if name == "teacher" else "baseline")
        for name, at in ((name, y.at(entry["score"]["value"])) for name, entry in near.items())
    ]
    dots = [
        Dot(
            *spots[entry["id"]],
            role="teacher" if entry["id"].startswith("teacher") else "student",
            shipped=entry["id"] == report["student"]["id"],
            label=labels.put(entry["id"], _around(*spots[entry["id"]][:2], GLYPH * len(entry["id"]))),
            tip=f"{entry['id']}: {words.percent(entry['score']['value'])}, {words.size(entry['size_bytes'])}",
        )
        for entry in sorted(sized, key=lambda entry: entry["id"] != report["student"]["id"])
    ]
    decimals = 0 if y.high - y.low > 0.05 else 1
    return Tradeoff(
        height,
        bottom,
        x.ticks(words.size),
        y.ticks(lambda value: f"{100 * value:.{decimals}f}"),
        dots,
        levels,
        [f"{name} {words.percent(entry['score']['value'])}" for name, entry in far.items()],
    )


def _near_and_far(
    flat: Mapping[str, Mapping[str, Any]], sized: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Mapping[str, Any]], dict[str, Mapping[str, Any]]]:
    """A guess that is right in 2 % of the rows must not press all models into one corner of the plot."""
    lowest = min(entry["score"]["ci95"][0] for entry in sized)
    highest = max(entry["score"]["ci95"][1] for entry in sized)
    margin = FAR * max(0.03, highest - lowest)
    near = {
        name: entry for name, entry in flat.items() if entry["score"]["value"] >= lowest - margin or name == "teacher"
    }
    return near, {name: entry for name, entry in flat.items() if name not in near}


def _share_axis(sized: Sequence[Mapping[str, Any]], others: Sequence[float], start: float, end: float) -> Axis:
    values = [*others, *(value for entry in sized for value in (entry["score"]["value"], *entry["score"]["ci95"]))]
    low, high = min(values), max(values)
    pad = max(0.08 * (high - low), 0.005)
    return Axis(max(0.0, low - pad), high + pad, start, end)


def _spot(entry: Mapping[str, Any], x: Axis, y: Axis) -> tuple[float, float, float, float]:
    score = entry["score"]
    return x.at(entry["size_bytes"]), y.at(score["value"]), y.at(score["ci95"][0]), y.at(score["ci95"][1])


def _along(y: float, width: float) -> Iterator[tuple[float, float]]:
    """Above or below a line, from its right end to its left."""
    steps = range(8)
    for step, side in itertools.product(steps, (-1, 1)):
        yield WIDTH - RIGHT - width - step * (WIDTH - RIGHT - LEFT - width - 4) / 7, y + side * (FONT / 2 + 2)


def _around(x: float, y: float, width: float) -> Iterator[tuple[float, float]]:
    """Beside a dot, then above and below, then further off."""
    for gap in (9, 18, 30):
        yield from ((x + gap, y), (x - gap - width, y))
        for rise in (-gap - 2, gap + 2):
            yield from ((x + 6, y + rise), (x - 6 - width, y + rise), (x - width / 2, y + rise))


@dataclass(frozen=True)
class Span:
    """One model's single requests: half of them end by ``p50``, 95 % by ``p95``."""

    y: float
    name: str
    p50: float
    p95: float
    role: str
    shipped: bool
    text: str


@dataclass(frozen=True)
class Latency:
    height: int
    left: float
    bottom: float
    ticks: Sequence[Tick]
    spans: Sequence[Span]


def latency(report: Report) -> Latency | None:
    """None where nothing was measured."""
    measured = [entry for entry in models(report) if entry["latency_ms"]["p50"] and entry["latency_ms"]["p95"]]
    if not measured:
        return None
    left = 14 + GLYPH * max(len(entry["id"]) for entry in measured)
    both = [entry["latency_ms"][key] for entry in measured for key in ("p50", "p95")]
    x = size_axis(both, left, WIDTH - RIGHT)
    step = 34
    spans = [
        Span(
            y=30 + index * step,
            name=entry["id"],
            p50=x.at(entry["latency_ms"]["p50"]),
            p95=x.at(entry["latency_ms"]["p95"]),
            role="teacher" if entry["id"].startswith("teacher") else "student",
            shipped=entry["id"] == report["student"]["id"],
            text=f"{words.significant(entry['latency_ms']['p50'])} / {words.significant(entry['latency_ms']['p95'])}",
        )
        for index, entry in enumerate(measured)
    ]
    bottom = 18 + len(spans) * step
    return Latency(bottom + 38, left, bottom, x.ticks(lambda value: f"{value:g}"), spans)


@dataclass(frozen=True)
class Losses:
    """One model’s training: loss by optimizer step, as places in the plot. ``best`` is a phrase, or empty."""

    who: str
    height: int
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    training: Sequence[tuple[float, float]]
    validation: Sequence[tuple[float, float]]
    steps: int
    best: str


def losses(report: Report, height: int = 230) -> list[Losses]:
    """A plot for each model with a history, the student first."""
    history = report.get("history") or {}
    found = (_losses(who, history[who], height) for who in ("student", "teacher") if history.get(who))
    return [plot for plot in found if plot is not None]


def _losses(who: str, history: Sequence[Mapping[str, float]], height: int) -> Losses | None:
    training = _thinned([(entry["step"], entry["loss"]) for entry in history if entry.get("loss") is not None])
    validation = [
        (entry["step"], entry["validation_loss"]) for entry in history if entry.get("validation_loss") is not None
    ]
    both = training + validation
    if not both:
        return None
    bottom = height - 38
    values = [value for _, value in both]
    pad = max(0.06 * (max(values) - min(values)), 1e-3)
    x = Axis(0, max(step for step, _ in both) or 1, LEFT, WIDTH - RIGHT - 10)
    y = Axis(max(0.0, min(values) - pad), max(values) + pad, bottom, 26)
    return Losses(
        who,
        height,
        bottom,
        x.ticks(lambda value: f"{value:,.0f}" if value == int(value) else ""),
        y.ticks(lambda value: f"{value:g}"),
        [(x.at(step), y.at(value)) for step, value in training],
        [(x.at(step), y.at(value)) for step, value in validation],
        int(max(step for step, _ in both)),
        _best(history),
    )


def _best(history: Sequence[Mapping[str, float]]) -> str:
    found = [entry for entry in history if entry.get("validation_accuracy") is not None]
    if not found:
        return ""
    best = max(found, key=lambda entry: entry["validation_accuracy"])
    return f"best validation accuracy {words.percent(best['validation_accuracy'])} at step {best['step']:,.0f}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most :data:`MOST_POINTS`: means of runs of points, so that no spike is picked or lost by chance."""
    run = math.ceil(len(points) / MOST_POINTS) or 1
    chunks = (points[start : start + run] for start in range(0, len(points), run))
    return [(sum(s for s, _ in chunk) / len(chunk), sum(v for _, v in chunk) / len(chunk)) for chunk in chunks]
