"""Measures of a user's own in a whole run: refused before training, judged, reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Done, Place
from test_pipeline_lifecycle import copied  # noqa: F401 - a fixture

from slmops.errors import RecipeError
from slmops.pipeline import run_recipe
from slmops.pipeline.judge import judge_model
from slmops.store import Store

WORTH = """
def minutes(predictions, rows):
    right = [answer == row.target for answer, row in zip(predictions, rows)]
    return {"minutes_saved": [3.0 if ok else -1.0 for ok in right], "all_right": float(all(right))}

def short(predictions, rows):
    return {"worth": [1.0] * (len(rows) - 1)}

def fails_on_nothing(predictions, rows):
    return {"first_letters": [float(ord(text[0])) for text in predictions]}
"""


@pytest.fixture
def worth(tmp_path: Path) -> Path:
    (tmp_path / "worth.py").write_text(WORTH)
    return tmp_path / "worth.py"


def sections(place: Place, worth: Path, function: str, **gates: Any) -> dict[str, Any]:
    return {"evaluate": {"metrics": [f"{worth}:{function}"]}, "gates": {"metrics": gates}}


@pytest.mark.parametrize(
    ("function", "gates", "said"),
    [
        ("short", {}, "worth in the shape"),
        ("fails_on_nothing", {}, "raised IndexError"),
        ("minutes", {"hours_saved": ">= 1"}, "names hours_saved, which nothing measures.*minutes_saved, all_right"),
        ("seconds", {}, "has no function seconds"),
    ],
)
def test_a_bad_measure_ends_the_run_before_anything_is_trained(
    place: Place, tmp_path: Path, worth: Path, function: str, gates: dict[str, str], said: str
) -> None:
    with Store.open(tmp_path / "store") as store:
        with pytest.raises(RecipeError, match=said):
            run_recipe(place.recipe(**sections(place, worth, function, **gates)), store)
        kinds = {path.name for path in (store.root / "artifacts").iterdir()}
    assert kinds == {"dataset"}


def test_measures_are_judged_compared_and_shown(done: Done, copied: Path, worth: Path) -> None:  # noqa: F811
    wanted = sections(done.place, worth, "minutes", minutes_saved=">= 2.9", macro_f1=">= 0")
    with Store.open(copied) as store:
        report = run_recipe(done.place.recipe(**wanted), store).report
        folder = store.root / "runs" / "tiny"
        found = judge_model(done.place.recipe(**wanted), store, folder / "bundle")
    told = report["measures"]["minutes_saved"]
    value = 4 * report["student"]["score"]["value"] - 1
    assert told["student"]["value"] == pytest.approx(value)
    low, high = told["student"]["ci95"]
    assert low <= value <= high
    assert told["test"]["difference"] == pytest.approx(told["student"]["value"] - told["teacher"]["value"])
    assert report["baselines"]["majority"]["measures"]["minutes_saved"]["value"] < 3
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["minutes_saved"]["passed"] == (value >= 2.9)
    assert gates["macro_f1"]["passed"]
    page = (folder / "report.html").read_text("utf-8")
    assert "Measures of your own" in page
    assert "minutes saved" in page
    assert found.scores.measures["minutes_saved"].value == pytest.approx(value)
    assert [gate.name for gate in found.gates] == ["minutes_saved", "macro_f1"]
