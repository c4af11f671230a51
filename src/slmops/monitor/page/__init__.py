"""The report of ``slmops monitor report``: what :mod:`slmops.monitor.summary` tells, for people.

Guarantees: one page that stands alone (no script, no font, no address outside it), readable on paper, on a phone and in
the dark; equal contents give equal pages; every text is escaped; what is not known is a dash, never a zero.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

MISSING = "–"
WIDTH, HEIGHT = 480.0, 150.0
LEFT, RIGHT, TOP, BOTTOM = 44.0, 8.0, 8.0, 22.0
NAMES: Mapping[str, str] = {
    "requests": "requests",
    "error_share": "errors",
    "latency_ms_p50": "p50",
    "latency_ms_p95": "p95",
    "latency_ms_p99": "p99",
    "first_ms_p95": "first text, p95",
    "prompt_tokens": "tokens read",
    "completion_tokens": "tokens written",
    "confidence_mean": "confidence",
    "format_valid": "right form",
    "length_stops": "cut by length",
    "feedback_score": "feedback (0–1)",
    "corrected_share": "corrected",
    "judge_score": "judge (1–5)",
}
HISTOGRAMS: Mapping[str, str] = {
    "confidence": "Confidence",
    "novelty": "Novelty of the texts (nats a feature)",
    "input_chars": "Characters of the input",
    "output_chars": "Characters of the answer",
}
SHARES = frozenset({"error_share", "format_valid", "length_stops", "corrected_share"})


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Curve:
    """Points of a line, in pieces: nothing is drawn across what is not known."""

    name: str
    style: str
    pieces: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Plot:
    title: str
    curves: Sequence[Curve]
    bars: Sequence[tuple[float, float, float, float, str]]
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    key: Sequence[tuple[str, str]] = ()


def render_page(content: Mapping[str, Any], *, title: str, ledger: Mapping[str, Any] | None = None) -> str:
    """The page of what :func:`slmops.monitor.summary.watched` gives; with a ledger where one was made."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": moment, "figure": figure, "amount": amount}
    return environment.get_template("page.html.jinja").render(
        content=content,
        title=title,
        names={name: told for name, told in NAMES.items() if _is_known(name, content["groups"])},
        ledger=ledger,
        plots=plots(content),
        short=lambda version: version[:12] or MISSING,
    )


def _is_known(name: str, groups: Mapping[str, Mapping[str, Any]]) -> bool:
    return any(figure(one[name], name) != MISSING for one in groups.values())


# --- words ---------------------------------------------------------------------------------------------------------


def moment(seconds: float | None) -> str:
    return MISSING if seconds is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def amount(value: float | None, digits: int = 3) -> str:
    """A number as a person reads it."""
    if value is None:
        return MISSING
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.{digits}g}" if abs(value) < 100 else f"{value:,.0f}"


def figure(value: Any, name: str) -> str:
    """A figure of :mod:`slmops.monitor.quality` in its unit."""
    number = value["value"] if isinstance(value, Mapping) else value
    if number is None:
        return MISSING
    if name in SHARES:
        return f"{100 * number:.1f} %"
    return f"{amount(number)} ms" if "_ms_" in name else amount(number)


# --- plots ---------------------------------------------------------------------------------------------------------


def plots(content: Mapping[str, Any]) -> list[Plot]:
    points = content["over_time"]
    found = []
    if len(points) > 1:
        found += [_requests(points), _curves("Latency, ms", points, {"p50": "latency_ms_p50", "p95": "latency_ms_p95"})]
        if any(point["confidence"] is not None for point in points):
            found.append(_curves("Confidence over time", points, {"mean": "confidence"}, most=1.0))
    return found + [_histogram(HISTOGRAMS[name], bins) for name, bins in content["histograms"].items()]


def _x(share: float) -> float:
    return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)


def _y(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - TOP - BOTTOM), 1)


def _time_ticks(points: Sequence[Mapping[str, Any]]) -> list[Tick]:
    first, last = points[0]["at"], points[-1]["at"]
    form = "%H:%M:%S" if last - first < 600 else "%H:%M" if last - first < 2 * 86_400 else "%m-%d"
    return [
        Tick(_x(share), time.strftime(form, time.gmtime(first + share * (last - first)))) for share in (0.0, 0.5, 1.0)
    ]


def _value_ticks(most: float) -> list[Tick]:
    return [Tick(_y(share), amount(share * most, 2)) for share in (0.0, 0.5, 1.0)]


def _requests(points: Sequence[Mapping[str, Any]]) -> Plot:
    most = max(point["requests"] for point in points) or 1
    width = (WIDTH - LEFT - RIGHT) / len(points)
    bars = []
    for number, point in enumerate(points):
        left = LEFT + number * width
        for count, style in ((point["requests"], "now"), (point["errors"], "bad")):
            if count:
                top = _y(count / most)
                bars.append((round(left, 1), top, round(width * 0.85, 1), round(_y(0) - top, 1), style))
    return Plot("Requests", (), bars, _time_ticks(points), _value_ticks(most), (("answered", "now"), ("failed", "bad")))


def _curves(
    title: str, points: Sequence[Mapping[str, Any]], lines: Mapping[str, str], most: float | None = None
) -> Plot:
    values = [point[column] for point in points for column in lines.values() if point[column] is not None]
    top = most or max(values, default=1.0) or 1.0
    curves = [
        Curve(name, style, _pieces([point[column] for point in points], top))
        for (name, column), style in zip(lines.items(), ("now", "was"), strict=False)
    ]
    key = [(curve.name, curve.style) for curve in curves] if len(curves) > 1 else []
    return Plot(title, curves, (), _time_ticks(points), _value_ticks(top), key)


def _pieces(values: Sequence[float | None], top: float) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for number, value in enumerate(values):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((_x(number / max(len(values) - 1, 1)), _y(min(value / top, 1.0))))
    return [piece for piece in pieces if piece]


def _histogram(title: str, bins: Mapping[str, Sequence[float]]) -> Plot:
    edges, most = bins["edges"], max(*bins["now"], *bins["was"]) or 1.0
    span = edges[-1] - edges[0]
    bars = []
    for number, share in enumerate(bins["now"]):
        left, right = (_x((edges[number + side] - edges[0]) / span) for side in (0, 1))
        top = _y(share / most)
        bars.append((left + 0.5, top, round(right - left - 1, 1), round(_y(0) - top, 1), "now"))
    steps: list[tuple[float, float]] = []
    for number, share in enumerate(bins["was"]):
        steps += [(_x((edges[number + side] - edges[0]) / span), _y(share / most)) for side in (0, 1)]
    ticks = [Tick(_x(share), amount(edges[0] + share * span, 2)) for share in (0.0, 0.5, 1.0)]
    values = [Tick(_y(share), f"{100 * share * most:.0f} %") for share in (0.0, 0.5, 1.0)]
    return Plot(
        title, [Curve("reference", "was", [steps])], bars, ticks, values, (("now", "now"), ("reference", "was"))
    )
