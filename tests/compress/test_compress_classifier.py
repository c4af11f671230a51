"""Classifiers through their graphs, against torch on the same weights."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from fakes.tiny_models import tiny_tokenizer
from slmops.artifacts import Variant, drafting
from slmops.artifacts.base import Draft
from slmops.compress import classifier as exporting
from slmops.compress import export_classifier, torch_variant
from slmops.compress.llama_graph import llama_graph, why_not
from slmops.compress.torch_graph import torch_graph
from slmops.errors import ConversionError, ModelError
from slmops.models.classifier import PooledClassifier, load_classifier, save_classifier
from slmops.progress import Progress
from slmops.recipe import Precision
from slmops.runtime import open_classifier

LABELS = ("card lost", "refund", "wann kommt sie?", "top_up", "fee")
VOCABULARY = 300
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int4")
TEXTS = ["my card is lost", "", "fee", "where is my refund? ü😀 " * 20, "hello world how are you", "balance " * 3]
ABOUT: dict[str, Any] = {"task": "classification", "name": "tiny", "max_tokens": 48}


def write_checkpoint(
    folder: Path, *, causal: bool, kv_heads: int = 4, layers: int = 2, grouped_bias: bool = False, scale: float = 0.12
) -> Path:
    """Random weights, wide enough that logits are far apart, and norms that are not all ones."""
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        attention_bias=grouped_bias,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    if not causal:
        config.is_causal = False
    return save_random(LlamaModel(config), folder, scale)


def save_random(backbone: Any, folder: Path, scale: float = 0.12) -> Path:
    classifier = PooledClassifier(backbone, LABELS)
    for parameter in classifier.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=scale)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.init.normal_(classifier.head.weight, std=1.0)
    save_classifier(classifier, folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"), pretty=True)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("student"), causal=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher"), causal=True, kv_heads=2, layers=3)


def compress(checkpoint: Path, destination: Path, precision: Precision, **options: Any) -> Variant:
    with drafting("variant", destination) as draft:
        export_classifier(checkpoint, draft, precision=precision, **{**ABOUT, **options})
    return Variant.open(destination)


@pytest.fixture(scope="module")
def variants(student: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    root = tmp_path_factory.mktemp("variants")
    return {precision: compress(student, root / precision, precision, work_fp32=root / "w") for precision in PRECISIONS}


def as_trained(checkpoint: Path, destination: Path) -> np.ndarray:
    """What torch answers to :data:`TEXTS`, cut at the same length."""
    with drafting("variant", destination) as draft:
        torch_variant(checkpoint, draft, form="classifier", **ABOUT)
    return open_classifier(destination / "model", threads=1).probabilities(TEXTS)


@pytest.fixture(scope="module")
def expected(student: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return as_trained(student, tmp_path_factory.mktemp("as-trained") / "v")


def run(model: onnx.ModelProto, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits: np.ndarray = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    return logits


def torch_logits(classifier: PooledClassifier, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        logits: np.ndarray = classifier(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    return logits


def batch(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (len(lengths), max(lengths)))
    return ids, (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)


def own_graph(folder: Path) -> onnx.ModelProto:
    weights = {name: tensor.numpy() for name, tensor in load_classifier(folder).state_dict().items()}
    return llama_graph(weights, json.loads((folder / "config.json").read_text()), max_tokens=48)


@pytest.mark.parametrize("lengths", [[1], [2], [48], [1, 1], [1, 48], [5, 3, 17, 1], [30, 31, 2, 48, 7, 9]])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_the_graph_gives_torchs_logits_at_any_length_and_padding(
    which: str, lengths: list[int], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    ids, mask = batch(lengths)
    expected = torch_logits(load_classifier(folder), ids, mask)
    logits = run(own_graph(folder), ids, mask)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(axis=1), expected.argmax(axis=1))


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_what_stands_in_the_padding_does_not_matter(which: str, request: pytest.FixtureRequest) -> None:
    graph = own_graph(request.getfixturevalue(which))
    ids, mask = batch([3, 20])
    other = np.where(mask == 1, ids, 7)
    np.testing.assert_allclose(run(graph, ids, mask), run(graph, other, mask), atol=1e-5)
    np.testing.assert_allclose(run(graph, ids, mask)[:1], run(graph, ids[:1, :3], mask[:1, :3]), atol=1e-5)


def test_direction_matters_or_the_masks_would_be_untested(student: Path, teacher: Path, tmp_path: Path) -> None:
    """The student's weights under a causal mask answer differently."""
    config = json.loads((student / "config.json").read_text())
    weights = {name: tensor.numpy() for name, tensor in load_classifier(student).state_dict().items()}
    ids, mask = batch([12])
    both_sides = run(llama_graph(weights, config, 48), ids, mask)
    causal = run(llama_graph(weights, {**config, "is_causal": True}, 48), ids, mask)
    assert np.abs(both_sides - causal).max() > 0.05


