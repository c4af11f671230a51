"""The page of ``slmops bench``: what its JSON tells, for people, with the plots and the style of the run's report.

Guarantees: as :mod:`slmops.evaluate.report_html`: stands alone, equal reports give equal pages, texts are escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slmops.evaluate.bench import held_in_words, machine_in_words, table_rows
from slmops.evaluate.report_html import charts, words

HERE = Path(__file__).parent
STYLES = ("student", "teacher", "baseline")
"""Classes of colours; from the fourth line on they come again, dashed."""

Model = Mapping[str, Any]


@dataclass(frozen=True)
class Series:
    name: str
    style: str
    dashed: bool
    points: Sequence[tuple[float, float]]
    label: charts.Label


@dataclass(frozen=True)
class Lines:
    """A plot of lines over a logarithmic x. ``title``: what y is; ``below``: what x is."""

    title: str
    below: str
    height: int
    bottom: float
    x_ticks: Sequence[charts.Tick]
    y_ticks: Sequence[charts.Tick]
    series: Sequence[Series]


def render_bench(reports: Sequence[Mapping[str, Any]]) -> str:
    """One page for one report, or for several side by side."""
    models = named(reports)
    environment = Environment(
        loader=FileSystemLoader([HERE, Path(charts.__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(words.FILTERS)
    return environment.get_template("bench.html.jinja").render(
        reports=reports,
        machines=[
            machine_in_words(report["machine"]) + held_in_words(report["settings"].get("limits") or {})
            for report in reports
        ],
        busy=[(report["machine"].get("load_1min") or 0) > report["machine"]["cores"] for report in reports],
        models=models,
        table=table_rows(list(models.values())),
        latency=latency(models),
        plots=plots(models),
        notes=list(
            dict.fromkeys(note for one in models.values() for note in (one.get("on_device") or {}).get("notes", ()))
        ),
        estimated=any(one.get("on_device") for one in models.values()),
    )


def named(reports: Sequence[Mapping[str, Any]]) -> dict[str, Model]:
    """Models by the name that they have on the page: of several reports, with the report's number."""
    several = len(reports) > 1
    return {
        f"[{number}] {model['name']}" if several else model["name"]: model
        for number, report in enumerate(reports, start=1)
        for model in report["models"]
    }


def latency(models: Mapping[str, Model]) -> charts.Latency | None:
    entries = [{"id": name, "latency_ms": one["latency_ms"]} for name, one in models.items()]
    plot = charts.latency({"teacher": entries[0], "variants": entries, "student": entries[0]})
    return plot and replace(plot, spans=[replace(span, shipped=False, role="student") for span in plot.spans])


def plots(models: Mapping[str, Model]) -> list[Lines]:
    """By requests at once, and by length of the input; only what was measured."""
    writing = any(one["tokens_per_s"] for one in models.values())
    speed = "tokens_per_s" if writing else "answers_per_s"
    first = "ttft_ms" if writing else "latency_ms"
    found = [
        lines(
            "tokens a second" if writing else "answers a second",
            "requests at once (log scale)",
            {name: pairs(one["at_once"], "requests", speed) for name, one in models.items()},
        ),
        lines(
            "to the first text, ms" if writing else "one answer, ms",
            "tokens of the input (log scale)",
            {name: pairs(one["by_length"], "prompt_tokens", first) for name, one in models.items()},
        ),
    ]
    return [plot for plot in found if plot is not None]


def pairs(entries: Iterable[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    known = {entry[x]: entry[y] for entry in entries if entry.get(x) and entry.get(y) is not None}
    return sorted(known.items())


def lines(
    title: str, below: str, series: Mapping[str, Sequence[tuple[float, float]]], height: int = 250
) -> Lines | None:
    """None where no line has two points."""
    shown = {name: points for name, points in series.items() if len(points) > 1}
    if not shown:
        return None
    bottom = height - 38
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points]
    x_axis = charts.Axis(min(xs) / 1.15, max(xs) * 1.15, charts.LEFT, charts.WIDTH - charts.RIGHT, log=True)
    y_axis = charts.Axis(0.0, 1.15 * max(ys), bottom, 26)
    ticks = [charts.Tick(x_axis.at(x), f"{x:g}") for x in apart(sorted(set(xs)), x_axis)]
    ends = {name: y_axis.at(points[-1][1]) for name, points in shown.items()}
    levels = spread(ends)
    return Lines(
        title,
        below,
        height,
        bottom,
        ticks,
        y_axis.ticks(words.significant),
        [
            Series(
                name,
                STYLES[number % len(STYLES)],
                number >= len(STYLES),
                [(x_axis.at(x), y_axis.at(y)) for x, y in points],
                charts.Label(name, x_axis.at(points[-1][0]) + 4, levels[name] - 7),
            )
            for number, (name, points) in enumerate(shown.items())
        ],
    )


def apart(values: Sequence[float], axis: charts.Axis, least: float = 28.0) -> list[float]:
    """Those of ``values`` whose labels do not touch the one before."""
    kept: list[float] = []
    for value in values:
        if not kept or axis.at(value) - axis.at(kept[-1]) >= least:
            kept.append(value)
    return kept


def spread(levels: Mapping[str, float], least: float = charts.FONT + 3) -> dict[str, float]:
    """The same heights, moved up where two labels would lie on one another."""
    placed: dict[str, float] = {}
    for name, level in sorted(levels.items(), key=lambda pair: -pair[1]):
        lowest = min(placed.values(), default=float("inf"))
        placed[name] = min(level, lowest - least)
    return placed
