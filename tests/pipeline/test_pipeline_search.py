"""A recipe with a search, end to end: trials are students, the best one is trained through, the page shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_helpers import Place

from slmops.artifacts import Checkpoint
from slmops.errors import ModelError, RecipeError, UsageError
from slmops.pipeline import run_recipe, run_until
from slmops.progress import Progress
from slmops.recipe import load_recipe, parse_recipe, with_values
from slmops.store import Store

pytest.importorskip("optuna", reason="the extra search is not installed")

SPACE = {"train.learning_rate": {"low": 1e-4, "high": 3e-2, "log": True}, "train.batch_size": [8, 16]}
QUICK: dict[str, Any] = {
    "teacher": {"adapt_epochs": 1},
    "train": {"epochs": 4, "checkpoint_every_steps": 4},
    "compress": {"precisions": ["fp32"]},
    "evaluate": {"untaught_baseline": False, "latency_requests": 5, "threads": 1},
    "gates": {"retention": 0, "format_valid": 0, "parity": 1},
}


def searching(place: Place, **search: Any) -> Any:
    return place.recipe(**QUICK, search={"space": SPACE, "trials": 4, "sampler": "random", **search})


def students(store: Path) -> list[Path]:
    manifests = (store / "artifacts" / "checkpoint").glob("*/manifest.json")
    return [path.parent for path in manifests if json.loads(path.read_text())["name"] == "student"]


def test_a_search_end_to_end(place: Place, tmp_path: Path) -> None:
    recipe = searching(place)
    events: list[Progress] = []
    with Store.open(tmp_path) as store:
        result = run_recipe(recipe, store, progress=events.append)
    found = result.report["search"]
    assert [trial["state"] for trial in found["trials"]].count("complete") >= 2
    assert found["loss"] == min(trial["loss"] for trial in found["trials"] if trial["state"] == "complete")
    # The best trial's student is the run's: trained once, and the only one that is kept.
    (kept,) = students(tmp_path)
    student = Checkpoint.open(kept)
    assert student.manifest.config["train"]["learning_rate"] == found["values"]["train.learning_rate"]
    assert student.manifest.config["train"]["batch_size"] == found["values"]["train.batch_size"]
    history = json.loads((kept / "history.json").read_text())
    assert [point["validation_loss"] for point in history if "validation_loss" in point][-1] == found["loss"]
    assert result.report["history"]["student"] == history
    assert any(event.task == "search" and event.done == 4 for event in events)
    # The best recipe was written out, and is what the run would have been without a search.
    best = load_recipe(result.folder / "best.yaml")
    assert best == with_values(recipe, found["values"])
    assert best.search is None
    assert yaml.safe_load((result.folder / "bundle" / "recipe.yaml").read_text())["search"] is None
    with Store.open(tmp_path) as store:
        assert run_until(best, store, "student")["student"].path == kept
    page = (result.folder / "report.html").read_text("utf-8")
    assert "<h2>Search</h2>" in page
    assert page.count("mark-ring") >= 3  # the best trial in the history and in each slice
    for key, value in found["values"].items():
        assert key in page
        assert f"{value:g}" in page
    # Found done.
    with Store.open(tmp_path) as store:
        again = run_recipe(recipe, store)
    assert again.reused
    assert again.report == result.report
    # More trials go on with the same study.
    with Store.open(tmp_path) as store:
        run_until(searching(place, trials=5), store, "search")
        events.clear()
        run_until(searching(place, trials=5), store, "search", progress=events.append)
    assert [event.done for event in events if event.task == "search"] == [5]


@pytest.mark.slow
def test_two_processes_share_a_search(place: Place, tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        made = run_until(searching(place, processes=2, trials=5, pruner="none"), store, "student")
    best = load_recipe(tmp_path / "runs" / "tiny" / "best.yaml")
    student = made["student"]
    assert student.manifest.config["train"]["learning_rate"] == best.train.learning_rate
    assert students(tmp_path) == [student.path]
    with Store.open(tmp_path) as store:
        events: list[Progress] = []
        run_until(searching(place, processes=2, trials=5, pruner="none"), store, "search", progress=events.append)
    assert [(event.done, event.note) for event in events if event.task == "search"] == [(5, "done before")]


def test_a_worker_that_breaks_is_told(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.pipeline.search.sys.executable", "/bin/false")
    with Store.open(tmp_path) as store, pytest.raises(ModelError, match="ended with code 1"):
        run_until(searching(place, processes=2), store, "student")


def test_values_that_fit_no_model_are_failed_trials(place: Place, tmp_path: Path) -> None:
    recipe = place.recipe(**QUICK, search={"space": {"student.hidden_size": [64, 100]}, "trials": 5})
    with Store.open(tmp_path) as store:
        made = run_until(recipe, store, "student")
    assert made["student"].manifest.config["student"]["hidden_size"] == 64


def test_stopping_after_a_stage(place: Place, tmp_path: Path) -> None:
    recipe = place.recipe(**QUICK)
    with Store.open(tmp_path) as store:
        assert set(run_until(recipe, store, "data")) == {"data"}
        assert not (tmp_path / "artifacts" / "checkpoint").exists()
        assert set(run_until(recipe, store, "search")) == {"data", "teacher", "answers"}
        with pytest.raises(UsageError, match="no stage 'studnt'"):
            run_until(recipe, store, "studnt")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.learnin_rate": [1, 2]}, r"train.learnin_rate.*Did you mean learning_rate"),
        ({"train.epochs": {"low": 3, "high": 2}}, "low is 3 and high is 2"),
        ({"train.epochs": {"low": 3, "high": 3}}, "low is 3 and high is 3"),
        ({"train.epochs": {"low": 1, "hi": 2}}, "hi"),
        ({"train.epochs": {"low": 1, "high": 9, "step": 10}}, "step is 10"),
        ({"train.epochs": {"low": 1, "high": 9, "log": True, "step": 2}}, "does not go with log"),
        ({"train.epochs": [-1, 2]}, "cannot be -1"),
        ({"train.batch_size": {"low": 0.5, "high": 2.5}}, "cannot be 0.5"),
        ({"student.layers": [2]}, "two or more"),
        ({"student.layers": [2, 2]}, "two or more"),
        ({"student.layers": 2}, "student.layers is 2"),
        ({"train.learning_rate": {"low": 0, "high": 1, "log": True}}, "logarithm"),
        ({"teacher.model": ["a", "b"]}, "student, distill, train"),
        ({"seed": [1, 2]}, "student, distill, train"),
        ({"train.max_tokens": [16, 32]}, "measured on"),
        ({"train.epochs.more": [1, 2]}, "Unknown key"),
        ({}, "at least 1"),
    ],
)
def test_spaces_that_cannot_be_searched(place: Place, space: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        place.recipe(search={"space": space})


def test_models_of_other_tokenizers_do_not_compare(place: Place) -> None:
    raw = place.raw(search={"space": {"student.model": ["a", "b"]}})
    assert parse_recipe(raw).search
    with pytest.raises(RecipeError, match="different tokenizers"):
        parse_recipe({**raw, "task": "qa"})


def test_the_line_of_a_bad_space_is_told(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\ntask: classification\ndata: {train: a.csv}\nsearch:\n  trials: 3\n  space:\n"
        "    student.layers: [2, 4]\n    train.epochs: {low: 9, high: 2}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.line == 8
