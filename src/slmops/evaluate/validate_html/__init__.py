"""The page of ``slmops validate``: pass or fail, check by check, with the evidence.

Guarantees: as :mod:`slmops.evaluate.report_html`: stands alone, equal reports give equal pages, texts are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slmops.evaluate.bench import machine_in_words
from slmops.evaluate.report_html import charts, words

HERE = Path(__file__).parent
TITLES = {
    "in_domain": "Answers in domain",
    "format": "Output format",
    "lengths": "Input lengths",
    "edges": "Edge cases",
    "invalid": "Invalid requests",
    "concurrency": "Callers at once",
    "soak": "Memory in long use",
}
HEIGHT = 220


@dataclass(frozen=True)
class Plot:
    """One line, in the coordinates of an SVG picture. ``below``: what x is."""

    title: str
    below: str
    height: int
    bottom: float
    x_ticks: Sequence[charts.Tick]
    y_ticks: Sequence[charts.Tick]
    points: Sequence[tuple[float, float]]
    dots: bool


def render_validation(report: Mapping[str, Any]) -> str:
    """The page of one report, as :meth:`Validation.to_json` tells it."""
    environment = Environment(
        loader=FileSystemLoader([HERE, Path(charts.__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(words.FILTERS)
    return environment.get_template("validate.html.jinja").render(
        report=report,
        verdict=verdict(report),
        machine=machine_in_words(report["machine"]),
        checks=[{**check, "title": TITLES[check["name"]], "plot": plot_of(check)} for check in report["checks"]],
        tables={check["name"]: table_of(check) for check in report["checks"]},
    )


def verdict(report: Mapping[str, Any]) -> str:
    """One sentence."""
    made = [check for check in report["checks"] if check["passed"] is not None]
    failed = [TITLES[check["name"]].lower() for check in made if not check["passed"]]
    left = len(report["checks"]) - len(made)
    unmade = f" {left} could not be made." if left else ""
    if failed:
        return f"{len(failed)} of {len(made)} checks failed: {', '.join(failed)}.{unmade}"
    return f"All {len(made)} checks that were made passed.{unmade}"


def plot_of(check: Mapping[str, Any]) -> Plot | None:
    """The evidence as a picture, where it makes one."""
    evidence = check["evidence"]
    match check["name"]:
        case "lengths":
            points = [(one["words"], one["ms"]) for one in evidence.get("sweep", ()) if one["status"] == 200]
            return line("one answer, ms", "words of the input (log scale)", points, log=True, dots=True)
        case "concurrency":
            points = [(one["callers"], one["per_s"]) for one in evidence.get("levels", ())]
            return line("answers a second", "callers at once (log scale)", points, log=True, dots=True)
        case "soak" if "series" in evidence:
            series = evidence["series"]
            points = [(x, y / 1e6) for x, y in zip(series["requests"], series["bytes"], strict=True)]
            return line("memory, MB", "requests answered", points, log=False, dots=False)
    return None


def line(title: str, below: str, points: Sequence[tuple[float, float]], *, log: bool, dots: bool) -> Plot | None:
    """None below two points. Without ``dots`` the y axis begins near the values: it shows a slope, not a size."""
    if len(points) < 2:
        return None
    bottom = HEIGHT - 38
    xs, ys = [x for x, _ in points], [y for _, y in points]
    spare = max(0.1 * (max(ys) - min(ys)), 0.02 * max(ys))
    low = 0.0 if dots else min(ys) - spare
    x_axis = charts.Axis(min(xs) / (1.15 if log else 1), max(xs) * (1.15 if log else 1), charts.LEFT,
                         charts.WIDTH - charts.RIGHT, log=log)  # fmt: skip
    y_axis = charts.Axis(low, max(ys) + spare, bottom, 26)
    x_ticks = [charts.Tick(x_axis.at(x), f"{x:,g}") for x in xs] if dots else x_axis.ticks(words.significant)
    return Plot(
        title,
        below,
        HEIGHT,
        bottom,
        x_ticks,
        y_axis.ticks(words.significant),
        [(round(x_axis.at(x), 1), round(y_axis.at(y), 1)) for x, y in points],
        dots,
    )


def table_of(check: Mapping[str, Any]) -> list[list[str]]:
    """The evidence as rows, the first one a head; empty where the sentence says it all."""
    evidence = check["evidence"]
    match check["name"]:
        case "edges" | "invalid":
            return [["what was sent", "status"], *([name, str(status)] for name, status in evidence.items())]
        case "lengths":
            rows = evidence.get("sweep", ())
            return [["words", "status", "ms"], *([f"{r['words']:,}", str(r["status"]), f"{r['ms']:.1f}"] for r in rows)]
        case "concurrency":
            head = ["callers", "answered", "told to wait", "failed", "other answers", "a second", "p95 ms"]
            keys = ("callers", "answered", "told_to_wait", "failed", "other_answers", "per_s", "p95_ms")
            return [head, *([f"{row[key]:,}" for key in keys] for row in evidence.get("levels", ()))]
    return []
