"""Whole graphs in few bits: what the engine answers is what the codes say, and bad input is refused by name."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Message, Row, Variant, drafting
from slmops.compress import export_generator
from slmops.compress.quantize.calibration import read_calibration, token_rows
from slmops.compress.quantize.export import export_quantized
from slmops.compress.quantize.folder import quantize_folder
from slmops.compress.quantize.graph import Matrix, matrices_of
from slmops.compress.quantize.statistics import TokenRow, beside, feeds_of, grams
from slmops.errors import ConversionError, DataError, StorageError
from slmops.models.grid import Quantized
from slmops.recipe import CalibrationConfig, QuantizeConfig
from slmops.runtime import GenerationRequest, open_generator

ABOUT: dict[str, Any] = {"task": "conversation", "name": "tiny", "max_tokens": 256, "system": None}
TEXTS = ["hello how are you today", "my card is lost", "where is my top up please", "refund the fee now", "balance"]
ROWS = [Row(str(i), (Message("user", text),), TEXTS[-1 - i]) for i, text in enumerate(TEXTS)]
SETTINGS: dict[str, dict[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    "rtn in 8 bits": {"algorithm": "rtn", "bits": 8},
    "k_quant": {"algorithm": "k_quant", "block_size": 16},
    "k_quant with zeros": {"algorithm": "k_quant", "symmetric": False, "block_size": 64},
    "k_quant in 8 bits with zeros": {"algorithm": "k_quant", "bits": 8, "symmetric": False},
    "hqq": {"algorithm": "hqq"},
    "gptq": {"algorithm": "gptq"},
    "gptq with zeros": {"algorithm": "gptq", "symmetric": False},
    "awq": {"algorithm": "awq"},
}
HEAD_SIZE = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def wide(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 model folder, from the builder."""
    root = tmp_path_factory.mktemp("wide")
    with drafting("variant", root / "fp32") as draft:
        export_generator(checkpoint, draft, precision="fp32", **ABOUT)
    return root / "fp32" / "model"


@pytest.fixture(scope="module")
def rows(checkpoint: Path) -> list[TokenRow]:
    return token_rows(checkpoint, ROWS, lambda row: row.messages, 64)


@pytest.fixture
def folder(wide: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(wide, tmp_path / "model"))


def logits(folder: Path, row: TokenRow) -> np.ndarray:
    with beside(folder) as (session, graph):
        return np.asarray(session.run(["logits"], feeds_of(graph, row.ids, HEAD_SIZE))[0][0])


