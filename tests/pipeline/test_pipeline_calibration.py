"""A run with enough validation rows: the bundle says how sure it may be, and the report by how much that helped."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pipeline_helpers import Done, Place

from slmops.artifacts import Bundle, Dataset
from slmops.errors import RecipeError
from slmops.evaluate.scores import expected_calibration_error, probabilities_of
from slmops.package import verify_bundle
from slmops.pipeline import run_recipe
from slmops.runtime import ModelDescription, open_classifier
from slmops.runtime.calibration import calibrated
from slmops.store import Store


def test_the_bundle_is_calibrated_and_the_report_says_by_how_much(done: Done, tmp_path: Path) -> None:
    recipe = done.place.recipe(
        data={"split": {"validation": 0.45, "test": 0.2}},
        compress={"precisions": ["fp32"]},
        evaluate={"answered_accuracy": 0.999, "untaught_baseline": False},
    )
    with Store.open(tmp_path / "store") as store:
        result = run_recipe(recipe, store)
        data = Dataset.open(next((tmp_path / "store" / "artifacts" / "dataset").glob("*")))
    told = result.report["calibration"]
    folder = Path(result.report["bundle"])
    assert verify_bundle(folder) == []
    model = Bundle.open(folder).model_path
    description = ModelDescription.read(model)
    assert description.temperature == told["temperature"] != 1
    assert description.threshold == told["threshold"]
    test = [row for row in data.rows("test") if row.target is not None]
    classifier = open_classifier(model)
    probabilities = probabilities_of(classifier, [row.text for row in test])
    classifier.close()
    right = np.array(
        [classifier.labels[int(row.argmax())] == one.target for row, one in zip(probabilities, test, strict=True)]
    )
    for temperature, ece in ((1.0, told["ece_before"]), (told["temperature"], told["ece_after"])):
        scaled = calibrated(probabilities.astype(np.float32), temperature)
        found = expected_calibration_error(scaled.max(axis=1).astype(np.float64), right.astype(np.float64))
        assert found == pytest.approx(ece, abs=1e-3)
    page = (folder.parent / "report.html").read_text("utf-8")
    card = (folder / "MODEL_CARD.md").read_text("utf-8")
    for text in (page, card):
        assert "Confidence is calibrated by the temperature" in text
    assert json.loads((folder / "report.json").read_text("utf-8"))["calibration"] == told


def test_few_rows_calibrate_nothing(done: Done) -> None:
    assert done.result.report["calibration"] is None
    model = Bundle.open(Path(done.result.report["bundle"])).model_path
    assert ModelDescription.read(model).temperature == 1


def test_two_ways_to_a_threshold_are_one_too_many(place: Place) -> None:
    with pytest.raises(RecipeError, match="keep one of them"):
        place.recipe(evaluate={"abstain_below": 0.5, "answered_accuracy": 0.9})
