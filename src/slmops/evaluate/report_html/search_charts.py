"""The plots of a search: loss by trial, what it depends on, and loss by the value of each key. Pure, as charts.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.evaluate.report_html.charts import LEFT, RIGHT, WIDTH, Axis, Tick
from slmops.evaluate.report_html.figures import Report

HISTORY_HEIGHT = 230
SLICE_HEIGHT = 200
FAR = 4.0  # losses further above the best than this many times the median's distance are drawn at the upper edge


@dataclass(frozen=True)
class TrialDot:
    """``state``: complete, pruned or failed (those are not drawn); ``best``: the one that was chosen."""

    x: float
    y: float
    state: str
    best: bool
    tip: str


@dataclass(frozen=True)
class TrialPlot:
    """Dots over one axis; ``line``: the best loss so far, for the history."""

    title: str
    height: int
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    dots: Sequence[TrialDot]
    line: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class SearchPlots:
    """``values``: key and value of the best trial, and the share of the differences in loss that the key explains."""

    history: TrialPlot
    slices: Sequence[TrialPlot]
    values: Sequence[tuple[str, str, float | None]]
    counts: Mapping[str, int]
    sampler: str
    pruner: str
    best: int
    loss: float


def search(report: Report) -> SearchPlots | None:
    """None where the run had no search for the lowest loss."""
    found = report.get("search")
    if not found or found.get("goal") == "budget":
        return None
    drawn = [trial for trial in found["trials"] if trial["loss"] is not None]
    y = _loss_axis([trial["loss"] for trial in drawn], HISTORY_HEIGHT - 38)
    slices_y = _loss_axis([trial["loss"] for trial in drawn], SLICE_HEIGHT - 38)
    importances = found["importances"]
    keys = sorted(found["values"], key=lambda key: (-importances.get(key, 0.0), key))
    counts = {
        state: sum(trial["state"] == state for trial in found["trials"]) for state in ("complete", "pruned", "failed")
    }
    return SearchPlots(
        history=_history(drawn, found["best"], y),
        slices=[_slice(key, drawn, found, slices_y) for key in keys],
        values=[(key, _text(found["values"][key]), importances.get(key)) for key in keys],
        counts={state: count for state, count in counts.items() if count},
        sampler=found["sampler"],
        pruner=found["pruner"],
        best=found["best"],
        loss=found["loss"],
    )


def _history(trials: Sequence[Mapping[str, Any]], best: int, y: Axis) -> TrialPlot:
    x = Axis(-0.5, max(trial["number"] for trial in trials) + 0.5, LEFT, WIDTH - RIGHT)
    line: list[tuple[float, float]] = []
    lowest: float | None = None
    for trial in trials:
        if trial["state"] == "complete" and (lowest is None or trial["loss"] < lowest):
            if lowest is not None:
                line.append((x.at(trial["number"]), _at(y, lowest)))
            lowest = trial["loss"]
        if lowest is not None:
            line.append((x.at(trial["number"]), _at(y, lowest)))
    dots = [_dot(trial, x.at(trial["number"]), y, best) for trial in trials]
    ticks = [tick for tick in x.ticks(lambda value: f"{value:.0f}" if value == int(value) else "") if tick.text]
    return TrialPlot("trial", HISTORY_HEIGHT, y.start, ticks, _y_ticks(y), dots, line)


def _slice(key: str, trials: Sequence[Mapping[str, Any]], found: Mapping[str, Any], y: Axis) -> TrialPlot:
    shown = [trial for trial in trials if key in trial["values"]]
    values = [trial["values"][key] for trial in shown]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) and len(set(values)) > 1:
        low, high = min(values), max(values)
        log = key in found["log_keys"]
        pad = (high / low) ** 0.06 if log else 0.06 * (high - low)
        x = Axis(low / pad if log else low - pad, high * pad if log else high + pad, LEFT, WIDTH - RIGHT, log)
        ticks = x.ticks(lambda value: f"{value:g}")
        places = [x.at(value) for value in values]
    else:
        names = sorted({_text(value) for value in values})
        x = Axis(-0.5, len(names) - 0.5, LEFT, WIDTH - RIGHT)
        ticks = [Tick(x.at(index), name) for index, name in enumerate(names)]
        places = [x.at(names.index(_text(value))) for value in values]
    dots = [_dot(trial, place, y, found["best"]) for trial, place in zip(shown, places, strict=True)]
    return TrialPlot(key, SLICE_HEIGHT, y.start, ticks, _y_ticks(y), dots, ())


def _dot(trial: Mapping[str, Any], x: float, y: Axis, best: int) -> TrialDot:
    values = ", ".join(f"{key} {_text(value)}" for key, value in trial["values"].items())
    ended = "" if trial["state"] == "complete" else f", {trial['state']} at {trial['percent']} %"
    tip = f"trial {trial['number']}: loss {trial['loss']:.4g}{ended}; {values}"
    return TrialDot(x, _at(y, trial["loss"]), trial["state"], trial["number"] == best, tip)


def _loss_axis(losses: Sequence[float], bottom: float) -> Axis:
    """One exploded trial must not press all others into a line: what is too far away is drawn at the edge."""
    ordered = sorted(losses)
    low, median = ordered[0], ordered[len(ordered) // 2]
    high = min(ordered[-1], low + FAR * max(median - low, 0.05 * abs(low), 1e-6))
    pad = max(0.06 * (high - low), 1e-3)
    return Axis(max(0.0, low - pad), high + pad, bottom, 26)


def _at(y: Axis, loss: float) -> float:
    return y.at(min(loss, y.high))


def _y_ticks(y: Axis) -> list[Tick]:
    return y.ticks(lambda value: f"{value:g}")


def _text(value: Any) -> str:
    return "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