def test_the_graph_is_small_and_its_tables_take_no_room(student: Path) -> None:
    weights = {name: tensor.numpy() for name, tensor in load_classifier(student).state_dict().items()}
    config = json.loads((student / "config.json").read_text())
    short, long = (llama_graph(weights, config, tokens) for tokens in (16, 100_000))
    assert len(short.graph.node) < 55
    assert abs(long.ByteSize() - short.ByteSize()) < 16
    assert short.ByteSize() < 4 * sum(weight.size for weight in weights.values()) + 10_000


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "mistral"}, "mistral"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "biases"),
        ({"mlp_bias": True}, "biases"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "scaled"),
        ({"is_causal": False, "num_key_value_heads": 2}, "grouped"),
    ],
)
def test_other_architectures_are_turned_away_with_a_reason(teacher: Path, change: dict[str, Any], word: str) -> None:
    config = json.loads((teacher / "config.json").read_text())
    assert why_not(config) is None
    assert word in (why_not({**config, **change}) or "")


# --- the general way


@pytest.mark.parametrize("causal", [True, False])
def test_torchs_exporter_serves_the_rest(tmp_path: Path, causal: bool) -> None:
    folder = write_checkpoint(tmp_path / "c", causal=causal, kv_heads=2, layers=1, grouped_bias=True)
    classifier = load_classifier(folder)
    graph = torch_graph(classifier)
    for lengths in ([1], [9], [4, 1, 13]):
        ids, mask = batch(lengths)
        expected = torch_logits(classifier, ids, mask)
        np.testing.assert_allclose(run(graph, ids, mask), expected, atol=1e-4)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_another_architecture_is_exported_whole(tmp_path: Path, precision: Precision) -> None:
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    folder = save_random(MistralModel(config), tmp_path / "mistral")
    variant = compress(folder, tmp_path / "out", precision)
    expected = as_trained(folder, tmp_path / "as-trained")
    given = open_classifier(variant.model_path, threads=1).probabilities(TEXTS)
    assert (given.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.8
    graph = onnx.load(variant.model_path / "model.onnx")
    left = [t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 64 * 64]
    assert not left


# --- variants


def test_a_variant_holds_the_graph_the_tokenizer_and_its_description(
    variants: dict[str, Variant], student: Path
) -> None:
    for precision, variant in variants.items():
        assert set(variant.manifest.files) == {"model/model.onnx", "model/tokenizer.json", "model/slmops.json"}
        assert variant.description == {
            "runtime": "onnx",
            "form": "classifier",
            "precision": precision,
            "parameters": load_classifier(student).parameters_count,
            "labels": list(LABELS),
            "system": None,
            "pad_token_id": 0,
            **ABOUT,
        }
        assert variant.manifest.metrics["precision"] == precision
        variant.verify()


def test_the_tokenizer_is_the_same_without_its_white_space(variants: dict[str, Variant], student: Path) -> None:
    before, after = student / "tokenizer.json", variants["int8"].model_path / "tokenizer.json"
    assert json.loads(before.read_text("utf-8")) == json.loads(after.read_text("utf-8"))
    assert after.stat().st_size < 0.8 * before.stat().st_size


def test_fewer_bits_take_less_room_and_answer_alike(variants: dict[str, Variant], expected: np.ndarray) -> None:
    sizes = [(variants[p].model_path / "model.onnx").stat().st_size for p in PRECISIONS]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < 0.6 * sizes[0]
    assert sizes[2] < 0.4 * sizes[0]
    allowed = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.15, "int4": 0.6}
    for precision, variant in variants.items():
        given = open_classifier(variant.model_path, threads=1).probabilities(TEXTS)
        assert np.abs(given - expected).max() < allowed[precision], precision


def test_no_large_weight_is_left_wide(variants: dict[str, Variant]) -> None:
    """Embeddings above all: they are most of a small model."""
    for precision in ("fp16", "int8", "int4"):
        graph = onnx.load(variants[precision].model_path / "model.onnx").graph
        wide = [t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) >= 4096]
        assert wide == [], precision


