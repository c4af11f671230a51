"""A recipe whose search has the budget as its goal: shapes in, the smallest student that passes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Place

from slmops.artifacts import Checkpoint
from slmops.errors import ModelError, RecipeError
from slmops.pipeline import run_recipe
from slmops.pipeline.fit import finalists, whole_epochs
from slmops.progress import Progress
from slmops.recipe import parse_recipe
from slmops.store import Store

SPACE = {"student.layers": [1, 2, 3]}
QUICK: dict[str, Any] = {
    "teacher": {"adapt_epochs": 1},
    "train": {"epochs": 4, "checkpoint_every_steps": 4},
    "compress": {"precisions": ["fp32", "int8"], "teacher_precisions": []},
    "evaluate": {"untaught_baseline": False, "latency_requests": 5, "threads": 1},
    "gates": {"retention": 0, "format_valid": 0, "parity": 1},
}


def raw(place: Place, **search: Any) -> dict[str, Any]:
    return {**place.raw(**QUICK), "search": {"goal": "budget", "space": SPACE, "rungs": 2, **search}}


def test_a_search_under_a_budget_end_to_end(place: Place, tmp_path: Path) -> None:
    events: list[Progress] = []
    recipe = parse_recipe(raw(place))
    with Store.open(tmp_path) as store:
        result = run_recipe(recipe, store, progress=events.append)
        again = run_recipe(recipe, store)
    found = result.report["search"]
    assert found["goal"] == "budget"
    assert found["passed"]
    assert {one["id"] for one in found["candidates"]} == {f"{n}-{p}" for n in range(3) for p in ("fp32", "int8")}
    # A third of three students was trained on, and chosen from; the others stayed where they were.
    (kept,) = {one["number"] for one in finalists(found)}
    assert {one["epochs"] for one in found["candidates"] if one["number"] != kept} == {1.333}
    assert {one["epochs"] for one in finalists(found)} == {4}
    chosen = next(one for one in found["candidates"] if one["id"] == found["chosen"])
    assert chosen["variant"] == "int8", "smaller, and every gate is open"
    assert found["values"] == chosen["values"]
    assert any(one["front"] for one in found["candidates"])
    leader = next(one for one in found["candidates"] if one["id"] == found["leader"])
    assert leader["within_noise_of_leader"]
    assert leader["score"]["value"] == max(one["score"]["value"] for one in found["candidates"])
    # Judged on validation rows, and few enough of them.
    assert leader["score"]["rows"] <= 300
    # The run went on with the student that was chosen, and found it trained.
    students = [
        Checkpoint.open(path.parent)
        for path in (tmp_path / "artifacts" / "checkpoint").glob("*/manifest.json")
        if json.loads(path.read_text())["name"] == "student"
    ]
    assert len(students) == 4
    assert any(event.task == "search" and event.done == event.total == 4 for event in events)
    assert again.reused
    assert again.report["search"]["chosen"] == found["chosen"]
    page = (result.folder / "report.html").read_text("utf-8")
    assert "student.layers" in page


def test_what_cannot_fit_is_not_trained(place: Place, tmp_path: Path) -> None:
    recipe = parse_recipe({**raw(place, rungs=1), "budget": {"size_mb": 0.06}})
    with Store.open(tmp_path) as store:
        result = run_recipe(recipe, store)
    found = result.report["search"]
    assert [one["number"] for one in found["left_out"]] == [1, 2]
    assert all("layers alone take" in one["why"] for one in found["left_out"])
    assert {one["number"] for one in found["candidates"]} == {0}


def test_nothing_can_fit(place: Place, tmp_path: Path) -> None:
    recipe = parse_recipe({**raw(place), "budget": {"size_mb": 0.001}})
    with Store.open(tmp_path) as store, pytest.raises(ModelError, match=r"No candidate.*layers alone take") as caught:
        run_recipe(recipe, store)
    assert caught.value.remedy is not None
    assert "smaller students" in caught.value.remedy


def test_a_shape_that_cannot_be_is_told_and_left(place: Place, tmp_path: Path) -> None:
    given = raw(place, rungs=1)
    given["search"]["space"] = {"student.hidden_size": [64, 65]}
    with Store.open(tmp_path) as store:
        found = run_recipe(parse_recipe(given), store).report["search"]
    assert [(one["number"], "65" in one["why"]) for one in found["left_out"]] == [(1, True)]


def test_the_time_is_up(place: Place, tmp_path: Path) -> None:
    with Store.open(tmp_path) as store, pytest.raises(ModelError, match="No candidate"):
        run_recipe(parse_recipe(raw(place, timeout_s=1e-9)), store)


def test_several_processes_are_refused(place: Place) -> None:
    with pytest.raises(RecipeError, match="would make them look slow"):
        parse_recipe(raw(place, processes=2))


def test_how_long_a_student_is_trained() -> None:
    base = {"name": "a", "data": {"train": "a.csv", "input": "{a}", "target": "{b}"}}
    assert whole_epochs(parse_recipe({**base, "task": "classification"})) == 20
    assert whole_epochs(parse_recipe({**base, "task": "qa"})) == 3
