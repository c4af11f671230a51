"""``compress.formats``: the student for other engines, compared, scored, measured and shipped like its other forms."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Place

from fakes.children import children_here
from skipping import skip_or_fail
from slmops.artifacts import Message
from slmops.compress import formats
from slmops.errors import MissingExtraError, RecipeError
from slmops.evaluate.measure import Measurement
from slmops.pipeline import prove, run_recipe
from slmops.recipe import FormatConfig, Recipe, load_recipe, parse_recipe, portable_recipe
from slmops.runtime import GenerationRequest, open_generator
from slmops.store import Store

ENGINES = {"gguf:q8_0": "xllamacpp", "openvino:fp32": "openvino"}


@pytest.fixture(scope="module")
def chats(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    folder = tmp_path_factory.mktemp("formats")
    things = {"card": "the card is here", "fee": "the fee is here", "top up": "the top up is here"}
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows(
            [f"{number} hello where is my {thing}", things[thing]] for number in range(12) for thing in things
        )

    def recipe(**sections: Any) -> Recipe:
        raw: dict[str, Any] = {
            "name": "tiny-chat",
            "task": "conversation",
            "data": {
                "train": str(folder / "rows.csv"),
                "input": "{question}",
                "target": "{answer}",
                "near_duplicates": None,
                "split": {"validation": 0.1, "test": 0.15},
            },
            "teacher": {
                "model": str(place.teacher),
                "adapt_epochs": 1,
                "adapt_method": "full",
                "max_tokens": 16,
                "min_success_ratio": 0.0,
            },
            "student": {"layers": 1},
            "train": {"epochs": 1, "batch_size": 4, "precision": "fp32", "max_tokens": 96},
            "compress": {"precisions": ["fp32"], "teacher_precisions": []},
            "evaluate": {"untaught_baseline": False, "latency_requests": 5, "threads": 1, "max_new_tokens": 8},
            "gates": {"retention": 0.0, "format_valid": 0.0, "parity": 1.0},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section}
        return parse_recipe(raw)

    return recipe


@pytest.mark.slow
def test_formats_are_judged_like_precisions_and_the_chosen_one_is_shipped(
    chats: Callable[..., Recipe], tmp_path: Path
) -> None:
    made = [name for name, module in ENGINES.items() if find_spec(module) is not None]
    if find_spec("olive") is not None:
        (tmp_path / "eight.json").write_text(
            json.dumps({"passes": {"build": {"type": "ModelBuilder", "precision": "int8"}}})
        )
        made.append(f"olive:{tmp_path / 'eight.json'}")
    if not made:
        pytest.skip("no engine of a further format is installed")
    names = [FormatConfig.model_validate(name).variant for name in made]
    recipe = chats(compress={"formats": made, "choose": names[0]})
    with children_here(), Store.open(tmp_path / "store") as store:
        result = run_recipe(recipe, store)
    report = result.report
    forms = {entry["id"]: entry for entry in report["variants"]}
    assert {f"student-{name}" for name in names} <= set(forms)
    assert report["student"]["id"] == f"student-{names[0]}"
    runtimes = {"gguf": "llama.cpp", "openvino": "openvino", "olive": "onnx-genai"}
    for name in names:
        entry = forms[f"student-{name}"]
        assert entry["runtime"] == runtimes[name.split("-")[0]]
        assert entry["score"]["rows"] > 0
        assert entry["latency_ms"]["p50"] > 0
        assert entry["memory_bytes_peak"] > 0
    steps = {step["after"]: step for step in report["drift"]}
    for name in names:
        step = steps[f"student-{name}"]
        assert step["before"] == "student-fp32"
        assert step["tokens"]["share"] == 1
    if "openvino-fp32" in names:
        exact = steps["student-openvino-fp32"]
        assert (exact["step"], exact["logits"]["top1_agreement"], exact["answers"]["share"]) == ("converted", 1, 1)
    if "gguf-q8_0" in names:
        assert steps["student-gguf-q8_0"]["engine_tokens"]["share"] == 1
    folder = result.folder / "bundle" / "model"
    generator = open_generator(folder, threads=1)
    assert generator.generate([GenerationRequest((Message("user", "hello"),), max_tokens=4)])[0].completion_tokens >= 0
    generator.close()
    with Store.open(tmp_path / "store") as store:
        assert run_recipe(recipe, store).reused


@pytest.mark.slow
def test_an_adapter_that_olive_trained_is_kept_beside_its_base(
    chats: Callable[..., Recipe], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("olive")
    measured = Measurement({"p50": 1.0, "p95": 1.0}, 1.0, 9, 9, 9, 0.1, 1, 1, 1, (1.0,))
    # How long they take is measured in the test above.
    monkeypatch.setattr(prove, "measure_interleaved", lambda models, **_: dict.fromkeys(models, measured))
    recipe = chats(
        teacher={"adapt_epochs": 1},
        student={"model": str(place.teacher), "layers": None},
        train={"engine": "olive", "epochs": 1, "learning_rate": 1e-2},
        compress={"formats": ["onnx-adapters"], "choose": "onnx-adapters-fp32"},
    )
    with children_here(), Store.open(tmp_path / "store") as store:
        result = run_recipe(recipe, store)
    step = next(step for step in result.report["drift"] if step["after"] == "student-onnx-adapters-fp32")
    assert step["logits"]["top1_agreement"] == step["answers"]["share"] == 1
    assert step["logits"]["kl_mean"] < 1e-5
    folder = result.folder / "bundle" / "model"
    assert [path.name for path in (folder / "adapters").iterdir()] == ["tiny-chat.onnx_adapter"]
    generator = open_generator(folder, threads=1)
    question = (Message("user", "3 hello where is my card"),)
    said = {
        adapter: generator.generate([GenerationRequest(question, max_tokens=8, adapter=adapter)])[0].logprob
        or generator.generate([GenerationRequest(question, max_tokens=8, adapter=adapter)])[0].text
        for adapter in ("tiny-chat", "")
    }
    assert said["tiny-chat"] != said[""]


def test_short_and_long_forms_in_a_recipe(chats: Callable[..., Recipe]) -> None:
    recipe = chats(
        compress={
            "formats": [
                "gguf",
                "gguf:q8_0",
                {"format": "openvino", "quantization": "int4", "name": "cpu"},
                "olive:passes/My File.json",
            ]
        }
    )
    assert [one.variant for one in recipe.compress.formats] == ["gguf-q4_k_m", "gguf-q8_0", "cpu", "olive-my-file"]
    assert [one.stored_as for one in recipe.compress.formats] == ["q4_k_m", "q8_0", "int4", ""]
    assert portable_recipe(recipe)["compress"]["formats"][3]["config"] == "My File.json"
    assert chats(compress={"formats": "gguf:f16"}).compress.formats[0].stored_as == "f16"


def test_paths_are_those_of_the_recipe(tmp_path: Path) -> None:
    formats = "['olive:o.json', {format: olive, config: p.json}]"
    text = f"name: a\ntask: conversation\ndata: {{train: rows.csv}}\ncompress: {{formats: {formats}}}\n"
    (tmp_path / "recipe.yaml").write_text(text, "utf-8")
    found = load_recipe(tmp_path / "recipe.yaml").compress.formats
    assert [one.config for one in found] == [str(tmp_path / "o.json"), str(tmp_path / "p.json")]


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (["gguf:q3"], "'q3' is no quantization of gguf; it is one of f32"),
        (["tflite"], "formats"),
        (["olive"], "olive needs its configuration file"),
        ([{"format": "gguf", "config": "a.json"}], "config is for olive"),
        (["gguf:q8_0", "gguf:q8_0"], "two variants named gguf-q8_0"),
    ],
)
def test_formats_that_cannot_be(chats: Callable[..., Recipe], made: list[Any], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        chats(compress={"formats": made})


def test_labels_have_no_such_formats(place: Place) -> None:
    with pytest.raises(RecipeError, match="holds models that write text"):
        place.recipe(compress={"formats": ["gguf"]})


def test_what_is_missing_is_told_before_anything_is_trained(
    chats: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(**compress: Any) -> None:
        with Store.open(tmp_path / "store") as store:
            run_recipe(chats(compress=compress), store)

    with pytest.raises(RecipeError, match=r"compress\.choose is int4.*formats or quantize"):
        run(choose="int4")
    with pytest.raises(RecipeError, match="no adapter is left"):
        run(formats=["onnx-adapters"])
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "xllamacpp" else object())
    with pytest.raises(MissingExtraError, match=r"gguf.*llamacpp"):
        run(formats=["gguf"])
    with pytest.raises(RecipeError, match="there is no file"):
        run(formats=["olive:/nowhere.json"])
    assert not list((tmp_path / "store" / "artifacts").rglob("manifest.json"))


def test_other_engines_and_algorithms_stand_in_a_search(chats: Callable[..., Recipe], tmp_path: Path) -> None:
    if find_spec("openvino") is None:
        skip_or_fail("openvino")
    recipe = chats(
        compress={
            "precisions": ["fp32"],
            "teacher_precisions": [],
            "formats": ["openvino:fp32"],
            "quantize": ["rtn"],
        },
        search={"goal": "budget", "space": {"student.layers": [1, 2]}, "rungs": 2},
    )
    with Store.open(tmp_path) as store:
        report = run_recipe(recipe, store).report
    found = report["search"]
    names = ("fp32", "int4-rtn", "openvino-fp32")
    assert {one["id"] for one in found["candidates"]} == {f"{number}-{name}" for number in (0, 1) for name in names}
    size = {one["id"]: one["size_bytes"] for one in found["candidates"]}
    assert all(size[f"{number}-int4-rtn"] < size[f"{number}-fp32"] for number in (0, 1))
    # What was chosen on the validation rows is among the forms that the run then made.
    assert {f"student-{name}" for name in names} <= {one["id"] for one in report["variants"]}