def test_a_large_graph_keeps_its_weights_beside_it(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmops.compress.graph_files.EXTERNAL_BYTES", 1000)
    for precision in PRECISIONS:
        variant = compress(student, tmp_path / precision, precision, work_fp32=tmp_path / "w")
        assert "model/model.onnx.data" in variant.manifest.files
        assert (variant.model_path / "model.onnx").stat().st_size < 40_000
        expected = open_classifier(student, threads=1).probabilities(["my card"])
        given = open_classifier(variant.model_path, threads=1).probabilities(["my card"])
        assert np.abs(given - expected).max() < 0.6
        if precision == "fp32":
            np.testing.assert_allclose(given, expected, atol=1e-4)


def test_the_kept_graph_belongs_to_its_weights(student: Path, teacher: Path, tmp_path: Path) -> None:
    for source in (student, teacher):
        variant = compress(source, tmp_path / source.name, "fp32", work_fp32=tmp_path / "w")
        np.testing.assert_allclose(
            open_classifier(variant.model_path).probabilities(TEXTS),
            as_trained(source, tmp_path / f"{source.name}-as-trained"),
            atol=1e-4,
        )


def test_progress_runs_from_nothing_to_all(student: Path, tmp_path: Path) -> None:
    events: list[Progress] = []
    compress(student, tmp_path / "v", "int8", progress=events.append)
    assert [event.done for event in events] == [0, 1, 2, 3, 4]
    assert {event.task for event in events} == {"compress int8"}
    assert {event.total for event in events} == {4}


def test_the_root_logger_stays_as_it_was(student: Path, tmp_path: Path) -> None:
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    compress(student, tmp_path / "v", "int4")
    assert (logging.getLogger().handlers, logging.getLogger().level) == (handlers, level)


# --- as trained


def test_as_trained_is_the_checkpoint_run_by_torch(student: Path, tmp_path: Path) -> None:
    (student / "history.json").write_text("[]", "utf-8")
    with drafting("variant", tmp_path / "v") as draft:
        torch_variant(student, draft, form="classifier", **ABOUT)
    variant = Variant.open(tmp_path / "v")
    assert variant.description["runtime"] == "torch"
    assert variant.description["labels"] == list(LABELS)
    assert "model/history.json" not in variant.manifest.files
    classifier = open_classifier(variant.model_path, threads=1)
    assert classifier.labels == LABELS
    given = classifier.probabilities(TEXTS)
    assert given.dtype == np.float32
    np.testing.assert_allclose(given.sum(axis=1), 1, atol=1e-6)
    for row, text in enumerate(TEXTS):
        ids = np.array([tiny_tokenizer().encode(text).ids[:48] or [0]])
        logits = torch_logits(load_classifier(student), ids, np.ones_like(ids))[0].astype(np.float64)
        np.testing.assert_allclose(given[row], np.exp(logits) / np.exp(logits).sum(), atol=1e-5)
    classifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        classifier.probabilities(["x"])


# --- what can go wrong


def draft_in(path: Path) -> Draft:
    (path / "draft").mkdir()
    (path / "work").mkdir()
    return Draft(path / "draft", path / "work")


@pytest.mark.parametrize(
    ("missing", "word"),
    [
        ("config.json", "config.json"),
        ("labels.json", "not a classifier"),
        ("tokenizer.json", "tokenizer.json"),
        ("model.safetensors", "model.safetensors"),
    ],
)
def test_a_missing_file_is_named(student: Path, tmp_path: Path, missing: str, word: str) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in student.iterdir():
        if path.name != missing:
            (broken / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=word):
        export_classifier(broken, draft_in(tmp_path), precision="fp32", **ABOUT)


def test_a_graph_that_does_not_compute_what_torch_does_is_refused(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((student / "config.json").read_text())
    monkeypatch.setattr(exporting, "read_json", lambda path: {**config, "is_causal": True})
    with pytest.raises(ConversionError, match="does not compute what torch does"):
        export_classifier(student, draft_in(tmp_path), precision="fp32", **ABOUT)


def test_answers_that_are_not_finite_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: Path
) -> None:
    monkeypatch.setattr(exporting, "_ask", lambda folder: np.array([[np.nan, 1.0]]))
    with pytest.raises(ConversionError, match=r"int8.*not finite.*compress\.precisions"):
        export_classifier(student, draft_in(tmp_path), precision="int8", **ABOUT)


def test_a_tool_that_fails_is_named_with_the_remedy(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, precision: str, weight_only: frozenset[str]) -> Any:
        raise RuntimeError("no such kernel\nwith a long trace")

    monkeypatch.setattr("slmops.compress.precision.at_precision", fail)
    with pytest.raises(ConversionError, match=r"to int4 failed: no such kernel\. Leave int4 out") as caught:
        export_classifier(student, draft_in(tmp_path), precision="int4", **ABOUT)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_tool_that_writes_nothing_is_noticed(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.compress.graph_files.save_graph", lambda model, folder: None)
    monkeypatch.setattr(exporting, "_fp32_graph", lambda *_: onnx.ModelProto())
    with pytest.raises(ConversionError, match=r"ended without model\.onnx"):
        export_classifier(student, draft_in(tmp_path), precision="fp32", **ABOUT)


def test_a_tokenizer_that_does_not_fit_the_model_is_noticed(student: Path, tmp_path: Path) -> None:
    """Ids beyond the embeddings: the trial text meets them."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in student.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    spec = json.loads((broken / "tokenizer.json").read_text("utf-8"))
    spec["model"]["vocab"] = {token: index + 5000 for token, index in spec["model"]["vocab"].items()}
    (broken / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    with pytest.raises(ConversionError, match="cannot be run"):
        export_classifier(broken, draft_in(tmp_path), precision="int8", **ABOUT)


def test_importing_the_stage_is_cheap() -> None:
    code = (
        "import sys, slmops.compress; "
        "print([n for n in ('torch', 'transformers', 'onnx', 'onnxruntime', 'onnxruntime_genai') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
