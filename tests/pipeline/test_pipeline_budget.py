"""A budget's device, a budget that nothing meets, and a conversion that changes the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Done, Place
from test_pipeline_lifecycle import copied  # noqa: F401 - a fixture

from slmops.errors import GateError
from slmops.evaluate.limits import Limits
from slmops.evaluate.measure import DoesNotFitError, Measurement
from slmops.pipeline import prove, run_recipe
from slmops.store import Store


def run(root: Path, place: Place, **sections: Any) -> Mapping[str, Any]:
    with Store.open(root) as store:
        return run_recipe(place.recipe(**sections), store).report


def test_every_step_of_the_student_is_in_the_report(done: Done) -> None:
    steps = {step["after"]: step for step in done.result.report["drift"]}
    assert set(steps) == {"student-fp32", "student-int8"}
    assert (steps["student-fp32"]["before"], steps["student-int8"]["before"]) == ("student-torch", "student-fp32")
    assert (steps["student-fp32"]["step"], steps["student-int8"]["step"]) == ("converted", "quantized")
    exact = steps["student-fp32"]
    assert exact["tokens"]["share"] == exact["answers"]["share"] == exact["logits"]["top1_agreement"] == 1
    assert exact["logits"]["kl_mean"] < 1e-6
    assert 0 <= steps["student-int8"]["logits"]["kl_mean"] < 1
    page = (done.store / "runs" / "tiny" / "report.html").read_text("utf-8")
    assert "Did a step change the model?" in page
    assert "student-torch → student-fp32" in page


def test_a_device_limits_the_process_and_brings_estimates(done: Done, copied: Path) -> None:  # noqa: F811
    report = run(copied, done.place, budget={"device": "raspberry-pi-5", "latency_ms_p95": 5000})
    assert report["passed"]
    assert report["budget"]["memory_mb"] == 6000
    by_name = {gate["name"]: gate for gate in report["gates"]}
    assert by_name["memory_mb"]["limit"] == 6000
    assert "Estimate for raspberry-pi-5" in by_name["latency_ms_p95"]["note"]
    for entry in report["variants"]:
        assert entry["on_device"]["estimate"] is True
        limits = entry["measurement"]["limits"]
        assert limits["cores"] <= 4
        assert (limits["memory_bytes"] == 6_000_000_000) is (entry["id"] in {"student-fp32", "student-int8"})
    page = (copied / "runs" / "tiny" / "report.html").read_text("utf-8")
    assert "On raspberry-pi-5: estimates" in page


def test_a_budget_that_nothing_meets_says_what_is_closest(done: Done, copied: Path) -> None:  # noqa: F811
    report = run(copied, done.place, budget={"size_mb": 0.01})
    assert not report["passed"]
    assert [miss["id"] for miss in report["closest"]] == ["student-int8", "student-fp32"]
    [shortfall] = report["closest"][0]["gives_up"]
    assert (shortfall["gate"], shortfall["limit"]) == ("size_mb", 0.01)
    assert report["closest_in_words"][0] == "Nothing meets the budget. Closest is student-int8."
    assert {one["id"]: one["passed"] for one in report["candidates"]} == {"student-fp32": False, "student-int8": False}
    page = (copied / "runs" / "tiny" / "report.html").read_text("utf-8")
    assert "What each would have to give up" in page


def test_a_model_that_does_not_fit_is_measured_without_the_limit() -> None:
    asked: list[Mapping[str, Limits]] = []
    measured = Measurement({"p50": 1.0, "p95": 1.0}, 1.0, 9, 9, 9, 0.1, 1, 1, 1, (1.0,))

    def measure(held: Mapping[str, Limits]) -> dict[str, Measurement]:
        asked.append(dict(held))
        if held["large"].memory_bytes is not None:
            raise DoesNotFitError("large does not run in 5 MB.", name="large")
        return {"large": measured, "small": measured}

    found = prove._measure_within({"large": Limits(5, 2), "small": Limits(5, 2)}, measure)
    assert [held["large"].memory_bytes for held in asked] == [5, None]
    assert found["large"].limits == {"memory_bytes": 5, "fits": False}
    assert found["small"].limits is None


def test_a_conversion_that_changes_the_model_stops_the_run(
    done: Done,
    copied: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph gets other weights in its first layer than torch has: named before anything is measured."""
    import onnx
    from onnx import numpy_helper

    export = prove.export_classifier

    def damaging(checkpoint: Path, draft: Any, **options: Any) -> None:
        export(checkpoint, draft, **options)
        if options["precision"] != "fp32":
            return
        path = draft.path / "model" / "model.onnx"
        model = onnx.load(path)
        [weight] = [one for one in model.graph.initializer if one.name.endswith("mlp.down")]
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * -40, weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(prove, "export_classifier", damaging)
    with pytest.raises(GateError) as error, Store.open(copied) as store:
        run_recipe(done.place.recipe(name="damaged"), store)
    assert "student-torch → student-fp32" in error.value.message
    assert "starts at layer 0" in error.value.message
    assert "another runtime" in (error.value.remedy or "")
    assert not (copied / "runs" / "damaged" / "report.json").exists()
    assert json.dumps(error.value.message)
