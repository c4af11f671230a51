"""``slmops improve``, as a person calls it: wrong use, and the history in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from slmops.cli.app import app
from slmops.cli.improve import history_in_words
from slmops.errors import ArtifactError, RecipeError, UsageError
from slmops.rollout import Policy, Tally, decide
from slmops.serve.candidate.book import Book


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["improve", *map(str, arguments)])


def test_help_teaches_both_words() -> None:
    shown = call("--help").output
    assert "candidate" in shown
    assert "why" in shown
    assert "--feedback corrections.jsonl" in shown
    assert "--deployed" in call("candidate", "--help").output


def test_wrong_use_is_told(tmp_path: Path) -> None:
    assert call("recipe.yaml").exit_code == 2  # no feedback
    assert isinstance(call(tmp_path / "none.yaml", "--feedback", "x").exception, RecipeError)
    assert isinstance(call(tmp_path, "--feedback", "x").exception, UsageError)
    recipe = {"name": "a", "task": "classification", "data": {"train": "a.csv"}, "teacher": {"model": "my-teacher"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    error = call(tmp_path, "--feedback", "x").exception
    assert isinstance(error, UsageError)
    assert "my-teacher" in error.message
    assert "--deployed" in str(error.remedy)
    error = call("why", tmp_path).exception
    assert isinstance(error, ArtifactError)
    assert "tells of no candidate" in error.message


def test_why_tells_every_decision_with_its_numbers(tmp_path: Path) -> None:
    policy = Policy(shadow_requests=0, shares=(0.5,))
    book = Book(tmp_path / "rollout" / "pair")
    state = book.begin("a" * 64, "b" * 64, policy)
    tally = Tally()
    for _ in range(40):
        tally = tally.seen("old", "score", 1.0).seen("new", "score", 0.0)
    decision = decide(policy, 0, tally)
    book.note(state, decision.action, {"step": state.stage, **decision.to_json()})
    shown = call("why", tmp_path).output
    assert "went back: The answers are worse: 0.0 % after 100.0 % (-100.0 points; 40 and 40 seen)." in shown
    assert "score: -100.00 points, between" in shown
    told = json.loads(call("why", tmp_path, "--json").output)
    [rollout] = told["rollouts"]
    assert (rollout["outcome"], [entry["event"] for entry in rollout["journal"]]) == ("back", ["begun", "back"])


@pytest.mark.parametrize("passed", [True, False])
def test_gates_are_told_in_words(passed: bool) -> None:
    gate = {"name": "old_rows", "value": -0.2, "limit": -0.5, "passed": passed, "direction": "at_least", "note": "Why."}
    improvement = {"verdict": "A verdict.", "gates": [gate], "failed_gates_of_the_run": []}
    lines = history_in_words({"improvement": improvement, "rollouts": []})
    assert lines == ["A verdict.", f" {'✓' if passed else '✗'} old_rows: -0.2 (limit ≥ -0.5) Why."]
