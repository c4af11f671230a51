"""Model folders of each family: a template of its kind and a small tokenizer that works as the family's does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer, UnigramTrainer

TEMPLATES = Path(__file__).parent / "templates"

LINES = [
    "You are a helpful assistant. Answer with one label.",
    "The card has not arrived yet, and the bank says nothing about it.",
    "user assistant system model\nToday Date: 26 Jul 2024\n\nanswer the answer, 12 + 30 = 42",
    "Was kostet das?  Zwei Stück für 3,50 €.\n\n\tein Tabulator",
    "def f(x):\n    return x * 2\n",
    "a list\n  of lines\n  with spaces\n  before",
    "日本語のテキスト и немного русского",
] * 8


@dataclass(frozen=True)
class Family:
    """``special``: control tokens in the order of their ids; ``config``: of ``tokenizer_config.json``;
    ``turn_end``: the text that the model writes to end its turn; ``lead``: what it writes before the answer."""

    name: str
    make: Callable[[list[str]], Tokenizer]
    special: list[str]
    config: dict[str, Any]
    turn_end: str
    lead: str = ""
    tail: str = ""
    eos_ids: list[str] | None = None
    knows_system: bool = True


def byte_level(special: list[str]) -> Tokenizer:
    """As SmolLM and Phi 4: byte-level BPE whose offsets leave out leading spaces."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def byte_level_split(special: list[str]) -> Tokenizer:
    """As Qwen: NFC, split by a pattern that keeps line breaks together, one digit a token."""
    tokenizer = byte_level(special)
    pattern = r"\p{N}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def byte_level_bos(special: list[str]) -> Tokenizer:
    """As Llama 3: the post-processor writes a BOS before every text, as the template does."""
    tokenizer = byte_level_split(special)
    tokenizer.normalizer = None
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), _bos_processor(tokenizer, special[0])]
    )
    return tokenizer


def sentencepiece_bpe(special: list[str]) -> Tokenizer:
    """As Llama 2: a space before every text, spaces as U+2581, unknown characters as bytes, BOS before every text."""
    tokenizer = _with_byte_fallback(special)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = _bos_processor(tokenizer, "<s>")
    return tokenizer


def sentencepiece_phi(special: list[str]) -> Tokenizer:
    """As Phi 3: as Llama 2, with control tokens that swallow the white space behind them."""
    tokenizer = sentencepiece_bpe(special)
    tokenizer.add_special_tokens([AddedToken(text, rstrip=True, normalized=False) for text in special[3:]])
    return tokenizer


def sentencepiece_gemma(special: list[str]) -> Tokenizer:
    """As Gemma: as Llama 2 without the space before the text, and with runs of line breaks as tokens of their own."""
    tokenizer = _with_byte_fallback(special)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\n\n\n", normalized=False)])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = _bos_processor(tokenizer, "<bos>")
    return tokenizer


def unigram(special: list[str]) -> Tokenizer:
    """A Unigram model with a Metaspace, as models converted from SentencePiece have."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = UnigramTrainer(vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def _with_byte_fallback(special: list[str]) -> Tokenizer:
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trained.train_from_iterator(LINES, BpeTrainer(vocab_size=400, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    texts = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    return tokenizer


def _bos_processor(tokenizer: Tokenizer, bos: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHATML_CONFIG = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
_QWEN_CONFIG = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_PHI = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
_PHI_CONFIG = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
_LLAMA3 = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
]
_SPM = ["<unk>", "<s>", "</s>"]
_GEMMA = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
_GEMMA_CONFIG = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}

FAMILIES = [
    Family("smollm2", byte_level, _CHATML, _CHATML_CONFIG, "<|im_end|>", tail="\n"),
    Family("smollm3", byte_level_split, _CHATML, _CHATML_CONFIG, "<|im_end|>", tail="\n"),
    Family("qwen25", byte_level_split, _CHATML, _QWEN_CONFIG, "<|im_end|>", tail="\n"),
    Family("qwen3", byte_level_split, _CHATML, _QWEN_CONFIG, "<|im_end|>", tail="\n"),
    Family(
        "phi3",
        sentencepiece_phi,
        [*_SPM, *_PHI],
        {**_PHI_CONFIG, "bos_token": "<s>"},
        "<|end|>",
        tail="\n<|endoftext|>",
    ),
    Family("phi4mini", byte_level, _PHI, _PHI_CONFIG, "<|end|>", tail="<|endoftext|>"),
    Family(
        "llama2",
        sentencepiece_bpe,
        _SPM,
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "unk_token": "<unk>",
        },
        " </s>",
        lead=" ",
    ),
    Family(
        "llama32",
        byte_level_bos,
        _LLAMA3,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "<|eot_id|>",
        eos_ids=["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
    ),
    Family("gemma2", sentencepiece_gemma, _GEMMA, _GEMMA_CONFIG, "<end_of_turn>", tail="\n", knows_system=False),
    Family(
        "gemma3",
        sentencepiece_gemma,
        _GEMMA,
        _GEMMA_CONFIG,
        "<end_of_turn>",
        tail="\n",
        eos_ids=["<eos>", "<end_of_turn>"],
    ),
]


def write_families(root: Path) -> dict[str, Path]:
    """A model folder a family (tokenizer and template only), and ``unigram`` without a template."""
    for family in FAMILIES:
        folder = root / family.name
        folder.mkdir()
        tokenizer = family.make(family.special)
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **family.config}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        shutil.copy(TEMPLATES / f"{family.name}.jinja", folder / "chat_template.jinja")
        if family.eos_ids:
            ids = [tokenizer.token_to_id(text) for text in family.eos_ids]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), "utf-8")
    plain = root / "unigram"
    plain.mkdir()
    unigram(["<unk>", "<s>", "</s>"]).save(str(plain / "tokenizer.json"))
    (plain / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}', "utf-8")
    return {path.name: path for path in root.iterdir()}
