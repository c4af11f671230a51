"""Pruning inside a run: a stage before export, trained again, told in the report, and searched."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from pipeline_helpers import Done, Place
from safetensors.torch import load_file

from slmops.artifacts import Checkpoint, Report
from slmops.cli.compress import removed, summary
from slmops.errors import ModelError, RecipeError
from slmops.pipeline import run_until
from slmops.progress import Progress
from slmops.recipe import Recipe, parse_recipe
from slmops.runtime import open_classifier
from slmops.store import Store

SHORT = {"evaluate": {"latency_requests": 5, "threads": 1, "untaught_baseline": False}}


@pytest.fixture
def store(done: Done, tmp_path: Path) -> Path:
    shutil.copytree(done.store, tmp_path / "store")
    return tmp_path / "store"


def judged(recipe: Recipe, root: Path) -> tuple[dict[str, Any], dict[str, Any], set[str]]:
    """The report, what was made, and the stages that were worked on."""
    events: list[Progress] = []
    with Store.open(root) as opened:
        made = run_until(recipe, opened, "evaluate", progress=events.append)
    found = {event.task for event in events if event.note == "done before"}
    worked = {event.task for event in events} - found
    return Report.open(made["report"].path).content, made, worked


def test_a_pruned_student_is_made_trained_and_told(done: Done, store: Path) -> None:
    recipe = done.place.recipe(
        compress={"prune": {"channels": 0.5, "rows": 16, "recover": {"epochs": 2}}, "precisions": ["fp32"]},
        gates={"drift": {"pruned": {"kl": 0.0}}},
        **SHORT,
    )
    content, made, worked = judged(recipe, store)
    assert "recover" in worked
    assert not worked & {"training", "student"}
    student: Checkpoint = made["student"]
    config = json.loads((student.path / "config.json").read_text("utf-8"))
    assert config["intermediate_size"] == 64
    pruned = content["pruned"]
    assert pruned["channels"] == 64
    assert 0.1 < pruned["removed"] < 0.5
    assert pruned["divergence"] > 0
    entries = {entry["id"]: entry for entry in content["variants"]}
    assert entries["student-fp32"]["parameters"] < entries["unpruned-torch"]["parameters"]
    steps = {step["after"]: step for step in content["drift"]}
    assert (steps["student-torch"]["before"], steps["student-torch"]["step"]) == ("unpruned-torch", "pruned")
    assert steps["student-torch"]["logits"]["kl_mean"] > 0
    assert "Remove less at a time" in steps["student-torch"]["advice"]
    (failed,) = (gate["name"] for gate in content["gates"] if not gate["passed"] and "KL" in gate["name"])
    assert failed == "KL unpruned-torch → student-torch"
    names = {gate["name"] for one in content["candidates"] for gate in one["gates"]}
    assert "parity unpruned-torch → student-torch" in names
    assert not any(gate["name"].startswith("tokens unpruned") for one in content["candidates"] for gate in one["gates"])
    assert "parameters are gone" in removed(content)[0]
    assert {entry["id"] for entry in summary(content)["variants"]} >= {"unpruned-torch", "student-fp32"}

    again, _, worked = judged(recipe, store)
    assert again == content
    assert not worked & {"recover", "prune", "report"}


def test_the_teacher_itself_pruned_with_zeros(done: Done, store: Path) -> None:
    """No student is trained; tokens, heads and hidden dimensions go; zeros stay zeros in training; it is exported."""
    recipe = done.place.recipe(
        compress={
            "prune": {
                "of": "teacher",
                "heads": 0.5,
                "hidden": 0.25,
                "vocabulary": "trim",
                "sparsity": {"method": "wanda", "pattern": "2:4"},
                "rows": 16,
                "recover": {"epochs": 2},
            },
            "precisions": ["fp32"],
        },
        evaluate={"latency_requests": 5, "threads": 1},
    )
    content, made, worked = judged(recipe, store)
    assert not worked & {"student", "untaught"}
    student: Checkpoint = made["student"]
    weights = load_file(student.path / "model.safetensors")
    config = json.loads((student.path / "config.json").read_text("utf-8"))
    assert (config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]) == (48, 2, 2)
    for name, weight in weights.items():
        if "proj" in name:
            assert ((weight.view(len(weight), -1, 4) == 0).sum(dim=-1) >= 2).all(), name
    assert content["pruned"]["zeros"] == pytest.approx(0.5, abs=0.01)
    assert content["pruned"]["tokens"] < content["pruned"]["tokens_before"]
    assert "computes zeros" not in removed(content)[0]
    assert "compute zeros like other numbers" in removed(content)[1]
    assert "unpruned-torch" not in {entry["id"] for entry in content["variants"]}
    step = next(one for one in content["drift"] if one["after"] == "student-torch")
    assert step["before"] == "teacher-torch"
    assert "do not read the same tokens" in step["where"]
    page = (made["report"].path / "report.html").read_text("utf-8")
    assert "What was removed" in page
    assert "compute zeros like other numbers" in page
    with Store.open(store) as opened:
        classifier = open_classifier(opened.find(content["student"]["artifact"]).path / "model")
    assert classifier.probabilities(["my card is lost"]).shape == (1, 3)
    classifier.close()


def open_recipe(place: Place, **prune: Any) -> Recipe:
    raw = place.raw(
        task="conversation",
        data={"train": str(place.folder / "rows.csv"), "target": "{label}", "input": "{text}"},
        teacher={"model": str(place.teacher), "adapt_epochs": 1, "min_success_ratio": 0},
        train={"epochs": 1, "batch_size": 16, "precision": "fp32", "max_tokens": 64},
        student={"layers": 2},
        compress={"precisions": ["fp32"], "teacher_precisions": [], "prune": prune},
        evaluate={"latency_requests": 5, "threads": 1, "max_rows": 3, "max_new_tokens": 4, "untaught_baseline": False},
    )
    del raw["student"]["hidden_size"]
    return parse_recipe(raw)


@pytest.mark.slow
def test_a_language_model_is_pruned_recovered_and_built(place: Place, tmp_path: Path) -> None:
    recipe = open_recipe(place, depth=0.5, heads=0.5, channels=0.5, rows=8, recover={"epochs": 1})
    content, made, _ = judged(recipe, tmp_path / "store")
    student: Checkpoint = made["student"]
    config = json.loads((student.path / "config.json").read_text("utf-8"))
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["intermediate_size"]) == (1, 2, 64)
    step = next(one for one in content["drift"] if one["step"] == "pruned")
    assert step["logits"]["kl_mean"] > 0
    converted = next(one for one in content["drift"] if one["step"] == "converted")
    assert converted["logits"]["kl_mean"] < 1e-4


@pytest.mark.slow
def test_pruning_is_searched_under_a_budget(done: Done, store: Path) -> None:
    recipe = done.place.recipe(
        compress={"prune": {"rows": 16, "recover": {"epochs": 2}}, "precisions": ["fp32"]},
        search={
            "goal": "budget",
            "rungs": 1,
            "rows": 6,
            "space": {"compress.prune.channels": [0.0, 0.5]},
        },
        **SHORT,
    )
    with Store.open(store) as opened:
        run_until(recipe, opened, "search", out=store / "out")
        made = {path.name: path for path in (store / "artifacts" / "checkpoint").iterdir()}
    best = yaml.safe_load((store / "out" / "best.yaml").read_text("utf-8"))
    assert best["compress"]["prune"]["channels"] in (0.0, 0.5)
    sizes = {
        json.loads((path / "config.json").read_text("utf-8"))["intermediate_size"]
        for path in made.values()
        if (path / "config.json").exists()
    }
    assert {64, 128} <= sizes


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"compress": {"prune": {}}}, "removes nothing"),
        ({"compress": {"prune": {"depth": 1.0}}}, "compress.prune.depth is 1.0"),
        ({"compress": {"prune": {"heads": -0.1}}}, "compress.prune.heads is -0.1"),
        ({"compress": {"prune": {"parameters": 0.5, "depth": 0.5}}}, "leave one of them out"),
        ({"compress": {"prune": {"common_merges": 10, "depth": 0.5}}}, "vocabulary is keep"),
        ({"compress": {"prune": {"sparsity": {"pattern": "2:4", "share": 0.7}}}}, "two of four are 0.5"),
        ({"compress": {"prune": {"depth": 0.5, "recover": {"losses": {"uld": 1}}}}}, "recover.losses.uld"),
        (
            {"task": "conversation", "compress": {"prune": {"depth": 0.5, "recover": {"losses": {"hidden": 1}}}}},
            "recover.losses.hidden",
        ),
        (
            {
                "compress": {"prune": {"of": "teacher", "depth": 0.5}},
                "teacher": {"model": "openai:some", "base_url": "http://127.0.0.1:1"},
                "privacy": "remote",
            },
            "behind a server",
        ),
        (
            {
                "compress": {"prune": {"of": "teacher", "depth": 0.5}},
                "search": {"goal": "budget", "space": {"student.layers": [1, 2]}},
            },
            "no student is trained",
        ),
        ({"search": {"space": {"compress.prune.depth": [0.1, 0.2]}}}, "cannot be searched"),
    ],
)
def test_what_contradicts_itself_is_refused_before_work(
    place: Place, tmp_path: Path, sections: dict[str, Any], words: str
) -> None:
    events: list[Progress] = []
    with pytest.raises(RecipeError, match=words), Store.open(tmp_path / "store") as opened:
        run_until(place.recipe(**sections), opened, "evaluate", progress=events.append)
    assert not events


def test_an_unknown_family_is_refused_before_anything_is_trained(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.teacher, tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_type": "mamba"}), "utf-8")
    moved = dataclasses.replace(place)
    recipe = moved.recipe(
        teacher={"model": str(tmp_path / "teacher")}, compress={"prune": {"of": "teacher", "depth": 0.5}}
    )
    with pytest.raises(ModelError, match="mamba cannot be pruned"), Store.open(tmp_path / "store") as opened:
        run_until(recipe, opened, "teacher")
