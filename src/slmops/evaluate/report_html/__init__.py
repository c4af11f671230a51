"""``report.html``: what ``report.json`` tells, for people.

Guarantees: one page that stands alone (no script, no font, no address outside it), readable on paper, on a phone and
in the dark; equal reports give equal pages; every text that came from data or a recipe is escaped; what is not known
is a dash, never a zero.

Not covered: keys that a later version of the report may add. ::

    words   numbers, units and keys as a person reads them
    figures the four large figures, rows of tables
    charts  where dots, lines and labels of the plots lie
    search_charts   the same for a search: its history, importances, slices
    fit_charts      the same for a search under a budget: every student, and those that nothing beats
    *.jinja the page
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from slmops.evaluate.report_html import charts, figures, fit_charts, search_charts, words

_OPTIONAL: Mapping[str, Any] = {
    "data": None,
    "currency": "",
    "seed": None,
    "classes": (),
    "confusions": (),
    "search": None,
    "drift": (),
    "closest_in_words": (),
    "measures": {},
    "benchmarks": {},
}


def render_report(report: Mapping[str, Any]) -> str:
    """The page of a report as :func:`slmops.evaluate.summary.build_report` makes it.

    ``history``, ``data``, ``currency``, ``classes``, ``confusions`` and ``comparisons`` and ``search`` are shown where
    they are there.

    Raises:
        KeyError: a key that every report has is missing.
    """
    return (
        _environment()
        .get_template("report.html.jinja")
        .render(
            report={**_OPTIONAL, **report},
            metric=words.metric_name(report["metric"]),
            figures=figures.headline(report),
            models=figures.models(report),
            measures=figures.measures(report),
            details=figures.details(report),
            comparisons=figures.comparisons(report),
            balance=figures.balance(report),
            tradeoff=charts.tradeoff(report),
            latency=charts.latency(report),
            losses=charts.losses(report),
            search=search_charts.search(report),
            fit=fit_charts.fit(report),
            device=figures.device(report),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words.MISSING if value is None else value,
    )
    environment.filters.update(words.FILTERS)
    return environment
