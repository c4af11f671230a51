"""``compress.quantize``: forms in few bits in a run, calibrated on the task's rows, trained on the grid where asked."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_helpers import Place
from safetensors.torch import load_file
from test_pipeline_formats import chats  # noqa: F401 - a fixture

from fakes.children import children_here
from slmops.artifacts import Checkpoint, Row, Variant
from slmops.artifacts.rows import Message
from slmops.errors import DataError, RecipeError
from slmops.evaluate.measure import Measurement
from slmops.models.grid import Grid, on_grid
from slmops.pipeline import prove, quantize, run_recipe, run_until
from slmops.pipeline.quantize import main_language
from slmops.recipe import Recipe, load_recipe, parse_recipe, portable_recipe
from slmops.store import Store

MEASURED = Measurement({"p50": 1.0, "p95": 1.0}, 1.0, 9, 9, 9, 0.1, 1, 1, 1, (1.0,))
ON_GRID = {"algorithm": "rtn", "recover": {"epochs": 1, "learning_rate": 1e-3}}


@pytest.mark.slow
def test_forms_in_few_bits_are_judged_and_the_chosen_one_is_shipped(
    chats: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prove, "measure_interleaved", lambda models, **_: dict.fromkeys(models, MEASURED))
    recipe = chats(
        compress={"quantize": ["gptq", ON_GRID], "calibration": {"rows": 8}, "choose": "int4-gptq"},
        train={"checkpoint_every_steps": 2},  # a tied matrix on the grid is written in between too
    )
    with children_here(), Store.open(tmp_path / "store") as store:
        result = run_recipe(recipe, store)
        again = run_recipe(recipe, store)
        forms = {entry["id"]: entry for entry in result.report["variants"]}
        variant = Variant.open(store.find(forms["student-int4-rtn-recovered"]["artifact"]).path)
        learnt = [
            Checkpoint.open(path)
            for path in Path(store.root, "artifacts", "checkpoint").iterdir()
            if Checkpoint.open(path).digest in variant.manifest.inputs.values()
        ]
    assert again.reused
    assert result.report["student"]["id"] == "student-int4-gptq"
    steps = {step["after"]: step for step in result.report["drift"]}
    for name in ("student-int4-gptq", "student-int4-rtn-recovered"):
        assert forms[name]["precision"] == "int4"
        assert forms[name]["size_bytes"] < 0.6 * forms["student-fp32"]["size_bytes"]
        assert (steps[name]["before"], steps[name]["step"]) == ("student-fp32", "quantized")
    # What was trained on the grid lies on it, and so export changes nothing more.
    (checkpoint,) = learnt
    weights = load_file(checkpoint.path / "model.safetensors")
    for name, weight in weights.items():
        if weight.ndim == 2:
            assert torch.equal(on_grid(weight.float(), Grid()), weight.float()), name


def test_names_say_what_was_done_and_choose_knows_them() -> None:
    raw = {"name": "x", "task": "qa", "data": {"train": "x.csv"}}

    def made(*forms: Any) -> Recipe:
        return parse_recipe({**raw, "compress": {"precisions": ["fp32"], "quantize": list(forms)}})

    recipe = made(
        "awq",
        "hqq",
        {"bits": 8, "algorithm": "rtn", "activations": "static"},
        {"block_size": 64, "symmetric": False},
        {"size_mb": 40, "name": "tight"},
    )
    assert recipe.compress.variants == (
        "fp32", "int4-awq", "int4-hqq", "int8-rtn-static", "int4-gptq-64-asymmetric", "tight",
    )  # fmt: skip
    assert not recipe.compress.quantize[1].symmetric


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_size": 48}, "block_size"),
        ({"bits": 3}, "bits"),
        ({"algorithm": "gtpq"}, "gptq"),
        ({"activations": "static"}, "activations: static goes with bits: 8 and algorithm: rtn"),
        ({"algorithm": "hqq", "symmetric": True}, "hqq finds a zero"),
        ({"bits": 8, "size_mb": 40}, "bits is 8"),
        ({"recover": {}}, "recover trains on the symmetric grid"),
    ],
)
def test_settings_that_contradict_themselves(settings: dict[str, Any], words: str) -> None:
    raw = {"name": "x", "task": "qa", "data": {"train": "x.csv"}, "compress": {"quantize": [settings]}}
    with pytest.raises(RecipeError, match=words):
        parse_recipe(raw)


def test_two_forms_of_one_name_are_refused() -> None:
    raw = {"name": "x", "task": "qa", "data": {"train": "x.csv"}, "compress": {"quantize": ["gptq", "gptq"]}}
    with pytest.raises(RecipeError, match="two variants named int4-gptq"):
        parse_recipe(raw)


def test_a_classifier_is_not_trained_on_a_grid(place: Place, tmp_path: Path) -> None:
    recipe = place.recipe(compress={"quantize": [ON_GRID]})
    with Store.open(tmp_path / "store") as store, pytest.raises(RecipeError, match="is not trained on a grid"):
        run_until(recipe, store, "data")


def test_a_file_to_calibrate_on_that_is_empty_stops_before_the_work(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    recipe = place.recipe(compress={"quantize": ["gptq"], "calibration": {"data": str(file)}})
    with Store.open(tmp_path / "store") as store, pytest.raises(DataError, match=r"rows\.jsonl: .*empty"):
        run_until(recipe, store, "data")


def test_rows_of_another_language_are_told(
    place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    german = "Guten Tag, ich habe meine Karte verloren und möchte bitte sofort eine neue Karte bestellen."
    file.write_text("".join(json.dumps({"text": f"{german} Nummer {i}"}) + "\n" for i in range(5)))
    english = [Row("1", (Message("user", "I have lost my card and would like to order another one, please."),), "yes")]
    assert main_language(english) == "en"
    assert main_language([Row("1", (Message("user", "ok"),))]) is None
    # Its own rows are too short to be sure.
    monkeypatch.setattr(quantize, "language_of", lambda text: "de" if "Karte" in text else "en")
    recipe = place.recipe(compress={"quantize": ["gptq"], "calibration": {"data": str(file)}})
    with Store.open(tmp_path / "store") as store, caplog.at_level(logging.WARNING):
        run_until(recipe, store, "data")
    told = [record.getMessage() for record in caplog.records if "another language" in record.getMessage()]
    assert "another language (de) than the training rows (en)" in told[0]


def test_the_file_is_found_beside_the_recipe_and_not_named_in_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ntask: qa\ndata: {train: x.csv}\ncompress: {calibration: {data: rows.jsonl}}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.compress.calibration.data == str(tmp_path / "rows.jsonl")
    assert portable_recipe(recipe)["compress"]["calibration"]["data"] == "rows.jsonl"
