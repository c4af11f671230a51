"""Every recipe in ``examples/``: it loads, its header's command is right, its templates fit the real rows."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from slmops.cli.app import app
from slmops.distill.privacy import check_remote_allowed, leaves_machine
from slmops.errors import DataError
from slmops.recipe import Recipe, load_recipe

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*/*.yaml"))
NAMES = [str(path.relative_to(EXAMPLES)) for path in RECIPES]
ROWS = {"banking77": 10_003, "bitext": 3_839, "boolq": 3_270, "gsm8k": 7_473, "scitail": 2_126}
"""Rows of each training file, as its publisher counts them."""
LABELS = {"banking77": 77, "scitail": 2}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=NAMES)


def header_command(path: Path, verb: str) -> list[str]:
    """The arguments of ``slmops VERB …`` in the comment on top of the recipe."""
    comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    line = next(line for line in comment if line.startswith(f"slmops {verb}"))
    return shlex.split(line)[2:]


def own_rows(path: Path, shared_data: Path) -> str:
    """``--set data.train=…`` of the header, with the folder where the test finds the rows."""
    override = header_command(path, "run")[2]
    relative = override.removeprefix("data.train=../shared/data/")
    assert relative != override
    return f"data.train={shared_data / relative}"


def test_there_is_one_for_each_kind_of_task_that_is_promised() -> None:
    assert {load_recipe(path).task for path in RECIPES} == {"classification", "nli", "conversation", "qa", "math"}
    assert len({load_recipe(path).name for path in RECIPES}) == len(RECIPES)  # two runs never share a folder


@every_recipe
def test_the_header_says_the_command(path: Path) -> None:
    recipe, *options = header_command(path, "run")
    assert recipe == f"examples/{path.relative_to(EXAMPLES)}"
    assert options[0] == "--set"
    readme = (path.parent / "README.md").read_text()
    assert re.sub(r" +", " ", " ".join(["slmops", "run", recipe, *options])) in re.sub(r" +", " ", readme)


@every_recipe
def test_without_rows_the_error_says_what_to_do(path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        CliRunner().invoke(app, ["data", str(path), "--store", str(tmp_path)], catch_exceptions=False)
    assert str(path.parent / "train.") in caught.value.message
    assert "--set data.train=FILE" in (caught.value.remedy or "")


@every_recipe
@pytest.mark.shared_data
def test_templates_fit_the_rows(path: Path, shared_data: Path, tmp_path: Path) -> None:
    arguments = ["data", str(path), "--set", own_rows(path, shared_data), "--store", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    found: dict[str, Any] = json.loads(result.stdout)
    summary, recipe = found["summary"], load_recipe(path)
    kept = sum(summary["rows"].values())
    assert summary["read"]["train"] == ROWS[path.parent.name]
    assert summary["quarantined"]["total"] == 0
    if recipe.data.limit is None:
        assert kept >= 0.98 * summary["read"]["train"]
    else:
        assert kept == recipe.data.limit
    share = recipe.data.split
    # Every stratum has a row in every split, so small splits come out a little larger.
    assert summary["rows"]["test"] == pytest.approx(share.test * kept, rel=0.15)
    assert summary["rows"]["validation"] == pytest.approx(share.validation * kept, rel=0.15)
    assert recipe.evaluate.max_rows is None or recipe.evaluate.max_rows <= summary["rows"]["test"]
    assert (summary["balance"] is not None) == recipe.closed
    if recipe.closed:
        assert len(summary["balance"]) == LABELS[recipe.name]
        assert all(min(counts.values()) >= 1 for counts in summary["balance"].values())


SERVED = [path for path in RECIPES if path.name == "served-teacher.yaml"]


@pytest.mark.parametrize("path", SERVED, ids=[path.parent.name for path in SERVED])
def test_a_served_teacher_is_the_base_model_on_loopback(path: Path) -> None:
    recipe, sibling = load_recipe(path), load_recipe(path.with_name("recipe.yaml"))
    source, option, port = header_command(path, "serve")
    assert source == sibling.teacher.model
    assert (option, recipe.teacher.base_url) == ("--port", f"http://127.0.0.1:{port}/v1")
    assert recipe.teacher.model == f"openai:{source.removeprefix('pypi:')}"
    assert not leaves_machine(recipe.teacher)
    check_remote_allowed(recipe.teacher, recipe.privacy)
    assert_same_task(recipe, sibling)


def assert_same_task(one: Recipe, other: Recipe) -> None:
    assert (one.task, one.data.input, one.data.target) == (other.task, other.data.input, other.data.target)
