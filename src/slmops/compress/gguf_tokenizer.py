"""A folder's ``tokenizer.json`` and chat template as the keys that llama.cpp and Ollama read.

llama.cpp knows how a byte-level tokenizer cuts text before it merges only by a name. The name is found by behaviour:
the model's own pre-tokenizer and each known one cut the same probing text, and must agree on every piece; a tokenizer
that agrees with none is refused, for llama.cpp would read text otherwise than the model was taught.
Tokenizers in the way of SentencePiece (byte fallback, no pre-tokenizer) are merged by score: a token's is the rank of
the merge that makes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.chat.files import read_object, template_source, token_text
from slmops.errors import ConversionError, ModelError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PROBE = (
    "Hello  World!\n\n  it's I'LL we've 12345 3.14 $5,99 don't\tTABS\r\n\r\nsnake_case camelCase HTTPServer "
    "über Größe naïve日本語テスト 你好，世界 привет שלום العربية "
    "1234567 🙂🚀 a\u0301 x=[1,2]; //path/to/x \n \n end   \n"
)


class Kind(IntEnum):
    """GGUF's types of token."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """``model``: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece). ``tokens``, ``kinds``, ``scores`` by id."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    kinds: tuple[Kind, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    adds_prefix_space: bool


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """``rows``: of the embeddings; ids beyond the tokenizer's get a name that no text has.

    Raises:
        ModelError: no ``tokenizer.json``.
        ConversionError: a tokenizer that llama.cpp would not compute alike.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json.", remedy="Name the folder of a trained model.")
    raw = json.loads(path.read_text("utf-8"))
    model = raw["model"]
    if model.get("type") != "BPE":
        raise ConversionError(
            f"The tokenizer in {folder} is of the type {model.get('type')}; GGUF files here hold BPE.",
            remedy="Use the format onnx or openvino for this model.",
        )
    added = {int(token["id"]): token for token in raw.get("added_tokens") or ()}
    by_id = {int(number): text for text, number in model["vocab"].items()}
    by_id |= {number: token["content"] for number, token in added.items()}
    if max(by_id) >= rows:
        raise ConversionError(
            f"The tokenizer in {folder} has the id {max(by_id)}, and the embeddings have {rows} rows.",
            remedy="Name a folder whose tokenizer and weights belong together.",
        )
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ())
    sentencepiece = bool(model.get("byte_fallback"))
    tokens = tuple(by_id.get(number, f"[PAD{number}]") for number in range(rows))
    kinds = tuple(_kind(number, by_id, added, model.get("unk_token"), sentencepiece) for number in range(rows))
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else find_pre_tokenizer(raw, folder),
        tokens=tokens,
        kinds=kinds,
        merges=() if sentencepiece else merges,
        scores=_scores(tokens, kinds, model.get("merges") or ()) if sentencepiece else (),
        adds_prefix_space=sentencepiece and _adds_prefix_space(raw),
    )


def _kind(
    number: int, by_id: Mapping[int, str], added: Mapping[int, Any], unknown: str | None, sentencepiece: bool
) -> Kind:
    if number not in by_id:
        return Kind.UNUSED
    text = by_id[number]
    if text == unknown:
        return Kind.UNKNOWN
    if number in added:
        return Kind.CONTROL if added[number].get("special") else Kind.USER_DEFINED
    if sentencepiece and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return Kind.BYTE
    return Kind.NORMAL


def _scores(tokens: Sequence[str], kinds: Sequence[Kind], merges: Sequence[Any]) -> tuple[float, ...]:
    """llama.cpp merges the pair whose result has the highest score first."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        rank.setdefault(left + right, number)
    last = len(merges)
    return tuple(
        float(-rank.get(token, last) - 1) if kind == Kind.NORMAL else 0.0
        for token, kind in zip(tokens, kinds, strict=True)
    )


def _adds_prefix_space(raw: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a blank before the text: by its normalizer (Llama 2) or its pre-tokenizer."""
    steps = [raw.get("normalizer") or {}, raw.get("pre_tokenizer") or {}]
    flat = [one for step in steps for one in (step.get("normalizers") or step.get("pretokenizers") or [step])]
    return any(
        one.get("type") == "Prepend" or (one.get("type") == "Metaspace" and one.get("prepend_scheme") != "never")
        for one in flat
    )


def find_pre_tokenizer(raw: Mapping[str, Any], folder: object) -> str:
    """llama.cpp's name of the way in which this byte-level tokenizer cuts text.

    Raises:
        ConversionError: none agrees.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    plain = {**raw, "truncation": None, "padding": None, "post_processor": None}
    own = Tokenizer.from_str(json.dumps(plain)).pre_tokenizer
    byte_level = pre_tokenizers.ByteLevel

    def split(pattern: str) -> Any:
        first = pre_tokenizers.Split(Regex(pattern), "isolated")
        return pre_tokenizers.Sequence([first, byte_level(add_prefix_space=False, use_regex=False)])

    whole_words = bool(raw["model"].get("ignore_merges"))
    known = {
        "gpt-2": byte_level(add_prefix_space=False),
        "smollm": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        ),
        "llama-bpe" if whole_words else "smaug-bpe": split(_LLAMA3),
        "qwen2": split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")),
        "gpt-4o": split(_O200K),
    }
    pieces = None if own is None else [piece for piece, _ in own.pre_tokenize_str(PROBE)]
    for name, candidate in known.items():
        if pieces == [piece for piece, _ in candidate.pre_tokenize_str(PROBE)]:
            return name
    raise ConversionError(
        f"The tokenizer in {folder} cuts text in a way that llama.cpp has no name for that is known here "
        f"({', '.join(known)}).",
        remedy="Use the format onnx or openvino for this model.",
    )


def write_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> Vocabulary:
    """Tokens, merges or scores, special ids and the chat template. Errors as :func:`read_vocabulary`."""
    vocabulary = read_vocabulary(folder, rows)
    config = read_object(folder / "tokenizer_config.json")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([int(kind) for kind in vocabulary.kinds])
    if vocabulary.scores:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.adds_prefix_space)
    else:
        writer.add_token_merges(list(vocabulary.merges))
    ids = {text: number for number, text in reversed(list(enumerate(vocabulary.tokens)))}
    adders = {
        "bos_token": writer.add_bos_token_id,
        "eos_token": writer.add_eos_token_id,
        "unk_token": writer.add_unk_token_id,
        "pad_token": writer.add_pad_token_id,
    }
    for name, add in adders.items():
        text = token_text(config.get(name))
        if text in ids:
            add(ids[text])
    # The templates write their own first token: a second one in front would be read as none that was ever taught.
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))
    writer.add_add_eos_token(False)
    template = template_source(folder, config)
    if template is not None:
        writer.add_chat_template(template)
    return vocabulary
