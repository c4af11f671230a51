"""GGUF files of every architecture, run by llama.cpp itself and held against torch on the same weights."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.tiny_models import write_tiny_llama, write_tiny_model
from slmops.artifacts import Message, Variant, drafting
from slmops.chat import ChatTokenizer
from slmops.compress import gguf_export
from slmops.compress.gguf_architectures import context_tokens, find_architecture, interleave
from slmops.compress.gguf_export import export_gguf
from slmops.compress.gguf_tokenizer import read_vocabulary
from slmops.compress.gguf_types import (
    FILE_TYPES,
    GGUF_QUANTIZATIONS,
    IN_NUMPY,
    quantize,
    tensor_type,
    use_more_bits,
)
from slmops.errors import (
    ConversionError,
    CorruptArtifactError,
    MissingExtraError,
    ModelError,
    StorageError,
    UsageError,
)
from slmops.recipe import GgufQuantization
from slmops.runtime import GenerationRequest, Generator, open_generator
from slmops.runtime.gguf import GgufGenerator
from slmops.runtime.sampling import draw

gguf = pytest.importorskip("gguf")

CONVERSATIONS = [
    ((Message("user", "hello"),), "how are you today?"),
    ((Message("user", "my card is lost"),), "refund"),
    ((Message("system", "Be brief."), Message("user", "ü€😀 12 345")), "the balance of my account"),
]
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1 + i / 20 for i in range(24)],
    "long_factor": [2.0 + i for i in range(24)],
    "original_max_position_embeddings": 256,
}
WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
EVERY_4TH: dict[str, Any] = {"layers": 4, "no_rope_layers": None}
EVERY_6TH: dict[str, Any] = {"layers": 6, "layer_types": None}
"""As published: llama.cpp knows no other order of the layers that differ."""
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2": ("llama", {}),
    "llama of an odd number of heads": (
        "llama",
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    ),
    "llama 3": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", EVERY_4TH),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"sliding_window": 256}),
    "phi4": ("phi4", WIDE),
    "phi4 of long contexts": (
        "phi4",
        {**WIDE, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 256},
    ),
    "gemma3": ("gemma3", EVERY_6TH),
    "gemma3 with stretched positions": (
        "gemma3",
        {
            **EVERY_6TH,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "llama with stretched positions": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
}


def needs_llama_cpp() -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'slmops[llamacpp]'")


def export(checkpoint: Path, folder: Path, quantization: GgufQuantization = "f32", **more: Any) -> Path:
    with drafting("variant", folder) as draft:
        export_gguf(checkpoint, draft, quantization=quantization, name="tiny", **more)
    return Variant.open(folder).model_path


def logprobs(generator: Generator) -> np.ndarray:
    return np.array([score.logprob for score in generator.score(CONVERSATIONS)])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder)
    return folder


@pytest.fixture
def own_llama(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


# --- what llama.cpp makes of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_answers_as_torch_does(name: str, tmp_path: Path) -> None:
    needs_llama_cpp()
    family, changes = MODELS[name]
    write_tiny_model(tmp_path / "checkpoint", family, **changes)
    folder = export(tmp_path / "checkpoint", tmp_path / "variant")
    torch, llama_cpp = open_generator(tmp_path / "checkpoint", threads=1), open_generator(folder, threads=1)
    assert isinstance(llama_cpp, GgufGenerator)
    assert np.abs(logprobs(torch) - logprobs(llama_cpp)).max() < 1e-2
    for messages, target in CONVERSATIONS:
        request = GenerationRequest(messages, max_tokens=16)
        ours, theirs = torch.generate([request])[0], llama_cpp.generate([request])[0]
        assert (ours.text, ours.completion_tokens) == (theirs.text, theirs.completion_tokens)
        text = f"{messages[-1].content} 12 345  {target}"
        assert llama_cpp.engine_tokens(text) == ChatTokenizer.load(folder).encode(text, add_special_tokens=False)
    llama_cpp.close()


def test_fewer_bits_are_smaller_and_further_away(llama: Path, tmp_path: Path) -> None:
    needs_llama_cpp()
    reference = logprobs(open_generator(llama, threads=1))
    sizes, distances = [], []
    wanted: tuple[GgufQuantization, ...] = ("f32", "f16", "q8_0", "q4_0")
    for quantization in wanted:
        folder = export(llama, tmp_path / quantization, quantization)
        sizes.append((folder / "model.gguf").stat().st_size)
        generator = open_generator(folder, threads=1)
        distances.append(float(np.abs(logprobs(generator) - reference).max()))
        generator.close()
    assert sizes == sorted(sizes, reverse=True)
    assert distances == sorted(distances)
    assert distances[2] < 1.5 < distances[3] < 40


def test_what_a_variant_holds(llama: Path, tmp_path: Path) -> None:
    needs_llama_cpp()
    with drafting("variant", tmp_path / "variant") as draft:
        export_gguf(
            llama, draft, quantization="q4_k_m", task="conversation", name="tiny", max_tokens=128, system="Be brief."
        )
    variant = Variant.open(tmp_path / "variant")
    assert {Path(name).name for name in variant.manifest.files} == {
        "model.gguf",
        "Modelfile",
        "slmops.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    }
    about = variant.description
    assert (about["runtime"], about["form"], about["precision"]) == ("llama.cpp", "generator", "q4_k_m")
    assert (about["max_tokens"], about["system"]) == (128, "Be brief.")
    assert variant.manifest.metrics["parameters"] == about["parameters"] > 50_000


def test_the_file_says_what_it_is_and_is_the_same_again(llama: Path, tmp_path: Path) -> None:
    export_gguf(llama, tmp_path / "a.gguf", quantization="q8_0", name="tiny")
    export_gguf(llama, tmp_path / "b.gguf", quantization="q8_0", name="tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    config = json.loads((llama / "config.json").read_text())
    assert said["general.architecture"] == "llama"
    assert said["general.file_type"] == FILE_TYPES["q8_0"]
    assert said["llama.context_length"] == config["max_position_embeddings"]
    assert said["tokenizer.ggml.eos_token_id"] == config["eos_token_id"]
    assert "<|im_start|>" in said["tokenizer.chat_template"]
    assert {t.name for t in reader.tensors} >= {"token_embd.weight", "blk.1.ffn_down.weight", "output_norm.weight"}
    assert (tmp_path / "a.Modelfile").read_text().startswith("FROM ./a.gguf\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.Modelfile", "a.gguf", "b.Modelfile", "b.gguf"]


def test_transformers_reads_the_weights_back(llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from slmops.models.gguf import convert_gguf

    export_gguf(llama, tmp_path / "m.gguf", quantization="f32")
    (tmp_path / "back").mkdir()
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() <= after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name], err_msg=name)


def test_tied_embeddings_are_written_once_and_untied_ones_twice(llama: Path, tmp_path: Path) -> None:
    def names(checkpoint: Path) -> set[str]:
        path = export_gguf(checkpoint, tmp_path / f"{checkpoint.name}.gguf", quantization="f16")
        return {tensor.name for tensor in gguf.GGUFReader(path).tensors}

    write_tiny_model(tmp_path / "untied", "llama", tie_word_embeddings=False)
    assert "output.weight" not in names(llama)
    assert "output.weight" in names(tmp_path / "untied")


# --- the runtime ----------------------------------------------------------------------------------------------------


def test_the_runtime_streams_samples_and_counts(llama: Path, tmp_path: Path) -> None:
    needs_llama_cpp()
    generator = open_generator(export(llama, tmp_path / "variant", max_tokens=64), threads=1)
    assert isinstance(generator, GgufGenerator)
    request = GenerationRequest(CONVERSATIONS[0][0], max_tokens=12)
    whole = generator.generate([request])[0]
    pieces = list(generator.stream(request))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (whole.prompt_tokens, whole.completion_tokens)
    assert whole.prompt_tokens == generator.count_tokens(CONVERSATIONS[0][0])
    sampled = GenerationRequest(CONVERSATIONS[0][0], max_tokens=8, temperature=1.5, seed=3)
    assert generator.generate([sampled])[0].text == generator.generate([sampled])[0].text
    stopped = GenerationRequest(CONVERSATIONS[0][0], max_tokens=12, stop=(whole.text[1:3],))
    assert generator.generate([stopped])[0].text == whole.text[:1]
    rows = generator.target_logits(*CONVERSATIONS[1])
    assert np.exp(rows.astype(np.float64)).sum(axis=1) == pytest.approx(1, abs=1e-3)
    generator.close()


def test_a_draw_keeps_to_the_mass_that_was_asked_for() -> None:
    logprobs = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)
    assert {draw(logprobs, 1.0, 0.7, random) for _ in range(200)} == {0, 1}
    assert {draw(logprobs, 0.01, 1.0, random) for _ in range(50)} == {0}


def test_a_damaged_file_is_told(llama: Path, tmp_path: Path) -> None:
    needs_llama_cpp()
    folder = export(llama, tmp_path / "variant")
    whole = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptArtifactError, match="cannot be loaded"):
        open_generator(folder)
    (folder / "model.gguf").unlink()
    with pytest.raises(CorruptArtifactError, match="is missing"):
        open_generator(folder)


# --- types ----------------------------------------------------------------------------------------------------------


def test_types_by_tensor() -> None:
    def kind(name: str, quantization: GgufQuantization, row: int = 256, tied: bool = True) -> str:
        return tensor_type(name, (64, row), quantization, layers=16, tied=tied)

    assert kind("blk.0.attn_v.weight", "q4_k_m") == "Q6_K"
    assert kind("blk.2.attn_v.weight", "q4_k_m") == "Q4_K"
    assert kind("blk.4.ffn_down.weight", "q4_k_m") == "Q6_K"
    assert kind("blk.4.ffn_up.weight", "q4_k_m") == "Q4_K"
    assert kind("blk.4.ffn_up.weight", "q4_k_m", row=96) == "Q5_0"
    assert kind("blk.4.ffn_up.weight", "q4_k_m", row=40) == "F16"
    assert kind("token_embd.weight", "q4_k_m") == "Q6_K"
    assert kind("token_embd.weight", "q4_k_m", tied=False) == "Q4_K"
    assert kind("output.weight", "q8_0") == "Q8_0"
    assert kind("blk.0.attn_norm.weight", "q4_0") == "Q4_0"  # two dimensions: no norm
    assert tensor_type("blk.0.attn_norm.weight", (64,), "q4_0", layers=16, tied=True) == "F32"
    assert [layer for layer in range(16) if use_more_bits(layer, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert set(GGUF_QUANTIZATIONS) == set(FILE_TYPES)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"])
def test_numbers_come_back_within_a_step(kind: str) -> None:
    if kind not in IN_NUMPY:
        needs_llama_cpp()
    values = np.random.default_rng(1).normal(size=(3, 512)).astype(np.float32)
    packed = quantize(values, kind)
    numbered = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[numbered]
    assert packed.shape == (3, 512 // block * size)
    back = gguf.quants.dequantize(packed, numbered)
    step = {"Q8_0": 1 / 60, "Q4_0": 1 / 2, "Q5_1": 1 / 4, "Q4_K": 1 / 3, "Q6_K": 1 / 8}[kind]
    assert 0 < np.abs(back - values).max() < step


def test_columns_that_matter_are_kept_better(tmp_path: Path) -> None:
    needs_llama_cpp()
    values = np.random.default_rng(2).normal(size=(32, 256)).astype(np.float32)
    importance = np.ones(256, np.float32)
    importance[::8] = 1000.0
    numbered = gguf.GGMLQuantizationType.Q4_K

    def error(weights: np.ndarray | None) -> float:
        back = gguf.quants.dequantize(quantize(values, "Q4_K", weights), numbered)
        return float(((back - values)[:, ::8] ** 2).mean())

    assert error(importance) < 0.7 * error(None)


def test_rows_of_a_head_change_places() -> None:
    given = np.arange(8)[:, None]  # two heads of four: halves 0 1 | 2 3
    assert interleave(given, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_quantization_that_nobody_knows(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'q3'.*q4_k_m"):
        export_gguf(llama, tmp_path / "m.gguf", quantization="q3")  # type: ignore[arg-type]


def test_a_model_type_that_is_not_known(own_llama: Path, tmp_path: Path) -> None:
    rewrite(own_llama / "config.json", model_type="mamba")
    with pytest.raises(ConversionError, match=r"'mamba'.*known: llama"):
        export_gguf(own_llama, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("llama", {"mlp_bias": True}, "biases"),
        ("mistral", {"sliding_window": 64}, "sliding window"),
        ("smollm3", {"no_rope_layers": [0, 1, 1, 1]}, "every 4th layer"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, "every 6th layer"),
        ("gemma3_text", {"query_pre_attn_scalar": 99}, "scaled by something else"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' is not known"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(kind: str, changes: dict[str, Any], match: str) -> None:
    config = {"model_type": kind, "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, **changes}
    with pytest.raises(ConversionError, match=match):
        find_architecture(config, "folder")


def test_a_phi_of_long_contexts_is_run_where_both_agree() -> None:
    config = {"model_type": "phi3", "max_position_embeddings": 4096, "sliding_window": 2047}
    assert context_tokens(config) == 2047
    longer = {**config, "sliding_window": None, "original_max_position_embeddings": 1024}
    assert context_tokens({**longer, "rope_parameters": {"rope_type": "longrope"}}) == 1024
    assert context_tokens({**longer, "rope_parameters": {"rope_type": "default"}}) == 4096


def test_a_tokenizer_without_a_chat_template(own_llama: Path, tmp_path: Path) -> None:
    (own_llama / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        export_gguf(own_llama, tmp_path / "m.gguf")


def test_a_tokenizer_that_cuts_text_in_a_way_without_a_name(own_llama: Path, tmp_path: Path) -> None:
    raw = json.loads((own_llama / "tokenizer.json").read_text("utf-8"))
    raw["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, raw["pre_tokenizer"]],
    }
    (own_llama / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(ConversionError, match="no name"):
        export_gguf(own_llama, tmp_path / "m.gguf")
    raw["model"]["type"] = "Unigram"
    (own_llama / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    with pytest.raises(ConversionError, match="Unigram"):
        read_vocabulary(own_llama, 300)


def test_heads_that_cannot_be_shared_out(own_llama: Path, tmp_path: Path) -> None:
    rewrite(own_llama / "config.json", num_attention_heads=4, num_key_value_heads=3)
    with pytest.raises(ConversionError, match="4 heads of queries cannot share 3"):
        export_gguf(own_llama, tmp_path / "m.gguf")
    rewrite(own_llama / "config.json", num_key_value_heads=2, head_dim=15)
    with pytest.raises(ConversionError, match="15 numbers"):
        export_gguf(own_llama, tmp_path / "m.gguf")


def test_a_weight_with_nan_is_named(own_llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(own_llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(weights, own_llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConversionError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*not finite"):
        export_gguf(own_llama, tmp_path / "m.gguf")


def test_a_disk_that_fills_up_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def full(*arguments: Any) -> Any:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return quantize(*arguments)

    monkeypatch.setattr(gguf_export, "quantize", full)
    with pytest.raises(StorageError):
        export_gguf(llama, tmp_path / "m.gguf", quantization="f16")
    assert list(tmp_path.iterdir()) == []
    written = 0
    with pytest.raises(StorageError), drafting("variant", tmp_path / "variant") as draft:
        export_gguf(llama, draft, quantization="f16")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_is_too_small_is_told_before_the_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_export.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(StorageError, match=r"m\.gguf takes 0\.\d MB.*0\.0 MB left"):
        export_gguf(llama, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_without_llama_cpp_the_plain_types_are_written_and_others_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slmops.compress import gguf_types

    monkeypatch.setattr(gguf_types, "_library", lambda: None)
    export_gguf(llama, tmp_path / "plain.gguf", quantization="q8_0")
    assert len(gguf.GGUFReader(tmp_path / "plain.gguf").tensors) > 10
    write_tiny_model(tmp_path / "wide", "llama", hidden_size=256)
    with pytest.raises(MissingExtraError, match=r"Q4_K, Q6_K.*llamacpp"):
        export_gguf(tmp_path / "wide", tmp_path / "m.gguf", quantization="q4_k_m")
    assert not (tmp_path / "m.gguf").exists()
