"""The families' tokenizers in a GGUF file: llama.cpp's own tokens are the model's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from chat_families import Family

from slmops.artifacts import Message, Variant, drafting
from slmops.chat import ChatTokenizer
from slmops.compress.gguf_export import export_gguf
from slmops.compress.gguf_tokenizer import PROBE
from slmops.errors import ConversionError
from slmops.runtime import GenerationRequest, open_generator
from slmops.runtime.gguf import GgufGenerator

pytest.importorskip("xllamacpp", reason="xllamacpp is not installed: pip install 'slmops[llamacpp]'")

COMPOSES = frozenset({"qwen25", "qwen3", "smollm3"})
"""Families that compose Unicode before they cut it, which llama.cpp does not."""
TEXTS = ["Hello  World!", " lead", "a", "", "  two", "日本語 текст 😀", "x\n\n\ny", "tab\tx 12 345", "<s> </s>"]


def write_weights(folder: Path) -> None:
    """A small Llama for the tokenizer in the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    ids = [*raw["model"]["vocab"].values(), *(token["id"] for token in raw["added_tokens"])]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=max(ids) + 9,  # more rows than tokens, as Phi and Qwen have
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)


def test_llama_cpp_reads_text_as_the_model_was_taught(family: Family, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders[family.name], tmp_path / "model"))
    write_weights(folder)
    with drafting("variant", tmp_path / "variant") as draft:
        export_gguf(folder, draft, quantization="f32")
    made = Variant.open(tmp_path / "variant").model_path
    engine, reference = open_generator(made, threads=1), open_generator(folder, threads=1)
    assert isinstance(engine, GgufGenerator)
    chat = ChatTokenizer.load(made)
    for text in TEXTS if family.name in COMPOSES else [*TEXTS, PROBE]:
        assert engine.engine_tokens(text) == chat.encode(text, add_special_tokens=False), text
    request = GenerationRequest((Message("user", "How are you?"),), max_tokens=8)
    assert engine.generate([request])[0].text == reference.generate([request])[0].text
    engine.close()


def test_a_tokenizer_that_llama_cpp_does_not_match_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its text is written in small letters first, which no key of a GGUF file says."""
    folder = Path(shutil.copytree(folders["smollm2"], tmp_path / "model"))
    raw = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    raw["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(raw), "utf-8")
    write_weights(folder)
    with (
        pytest.raises(ConversionError, match="makes other tokens of a text"),
        drafting("variant", tmp_path / "variant") as draft,
    ):
        export_gguf(folder, draft, quantization="f32")
    assert not (tmp_path / "variant").exists()
