"""``slmops evaluate`` with people: a form is written, filled in and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fakes.tiny_models import write_tiny_llama
from slmops.cli.app import app
from slmops.errors import DataError, SlmopsError, UsageError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models, a recipe and its rows, and a person who stands there."""
    write_tiny_llama(tmp_path / "small")
    shutil.copytree(tmp_path / "small", tmp_path / "large")
    lines = [f"question {number} about card {number * 7},answer {number}" for number in range(40)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    (tmp_path / "recipe.yaml").write_text(
        "name: tiny\ntask: generation\ndata: {train: rows.csv, near_duplicates: null, split: {test: 0.3}}\n"
        "evaluate: {max_new_tokens: 4, threads: 1}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout


def refused(kind: type[SlmopsError], said: str, *arguments: object) -> None:
    with pytest.raises(kind, match=said):
        CliRunner().invoke(app, ["evaluate", *map(str, arguments)], catch_exceptions=False)


def fill(form: Path, rater: str, rating: Any) -> Path:
    """What a rater who always says the same saves."""
    items = [json.loads(line) for line in form.with_suffix(".jsonl").read_text().splitlines()]
    ratings = [{"item": item["item"], "rating": rating, "comment": ""} for item in items]
    whole = {"schema": 1, "form": items[0]["form"], "kind": "pairs", "rater": rater, "ratings": ratings}
    path = form.parent / f"ratings-{rater}.json"
    path.write_text(json.dumps(whole))
    return path


def test_a_form_is_written_filled_in_and_read_back(place: Path) -> None:
    told = run("recipe.yaml", "small", "--against", "large", "--rate", "forms/form.html", "--rate-rows", 8)
    assert "8 pairs to rate: forms/form.html" in told
    form = place / "forms/form.html"
    assert {path.name for path in form.parent.iterdir()} == {"form.html", "form.csv", "form.jsonl", "form.key.json"}
    files = [fill(form, rater, side) for rater, side in (("ann", "left"), ("bo", "same"))]
    said = run("--ratings", files[0], "--ratings", files[1])
    assert "8 items rated by 2: ann, bo; 0 by nobody" in said
    assert "small: preferred in" in said
    assert "kappa 0.00" in said
    found = json.loads(run("--ratings", files[0], "--json"))
    left = [one["models"][0] for one in json.loads(form.with_suffix(".key.json").read_text())["items"].values()]
    assert found["models"][0]["name"] == "small"
    assert found["models"][0]["value"] == left.count(0) / 8
    assert found["kappa"] is None


def test_one_model_is_scored_alone(place: Path) -> None:
    told = json.loads(run("recipe.yaml", "small", "--rate", "form.html", "--rate-rows", 3, "--json"))
    assert (told["kind"], told["items"]) == ("scores", 3)
    assert "small: 4.00 of 5" in run("--ratings", fill(place / "form.html", "ann", 4), "--key", "form.key.json")


def test_wrong_use_is_said(place: Path) -> None:
    refused(
        UsageError, "A form of pairs needs two models", "recipe.yaml", "small", "--rate", "f.html", "--rate-as", "pairs"
    )
    refused(UsageError, "--rate-as is 'stars'", "recipe.yaml", "small", "--rate", "f.html", "--rate-as", "stars")
    refused(UsageError, "recipe.yaml is all that was named", "recipe.yaml")
    refused(UsageError, "Nothing was named")
    refused(UsageError, "--rate asks a recipe's test rows", "small", "--benchmark", "boolq", "--rate", "f.html")
    (place / "f.html").write_text("filled in by somebody")
    refused(UsageError, "There is something at f.html", "recipe.yaml", "small", "--rate", "f.html")
    refused(DataError, "cannot be read", "--ratings", "nothing.json")
