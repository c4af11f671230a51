"""Language models through onnxruntime-genai's builder, against torch on the same weights."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Message, Variant, drafting
from slmops.artifacts.base import Draft
from slmops.compress import export_generator, torch_variant
from slmops.compress import generator as exporting
from slmops.errors import ConversionError, ModelError
from slmops.progress import Progress
from slmops.recipe import Precision
from slmops.runtime import GenerationRequest, Generator, open_generator

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny-chat", "max_tokens": 256, "system": "Be brief."}
CONVERSATIONS = [
    ((Message("user", "hello"),), "how are you today?"),
    ((Message("user", "my card is lost"),), "refund"),
    ((Message("user", "ü€😀"),), "the balance of my account"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def variants(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    root = tmp_path_factory.mktemp("variants")
    for precision in PRECISIONS:
        with drafting("variant", root / precision) as draft:
            export_generator(checkpoint, draft, precision=precision, **ABOUT)
    return {precision: Variant.open(root / precision) for precision in PRECISIONS}


def logprobs(generator: Generator) -> np.ndarray:
    return np.array([score.logprob for score in generator.score(CONVERSATIONS)])


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Generator:
    return open_generator(checkpoint, threads=1)


def test_every_precision_scores_text_as_torch_does(variants: dict[str, Variant], reference: Generator) -> None:
    expected = logprobs(reference)
    allowed = {"fp32": 1e-3, "fp16": 0.1, "int8": 1.0, "int4": 12.0}  # nats, of some hundred
    assert expected.max() < -5
    for precision, variant in variants.items():
        given = logprobs(open_generator(variant.model_path, threads=1))
        assert np.abs(given - expected).max() < allowed[precision], precision


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_greedy_answers_are_torchs(variants: dict[str, Variant], reference: Generator, precision: str) -> None:
    generator = open_generator(variants[precision].model_path, threads=1)
    system = (Message("system", "Be brief."),)  # torch's folder does not say it
    for messages, _ in CONVERSATIONS:
        request = GenerationRequest(system + messages, max_tokens=12)
        assert generator.generate([request])[0].text == reference.generate([request])[0].text


def test_files_are_those_that_a_runtime_reads(variants: dict[str, Variant]) -> None:
    for precision, variant in variants.items():
        assert {Path(name).name for name in variant.manifest.files} == {
            "model.onnx",
            "model.onnx.data",
            "genai_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "slmops.json",
        }
        description = variant.description
        assert description["runtime"] == "onnx-genai"
        assert description["form"] == "generator"
        assert description["precision"] == precision
        assert description["labels"] is None
        assert description["parameters"] > 50_000
        assert {name: description[name] for name in ABOUT} == ABOUT


def test_fewer_bits_take_less_room(variants: dict[str, Variant]) -> None:
    sizes = [(variants[p].model_path / "model.onnx.data").stat().st_size for p in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.4 * sizes[0]


def test_tied_embeddings_are_stored_once_in_8_bits(variants: dict[str, Variant]) -> None:
    graph = onnx.load(variants["int8"].model_path / "model.onnx").graph
    wide = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 16_384]
    assert wide == []
    reads = next(node for node in graph.node if node.op_type == "GatherBlockQuantized")
    layer = next(node for node in graph.node if node.op_type == "MatMulNBits" and reads.input[2] == node.input[2])
    shape = next(node for node in graph.node if node.output and node.output[0] == reads.input[0])
    assert shape.input[0] == layer.input[1]


@pytest.mark.slow
def test_untied_embeddings_are_narrowed_too(tmp_path: Path, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    untied = tmp_path / "untied"
    model.save_pretrained(untied)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (untied / name).write_bytes((checkpoint / name).read_bytes())
    expected = logprobs(open_generator(untied, threads=1))
    for precision, allowed in (("int8", 3.0), ("int4", 12.0)):
        with drafting("variant", tmp_path / precision) as draft:
            export_generator(untied, draft, precision=precision, **ABOUT)  # type: ignore[arg-type]
        folder = tmp_path / precision / "model"
        assert np.abs(logprobs(open_generator(folder, threads=1)) - expected).max() < allowed
        graph = onnx.load(folder / "model.onnx").graph
        wide = [t.name for t in graph.initializer if t.data_type == 1 and np.prod(t.dims) >= 300 * 64]
        assert wide == []


def test_as_trained(checkpoint: Path, tmp_path: Path, reference: Generator) -> None:
    with drafting("variant", tmp_path / "v") as draft:
        torch_variant(checkpoint, draft, form="generator", **ABOUT)
    variant = Variant.open(tmp_path / "v")
    assert variant.description["runtime"] == "torch"
    assert variant.description["labels"] is None
    np.testing.assert_allclose(logprobs(open_generator(variant.model_path, threads=1)), logprobs(reference), atol=1e-4)


# --- what can go wrong


def draft_in(path: Path) -> Draft:
    (path / "draft").mkdir()
    (path / "work").mkdir()
    return Draft(path / "draft", path / "work")


def copy_without(checkpoint: Path, folder: Path, missing: str) -> Path:
    folder.mkdir()
    for path in checkpoint.iterdir():
        if path.name != missing:
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(checkpoint: Path, tmp_path: Path, missing: str) -> None:
    broken = copy_without(checkpoint, tmp_path / "broken", missing)
    with pytest.raises(ModelError, match=missing):
        export_generator(broken, draft_in(tmp_path), precision="fp32", **ABOUT)


def test_a_classifier_is_turned_away(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_without(checkpoint, tmp_path / "c", "")
    (folder / "labels.json").write_text('["a"]', "utf-8")
    with pytest.raises(ModelError, match="is a classifier"):
        export_generator(folder, draft_in(tmp_path), precision="fp32", **ABOUT)


def test_a_model_that_the_builder_does_not_know_is_named_and_its_log_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy_without(checkpoint, tmp_path / "c", "")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfForCausalLM"]}), "utf-8")
    draft = draft_in(tmp_path)
    with pytest.raises(ConversionError, match="builder does not know models of the type 'UnheardOfForCausalLM'"):
        export_generator(folder, draft, precision="int4", **ABOUT)
    log = draft.work / "builder-int4.log"
    assert "Traceback" in log.read_text("utf-8")


def test_a_builder_that_ends_well_without_a_model_is_noticed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.raises(ConversionError, match=r"ended without model\.onnx"):
        export_generator(checkpoint, draft_in(tmp_path), precision="int4", **ABOUT)


def test_the_builder_runs_offline_and_quietly(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "record"
    script.write_text(f"#!/bin/sh\nenv > {tmp_path}/environment\necho noise\necho noise >&2\nexit 3\n", "utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    before = dict(os.environ)
    with pytest.raises(ConversionError, match="exit code 3: noise / noise"):
        export_generator(checkpoint, draft_in(tmp_path), precision="fp32", **ABOUT)
    seen = (tmp_path / "environment").read_text("utf-8").splitlines()
    assert {"HF_HUB_OFFLINE=1", "HF_HUB_DISABLE_TELEMETRY=1", "ORT_DISABLE_TELEMETRY=1"} <= set(seen)
    assert dict(os.environ) == before
    assert "noise" not in "".join(capfd.readouterr())


def test_progress_runs_from_nothing_to_all(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(checkpoint: Path, work: Path, *_: Any) -> Path:
        built = work / "built"
        built.mkdir()
        for name in ("model.onnx", "genai_config.json"):
            (built / name).write_text("{}", "utf-8")
        return built

    monkeypatch.setattr(exporting, "_build", build)
    monkeypatch.setattr(exporting, "ask_genai", lambda folder: -1.0)
    events: list[Progress] = []
    export_generator(checkpoint, draft_in(tmp_path), precision="fp32", **ABOUT, progress=events.append)
    assert [event.done for event in events] == [0, 1, 2, 3]


def test_a_model_that_cannot_be_loaded_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(checkpoint: Path, work: Path, *_: Any) -> Path:
        built = work / "built"
        built.mkdir()
        for name in ("model.onnx", "genai_config.json"):
            (built / name).write_text("{}", "utf-8")
        return built

    monkeypatch.setattr(exporting, "_build", build)
    with pytest.raises(ConversionError, match="cannot be run"):
        export_generator(checkpoint, draft_in(tmp_path), precision="fp32", **ABOUT)
