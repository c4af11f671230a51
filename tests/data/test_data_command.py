from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from slmops.cli.data import data
from slmops.errors import DataError, RecipeError

app = typer.Typer()
app.command()(data)


@pytest.fixture
def recipe(
    tmp_path: Path, rows_of: Callable[[int, int], list[dict[str, Any]]], write_jsonl: Callable[..., Path]
) -> Path:
    rows = rows_of(60, 3)
    rows[5]["text"] = "[bold]not markup[/] " + rows[5]["text"]
    write_jsonl([*rows, {"text": "", "label": "label-1"}], "rows.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text("name: small\ntask: classification\ndata: {train: rows.jsonl}\n")
    return path


def test_shows_balance_counts_and_rows(recipe: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), "--store", str(tmp_path / "store")]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert shown.exit_code == 0
    for part in ("label-2", "all rows", "Quarantined: 1 rows", "column text is empty", "train-", "Written:"):
        assert part in shown.output
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Found done:" in again.output


def test_json_is_one_object(recipe: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), "--store", str(tmp_path / "store"), "--json", "--set", "seed=3"]
    found = json.loads(CliRunner().invoke(app, arguments, catch_exceptions=False).stdout)
    assert found["summary"]["rows"] == {"train": 48, "validation": 6, "test": 6}
    assert found["reused"] is False
    assert Path(found["path"]).is_dir()
    assert json.loads(CliRunner().invoke(app, arguments).stdout)["reused"] is True


def test_errors_reach_the_caller(recipe: Path, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    with pytest.raises(DataError, match="There is no file"):
        CliRunner().invoke(app, [str(recipe), *store, "--set", "data.train=nowhere.csv"], catch_exceptions=False)
    with pytest.raises(RecipeError, match="Unknown key"):
        CliRunner().invoke(app, [str(recipe), *store, "--set", "data.oops=1"], catch_exceptions=False)
    assert not list((tmp_path / "store" / "artifacts").rglob("*.jsonl"))