def recording(monkeypatch: pytest.MonkeyPatch) -> dict[str, Quantized]:
    """The codes that :func:`quantize_folder` puts into the graph."""
    from slmops.compress.quantize import graph

    seen: dict[str, Quantized] = {}
    put = graph.with_codes

    def put_and_tell(model: onnx.ModelProto, codes: dict[str, Quantized]) -> onnx.ModelProto:
        seen.update(codes)
        return put(model, codes)

    monkeypatch.setattr(graph, "with_codes", put_and_tell)
    return seen


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_computes_what_the_codes_say(
    folder: Path, wide: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Beside the fp32 graph with the same rounded matrices in it (and AWQ's scaled norms)."""
    seen = recording(monkeypatch)
    quantize_folder(folder, QuantizeConfig(**SETTINGS[name]), rows)
    assert len(seen) == 11  # five matrices a layer, embeddings and output layer as one
    reference = Path(shutil.copytree(wide, folder.with_name("reference")))
    model = onnx.load(reference / "model.onnx")
    small = {t.name: t for t in onnx.load(folder / "model.onnx").graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.name in seen:
            value = seen[tensor.name].wide().T.contiguous().numpy()
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        elif tensor.name in small and "layernorm" in tensor.name:
            tensor.CopyFrom(small[tensor.name])
    onnx.save(model, reference / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    for row in rows:
        expected, given = logits(reference, row), logits(folder, row)
        moved = np.abs(given - expected) / np.abs(expected).max()  # activations in 8 bits, block by block
        assert moved.mean() < 0.02
        assert moved.max() < 0.15
        assert (given.argmax(-1) == expected.argmax(-1)).mean() > 0.8


@pytest.mark.parametrize("name", SETTINGS)
def test_tied_embeddings_are_stored_once(folder: Path, rows: list[TokenRow], name: str) -> None:
    before = (folder / "model.onnx.data").stat().st_size
    quantize_folder(folder, QuantizeConfig(**SETTINGS[name]), rows)
    model = onnx.load(folder / "model.onnx")
    (reads,) = (node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    head = next(node for node in model.graph.node if "logits" in node.output)
    assert reads.input[2] == head.input[2]
    (flat,) = (node for node in model.graph.node if reads.input[0] in node.output)
    assert flat.input[0] == head.input[1]
    assert not [t.name for t in model.graph.initializer if t.data_type == 1 and np.prod(t.dims) > 64 * 512]
    after = (folder / "model.onnx.data").stat().st_size
    assert after < (0.45 if "8" in name else 0.35) * before


def test_a_model_in_few_bits_answers_in_the_engine(checkpoint: Path, tmp_path: Path, rows: list[TokenRow]) -> None:
    settings = QuantizeConfig(algorithm="gptq", size_mb=0.2)
    with drafting("variant", tmp_path / "variant") as draft:
        export_quantized(checkpoint, draft, settings, rows, closed=False, **ABOUT)
    variant = Variant.open(tmp_path / "variant")
    assert variant.description["precision"] == "int4"
    told = variant.manifest.metrics["quantization"]
    assert told["algorithm"] == "gptq"
    assert set(told["harm"]) >= set(told["in_8_bits"])
    assert variant.model_bytes <= 200_000
    generator = open_generator(variant.model_path, threads=1)
    assert generator.generate([GenerationRequest((Message("user", "hello"),), max_tokens=4)])[0].completion_tokens > 0
    assert np.isfinite(generator.score([((Message("user", "hello"),), "ok")])[0].logprob)
    generator.close()


def test_grams_are_those_of_the_inputs(wide: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside numpy on the values themselves; one matrix at a time where memory is short."""
    from slmops.compress.quantize import statistics

    matrices = matrices_of(onnx.load(wide / "model.onnx", load_external_data=False))
    inputs = {one.input: one.width for one in matrices if one.input}
    with beside(wide, outputs=list(inputs)) as (session, graph):
        values = [session.run(list(inputs), feeds_of(graph, row.ids, HEAD_SIZE)) for row in rows]
    monkeypatch.setattr(statistics, "MOST_BYTES", 1)
    found = list(grams(wide, inputs, rows, HEAD_SIZE))
    assert [len(group) for group in found] == [1] * len(inputs)
    for number, name in enumerate(inputs):
        flat = np.concatenate([one[number][0] for one in values]).astype(np.float64)
        given = next(group[name] for group in found if name in group)
        assert np.allclose(given, flat.T @ flat / len(flat), rtol=1e-3, atol=1e-3)
    assert sorted(path.name for path in wide.iterdir()) == sorted(
        {path.name for path in wide.iterdir()} - {statistics.GRAPH_BESIDE}
    )


def test_awq_leaves_the_model_what_it_was(wide: Path, folder: Path, rows: list[TokenRow]) -> None:
    """Scaled, before anything is rounded."""
    from slmops.compress.graph_files import save_graph
    from slmops.compress.quantize.awq import places_of, scaled

    model = onnx.load(folder / "model.onnx")
    matrices = matrices_of(model)
    places = places_of(model, matrices)
    assert len(places) == 6  # a layer's two norms and its feed-forward; the last norm's matrix is embeddings, too
    random = torch.Generator().manual_seed(0)
    width = {one.input: one.width for one in matrices}
    found = {place.input: torch.rand(width[place.input], generator=random) + 0.5 for place in places}
    save_graph(scaled(model, matrices, found, places), folder, external=True)
    for row in rows:
        assert np.allclose(logits(folder, row), logits(wide, row), rtol=1e-3, atol=2e-3)


def test_the_most_sensitive_matrices_get_8_bits(
    folder: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix that is made coarse on purpose does the most harm, and is the first to get more bits."""
    from slmops.compress.quantize import rounding

    coarse = "model.layers.1.mlp.down_proj.MatMul.weight"
    target = next(one for one in matrices_of(onnx.load(folder / "model.onnx")) if one.name == coarse)
    searched = rounding.k_quant

    def spoilt(matrix: torch.Tensor, grid: Any, importance: Any = None) -> Quantized:
        found = searched(matrix, grid, importance)
        if matrix.shape == (target.rows, target.width) and grid.bits == 4:
            found.codes[:] = (found.codes // 6) * 6
        return found

    monkeypatch.setattr(rounding, "k_quant", spoilt)
    few = Path(shutil.copytree(folder, folder.with_name("few")))
    quantize_folder(few, QuantizeConfig(algorithm="k_quant"), rows)
    limit = (sum(path.stat().st_size for path in few.iterdir()) + 20_000) / 1e6
    told = quantize_folder(folder, QuantizeConfig(algorithm="k_quant", size_mb=limit), rows)
    most = max(told["harm"], key=told["harm"].get)
    assert "down_proj" in most
    assert most in told["in_8_bits"]
    bits = {node.name: next(a.i for a in node.attribute if a.name == "bits") for node in nodes(folder, "MatMulNBits")}
    assert {8, 4} == set(bits.values())
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit * 1e6


def nodes(folder: Path, kind: str) -> list[onnx.NodeProto]:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return [node for node in graph.node if node.op_type == kind]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_activations_in_8_bits_with_one_scale(wide: Path, folder: Path, rows: list[TokenRow], kind: str) -> None:
    quantize_folder(folder, QuantizeConfig(bits=8, algorithm="rtn", activations=kind), rows)
    kinds = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert {"dynamic": "MatMulInteger", "static": "QuantizeLinear"}[kind] in kinds
    agree = np.mean([(logits(folder, row).argmax(-1) == logits(wide, row).argmax(-1)).mean() for row in rows])
    assert agree > 0.7
    generator = open_generator(folder, threads=1)
    assert np.isfinite(generator.score([((Message("user", "hello"),), "ok")])[0].logprob)
    generator.close()


# Bad input


def test_blocks_that_do_not_divide_are_named_with_those_that_do(folder: Path, rows: list[TokenRow]) -> None:
    with pytest.raises(ConversionError, match=r"Blocks of 128 do not divide the 64 columns of .*64 or 32 or 16"):
        quantize_folder(folder, QuantizeConfig(block_size=128), rows)


def test_a_size_that_cannot_be_met_is_refused_before_the_work(
    folder: Path, rows: list[TokenRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.compress.quantize import sensitivity

    monkeypatch.setattr(sensitivity, "harms", lambda *_: pytest.fail("the work had begun"))
    with pytest.raises(ConversionError, match=r"wants .* MB, and all in few bits takes .* MB.*prune first"):
        quantize_folder(folder, QuantizeConfig(algorithm="k_quant", size_mb=0.1), rows)


def test_a_weight_that_is_no_number_is_named(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    tensor = next(t for t in model.graph.initializer if "layers.1.mlp.up_proj" in t.name)
    value = numpy_helper.to_array(tensor).copy()
    value[3, 4] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj\.MatMul\.weight .*not finite"):
        quantize_folder(folder, QuantizeConfig(algorithm="rtn"), [])


def test_an_odd_number_of_heads_is_no_trouble(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    source, odd = tmp_path / "source", tmp_path / "odd"
    write_tiny_llama(source)
    shutil.copytree(source, odd)
    config = LlamaConfig(**{**json.loads((source / "config.json").read_text()), "hidden_size": 96, "head_dim": 32})
    config.num_attention_heads = config.num_key_value_heads = 3
    LlamaForCausalLM(config).save_pretrained(odd)
    made = token_rows(odd, ROWS, lambda row: row.messages, 64)
    with drafting("variant", tmp_path / "variant") as draft:
        export_quantized(odd, draft, QuantizeConfig(algorithm="gptq"), made, closed=False, **ABOUT)
    assert Variant.open(tmp_path / "variant").manifest.metrics["precision"] == "int4"


def test_a_disk_that_fills_up_leaves_nothing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from slmops.compress import graph_files

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "model.onnx.data")

    monkeypatch.setattr(graph_files, "save_graph", full)
    with pytest.raises(StorageError, match="No space left"), drafting("variant", tmp_path / "variant") as draft:
        export_quantized(checkpoint, draft, QuantizeConfig(algorithm="rtn"), [], closed=False, **ABOUT)
    assert not (tmp_path / "variant").exists()
    assert not list(tmp_path.glob(".variant.*.tmp"))


def test_rows_to_calibrate_on_come_from_training_or_a_file(checkpoint: Path, tmp_path: Path) -> None:
    chosen = read_calibration(CalibrationConfig(rows=3), ROWS, seed=0)
    assert len(chosen) == 3
    assert chosen == read_calibration(CalibrationConfig(rows=3), ROWS, seed=0)
    assert chosen != read_calibration(CalibrationConfig(rows=3), ROWS, seed=1)
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"messages": [{"role": "user", "content": "hi"}], "target": "hello"}\n\n{"text": "my card is lost"}\n'
    )
    given = read_calibration(CalibrationConfig(data=str(file)), ROWS, seed=0)
    made = token_rows(checkpoint, given, lambda row: row.messages, 64)
    assert len(made) == 2
    running = next(one for one, row in zip(made, given, strict=True) if not row.messages)
    assert running.predicts.tolist() == [True] * (len(running.ids) - 1) + [False]


def test_no_rows_to_calibrate_on(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train split is empty.*rtn, k_quant or hqq"):
        read_calibration(CalibrationConfig(), [], seed=0)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"none\.jsonl: .*the file is empty"):
        read_calibration(CalibrationConfig(data=str(tmp_path / "none.jsonl")), ROWS, seed=0)
    with pytest.raises(DataError, match="cannot be read"):
        read_calibration(CalibrationConfig(data=str(tmp_path / "nowhere.jsonl")), ROWS, seed=0)
    (tmp_path / "bad.jsonl").write_text('{"text": "ok"}\n{"question": 1}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 2: .*messages"):
        read_calibration(CalibrationConfig(data=str(tmp_path / "bad.jsonl")), ROWS, seed=0)
    with pytest.raises(DataError, match=r"None of the 5 rows .* fits into 3 tokens"):
        token_rows(checkpoint, ROWS, lambda row: row.messages, 3)


def test_matrices_are_found_with_what_reads_them(wide: Path) -> None:
    matrices = matrices_of(onnx.load(wide / "model.onnx", load_external_data=False))
    head = matrices[0]
    assert isinstance(head, Matrix)
    assert (head.rows, head.width, head.transposed) == (300, 64, True)
    assert head.products == ("/lm_head/MatMul",)
    assert head.reads == ("/model/embed_tokens/Gather",)
    assert all(not one.reads for one in matrices[1:])
    assert {one.width for one in matrices} == {64, 128}


# Classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaModel

    from fakes.tiny_models import LABELS, tiny_tokenizer
    from slmops.models.classifier import PooledClassifier, save_classifier

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.12,
    )
    model = PooledClassifier(LlamaModel(config), LABELS)
    torch.nn.init.normal_(model.head.weight, std=1.0)
    save_classifier(model, folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "gptq"},
        {"algorithm": "awq", "symmetric": False},
        {"bits": 8, "algorithm": "rtn", "activations": "dynamic"},
        {"bits": 8, "algorithm": "rtn", "activations": "static"},
    ],
)
def test_a_classifier_in_few_bits_decides_alike(classifier: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    from slmops.compress import export_classifier
    from slmops.runtime import open_classifier

    about = {key: value for key, value in ABOUT.items() if key != "system"} | {"max_tokens": 48}
    with drafting("variant", tmp_path / "wide") as draft:
        export_classifier(classifier, draft, precision="fp32", **about)
    made = token_rows(classifier, ROWS, None, 48)
    with drafting("variant", tmp_path / "few") as draft:
        export_quantized(classifier, draft, QuantizeConfig(**settings), made, closed=True, system=None, **about)
    few, wide = (Variant.open(tmp_path / name) for name in ("few", "wide"))
    assert few.model_bytes < 0.6 * wide.model_bytes
    assert few.description["precision"] == f"int{settings.get('bits', 4)}"
    given, expected = (open_classifier(one.model_path, threads=1).probabilities(TEXTS) for one in (few, wide))
    assert np.abs(given - expected).mean() < 0.1
