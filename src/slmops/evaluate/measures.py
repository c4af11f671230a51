"""Measures of a user's own business: what answers are worth, in minutes, money or whatever the user counts.

A measure is a function ``(predictions, rows) -> {name: values}``: ``predictions`` the answers as text, ``rows`` the
:class:`~slmops.artifacts.Row` of each; ``values`` one number a row, or one number for all of them. Guarantees: what a
function gives is checked before it is believed; a figure by row has a bootstrap interval, a figure of the whole none.
Functions are pure to us: called again, for other models, on the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Row
from slmops.errors import RecipeError
from slmops.evaluate.significance import bootstrap_interval
from slmops.plugins import load_entry_point, load_function

KEY = "evaluate.metrics"
ENTRY_POINTS = "slmops.metrics"

Measuring = Callable[[Sequence[str], Sequence[Row]], Any]


@dataclass(frozen=True)
class OwnMetric:
    """``reference``: as the recipe names it."""

    reference: str
    function: Measuring

    @property
    def name(self) -> str:
        return self.reference.rpartition(":")[2]


@dataclass(frozen=True, eq=False)
class Measure:
    """``ci95`` and ``per_row`` (float64 ``[rows]``) where the function gave one number a row."""

    value: float
    ci95: tuple[float, float] | None = None
    per_row: NDArray[np.float64] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "ci95": list(self.ci95) if self.ci95 else None}


def load_metrics(references: Sequence[str]) -> list[OwnMetric]:
    """The functions that ``references`` name: ``FILE.py:FUNCTION``, or an entry point.

    Raises:
        RecipeError: one that is not there or cannot be run.
    """
    return [
        OwnMetric(
            reference,
            load_function(reference, key=KEY)
            if ":" in reference
            else load_entry_point(reference, ENTRY_POINTS, key=KEY),
        )
        for reference in references
    ]


def measured(
    metrics: Sequence[OwnMetric], predictions: Sequence[str], rows: Sequence[Row], *, seed: int = 0
) -> dict[str, Measure]:
    """What all ``metrics`` say, by the names that they give.

    Raises:
        RecipeError: one raised, gave something else than numbers by name, a wrong number of them, or no finite ones; or
            two gave the same name.
    """
    found: dict[str, Measure] = {}
    for metric in metrics:
        for name, measure in _of_one(metric, predictions, rows, seed).items():
            if name in found:
                raise RecipeError(f"{KEY}: two functions measure {name!r}.", remedy="Give one of them another name.")
            found[name] = measure
    return found


def _of_one(metric: OwnMetric, predictions: Sequence[str], rows: Sequence[Row], seed: int) -> dict[str, Measure]:
    try:
        given = metric.function(list(predictions), list(rows))
    except Exception as error:
        raise RecipeError(
            f"{KEY}: {metric.name} raised {type(error).__name__}: {error}.",
            remedy="It has to take any text that a model may write, also an empty one.",
        ) from error
    if not isinstance(given, Mapping) or not given:
        raise RecipeError(
            f"{KEY}: {metric.name} returned {given!r:.60}.", remedy="Return {name: values}, one number a row or one."
        )
    return {str(name): _measure(metric, str(name), value, rows, seed) for name, value in given.items()}


def _measure(metric: OwnMetric, name: str, value: Any, rows: Sequence[Row], seed: int) -> Measure:
    what = f"{KEY}: {metric.name} gave {name}"
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise RecipeError(f"{what} as {float(value)}.", remedy="Return a finite number: look for 0/0.")
        return Measure(float(value))
    if value is None or isinstance(value, str):
        raise RecipeError(f"{what} as {value!r}.", remedy="Return one number a row, or one.")
    try:
        values = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise RecipeError(f"{what} as a {type(value).__name__}.", remedy="Return one number a row, or one.") from None
    if values.shape != (len(rows),):
        raise RecipeError(
            f"{what} in the shape {list(values.shape)}, and there are {len(rows)} rows.",
            remedy="Return one number for each prediction, in their order.",
        )
    if not np.isfinite(values).all():
        first = int(np.flatnonzero(~np.isfinite(values))[0])
        raise RecipeError(
            f"{what} as {values[first]} for the row {rows[first].id!r}.", remedy="Return a finite number for every row."
        )
    return Measure(float(values.mean()), bootstrap_interval(values, seed), values)
