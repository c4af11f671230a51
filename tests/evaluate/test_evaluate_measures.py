"""Measures of a user's own: what is believed, what is refused, and the gates over them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.artifacts import Message, Row
from slmops.errors import RecipeError
from slmops.evaluate.gates import measure_gates
from slmops.evaluate.measures import OwnMetric, load_metrics, measured
from slmops.evaluate.scores import score_predictions
from slmops.evaluate.significance import bootstrap_interval
from slmops.recipe import GatesConfig, parse_recipe

ROWS = [Row(f"r{number}", (Message("user", "q" * number),), "yes" if number % 2 else "no") for number in range(1, 9)]
ANSWERS = ["yes"] * 8


def minutes_saved(predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "minutes_saved": [3.0 if answer == row.target else -1.0 for answer, row in zip(predictions, rows, strict=True)],
        "longest": max(map(len, predictions), default=0),
    }


def own(function: Callable[..., Any]) -> list[OwnMetric]:
    return [OwnMetric(f"my.py:{function.__name__}", function)]


def test_by_the_row_with_an_interval_and_of_the_whole_without() -> None:
    found = measured(own(minutes_saved), ANSWERS, ROWS, seed=3)
    by_row = found["minutes_saved"]
    values = np.array([3.0, -1.0] * 4)
    assert by_row.value == 1.0
    assert by_row.per_row is not None
    assert np.array_equal(by_row.per_row, values)
    assert by_row.ci95 == bootstrap_interval(values, 3)
    assert found["longest"].to_json() == {"value": 3.0, "ci95": None}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1.0] * 7, r"in the shape \[7\], and there are 8 rows"),
        ([1.0] * 7 + [float("nan")], "as nan for the row 'r8'"),
        (float("inf"), "as inf"),
        (["a"] * 8, "as a list"),
        (None, "as None"),
        ("3", "as '3'"),
    ],
)
def test_what_is_no_measure_is_named(given: Any, said: str) -> None:
    def bad(predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
        return {"worth": given}

    with pytest.raises(RecipeError, match=f"evaluate.metrics: bad gave worth {said}"):
        measured(own(bad), ANSWERS, ROWS)


def test_functions_that_raise_return_nothing_or_repeat_a_name() -> None:
    def raises(predictions: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
        return {"x": 1 / 0}

    def nothing(predictions: Sequence[str], rows: Sequence[Row]) -> None:
        return None

    with pytest.raises(RecipeError, match="raises raised ZeroDivisionError"):
        measured(own(raises), ANSWERS, ROWS)
    with pytest.raises(RecipeError, match="nothing returned None"):
        measured(own(nothing), ANSWERS, ROWS)
    with pytest.raises(RecipeError, match="two functions measure 'minutes_saved'"):
        measured(own(minutes_saved) * 2, ANSWERS, ROWS)


def test_from_a_file_and_from_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "worth.py"
    file.write_text("def length(predictions, rows):\n    return {'length': [len(p) for p in predictions]}\n")
    package = tmp_path / "site/worth_package-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: worth-package\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[slmops.metrics]\nanswer_length = worth:length\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    for reference in (f"{file}:length", "answer_length"):
        assert measured(load_metrics([reference]), ANSWERS, ROWS)["length"].value == 3.0
    with pytest.raises(RecipeError, match="has no function width"):
        load_metrics([f"{file}:width"])
    with pytest.raises(RecipeError, match="other, which no installed package offers"):
        load_metrics(["other"])


def test_gates_over_measures_and_over_further_metrics() -> None:
    targets = [row.target or "" for row in ROWS]
    scores = score_predictions(ANSWERS, targets, task="classification").with_measures(own(minutes_saved), ROWS, seed=0)
    gates = measure_gates(scores, {"minutes_saved": ">= 1", "macro_f1": ">=0.9", "longest": "<= 3e0"})
    assert [(gate.name, gate.passed) for gate in gates] == [
        ("minutes_saved", True),
        ("macro_f1", False),
        ("longest", True),
    ]
    assert "95 % interval" in gates[0].note


def test_limits_as_written() -> None:
    assert GatesConfig(metrics={"a": " <= -0.5 "}).metrics == {"a": " <= -0.5 "}
    raw = {"name": "a", "task": "nli", "data": {"train": "a.csv"}}
    with pytest.raises(RecipeError, match=r"gates\.metrics\.a: 'three' is no limit: write >= or <= and a number"):
        parse_recipe({**raw, "gates": {"metrics": {"a": "three"}}})
