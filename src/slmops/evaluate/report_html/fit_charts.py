"""The plot and the table of a search under a budget: every student that was tried, and those that nothing beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.evaluate.report_html import words
from slmops.evaluate.report_html.charts import LEFT, RIGHT, WIDTH, Axis, Tick, size_axis
from slmops.evaluate.report_html.figures import Report

HEIGHT = 300
MOST_ROWS = 12


@dataclass(frozen=True)
class FitDot:
    """A student in one variant. ``kind``: front or beaten; ``chosen``: what the run went on with."""

    x: float
    y: float
    kind: str
    chosen: bool
    tip: str


@dataclass(frozen=True)
class FitPlot:
    """Score over size. ``line``: the best score of at most that size; ``limit``: the size in the budget."""

    height: int
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    dots: Sequence[FitDot]
    line: Sequence[tuple[float, float]]
    limit: float | None


@dataclass(frozen=True)
class Fit:
    """``rows``: of the front and of what was chosen, the best score first, as many as a page takes."""

    plot: FitPlot
    rows: Sequence[Mapping[str, Any]]
    more: int
    passed: bool
    students: int
    left_out: Sequence[tuple[str, str]]
    timed_out: bool


def fit(report: Report) -> Fit | None:
    """None where the run had no search under a budget."""
    found = report.get("search")
    if not found or found.get("goal") != "budget":
        return None
    tried = found["candidates"]
    shown = sorted(
        (one for one in tried if one["front"] or one["id"] == found["chosen"]),
        key=lambda one: (one["id"] != found["chosen"], -one["score"]["value"], one["size_bytes"]),
    )
    return Fit(
        _plot(tried, found["chosen"], _limit_bytes(report)),
        [_row(one, found) for one in shown[:MOST_ROWS]],
        max(0, len(shown) - MOST_ROWS),
        found["passed"],
        len({one["number"] for one in tried}),
        [(_values(one["values"]), one["why"]) for one in found["left_out"]],
        found["timed_out"],
    )


def _plot(tried: Sequence[Mapping[str, Any]], chosen: str, limit_bytes: float | None) -> FitPlot:
    bottom = HEIGHT - 38
    x = size_axis([one["size_bytes"] for one in tried], LEFT, WIDTH - RIGHT)
    scores = [one["score"]["value"] for one in tried]
    pad = max(0.08 * (max(scores) - min(scores)), 0.005)
    y = Axis(max(0.0, min(scores) - pad), max(scores) + pad, bottom, 26)
    dots = [
        FitDot(
            x.at(one["size_bytes"]),
            y.at(one["score"]["value"]),
            "front" if one["front"] else "beaten",
            one["id"] == chosen,
            f"{_values(one['values'])}, {one['variant']}, {one['epochs']:g} epochs: "
            f"{words.percent(one['score']['value'])}, {words.size(one['size_bytes'])}",
        )
        for one in sorted(tried, key=lambda one: one["front"])
    ]
    stairs = _best_by_size([(one["size_bytes"], one["score"]["value"]) for one in tried])
    line = [(x.at(size), y.at(score)) for size, score in stairs]
    limit = None if limit_bytes is None or not x.low <= limit_bytes <= x.high else x.at(limit_bytes)
    return FitPlot(HEIGHT, bottom, x.ticks(words.size), y.ticks(lambda value: f"{100 * value:g}"), dots, line, limit)


def _best_by_size(found: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the stairs: size and the best score of at most that size."""
    corners: list[tuple[float, float]] = []
    for size, score in sorted(found, key=lambda pair: (pair[0], -pair[1])):
        if not corners:
            corners.append((size, score))
        elif score > corners[-1][1]:
            corners += [(size, corners[-1][1]), (size, score)]
    return corners


def _row(one: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    if one["id"] == found["leader"]:
        behind = "best score"
    else:
        points = 100 * one["behind_leader"]["difference"]
        behind = f"{points:+.1f} points" + (", within noise" if one["within_noise_of_leader"] else "")
    return {
        **one,
        "values": _values(one["values"]),
        "chosen": one["id"] == found["chosen"],
        "behind": behind,
        "misses": ", ".join(one["failed_gates"]) or "passes",
    }


def _values(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {'null' if value is None else value}" for key, value in values.items())


def _limit_bytes(report: Report) -> float | None:
    limits = [gate["limit"] for gate in report["gates"] if gate["name"] == "size_mb"]
    return 1e6 * limits[0] if limits else None
