"""Trimming a tokenizer: known texts read as before, unknown ones lose nothing."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fakes.tiny_models import CHAT_TEMPLATE
from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import ModelError
from slmops.models.vocabulary import TrimmedVocabulary, agreement, trim_vocabulary
from slmops.train.tokens import encode_texts, load_tokenizer, pad, with_end_token

CORPUS = [
    "the quick brown fox jumps over the lazy dog and runs away from the hunters",
    "my card was charged 1234 times on 2024-05-17, please refund the 99.50 that I have paid",
    "where is my parcel? it should have been delivered yesterday, but there is no sign of it",
    "naïve café, Größe, übermäßig, façade, jalapeño, smörgåsbord, Ærøskøbing",
    "東京は日本の首都です。大阪は大きな町です。京都は古い町です。",
    "def encode(text): return [token for token in text.split() if token.isalpha()]",
] * 3
KNOWN = ["where is my card?", "the parcel was delivered on 2024", "café Größe", "東京は古い", "I have paid 99 times"]
UNKNOWN = [
    "the hunters jump 777 times",
    "emoji 😀👍🏽 and \u200b",
    "Привет мир",
    "",
    " ",
    "\n\n\t",
    "délivré",
    "a\u0301",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@lru_cache
def byte_level(*, digits: bool = False, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), split]) if digits else split
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@lru_cache
def metaspace(*, scheme: str = "always", by_normalizer: bool = False) -> Tokenizer:
    """As Llama 2 and Gemma have it: characters, ▁ for a space, bytes for what is not in the alphabet."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if by_normalizer:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    if by_normalizer or scheme != "never":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
            limit_alphabet=90,
            show_progress=False,
            max_token_length=12,
        ),
    )
    # The trainer makes the byte tokens special; in real files they are plain.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(spec))


TOKENIZERS = {
    "byte level": lambda: byte_level(),
    "byte level, digits apart": lambda: byte_level(digits=True),
    "byte level, words first": lambda: byte_level(ignore_merges=True),
    "metaspace": lambda: metaspace(),
    "metaspace before the first word": lambda: metaspace(scheme="first"),
    "metaspace nowhere in front": lambda: metaspace(scheme="never"),
    "metaspace by normalizer": lambda: metaspace(by_normalizer=True),
}


@lru_cache
def both(name: str) -> tuple[Tokenizer, TrimmedVocabulary]:
    full = TOKENIZERS[name]()
    return full, trim_vocabulary(full, KNOWN)


every_kind = pytest.mark.parametrize("name", TOKENIZERS)


@every_kind
def test_known_texts_read_as_before(name: str) -> None:
    full, trimmed = both(name)
    assert trimmed.tokenizer.get_vocab_size() == len(trimmed.kept_ids) < full.get_vocab_size()
    for text in KNOWN:
        old, new = full.encode(text), trimmed.tokenizer.encode(text)
        assert [trimmed.kept_ids[i] for i in new.ids] == old.ids
        assert new.tokens == old.tokens
        assert trimmed.tokenizer.decode(new.ids) == full.decode(old.ids) == text
    assert agreement(full, trimmed, KNOWN) == 1.0


@every_kind
def test_kept_ids_say_which_token_is_which(name: str) -> None:
    full, trimmed = both(name)
    assert len(set(trimmed.kept_ids)) == len(trimmed.kept_ids)
    for new, old in enumerate(trimmed.kept_ids):
        assert trimmed.tokenizer.id_to_token(new) == full.id_to_token(old)
    assert trimmed.tokenizer.id_to_token(len(trimmed.kept_ids)) is None


@every_kind
def test_only_what_is_needed_is_kept(name: str) -> None:
    """Alphabet and special tokens, and of the rest what the texts use or what leads to it."""
    full, trimmed = both(name)
    used = {token for text in KNOWN for token in full.encode(text).tokens}
    merged = [token for token in trimmed.tokenizer.get_vocab() if len(token) > 1 and not token.startswith("<")]
    assert used & set(merged)
    assert all(any(token in longer for longer in used) for token in merged)


@every_kind
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
@example(text="\x00\x7f\x80")
@example(text="▁▁ ▁")
@example(text="<0x41>")
@example(text="<|im_end|> </s>")
def test_unseen_text_round_trips(name: str, text: str) -> None:
    """Whatever the full tokenizer keeps of a text, the trimmed one keeps."""
    full, trimmed = both(name)
    ids = trimmed.tokenizer.encode(text).ids
    assert trimmed.tokenizer.decode(ids, skip_special_tokens=False) == full.decode(
        full.encode(text).ids, skip_special_tokens=False
    )
    if name.startswith("byte"):
        assert trimmed.tokenizer.decode(ids, skip_special_tokens=False) == text


@every_kind
@settings(max_examples=25, deadline=None)
@given(texts=st.lists(st.text(alphabet="abeé 12東😀", max_size=20) | st.sampled_from(CORPUS), max_size=4))
def test_any_texts_may_be_known(name: str, texts: list[str]) -> None:
    full = TOKENIZERS[name]()
    trimmed = trim_vocabulary(full, texts)
    assert agreement(full, trimmed, texts) == 1.0


def test_unseen_text_may_be_cut_otherwise_and_agreement_says_how_often() -> None:
    full, trimmed = both("byte level")
    texts = [*KNOWN, *UNKNOWN]
    same = [
        full.encode(text).ids == [trimmed.kept_ids[i] for i in trimmed.tokenizer.encode(text).ids] for text in texts
    ]
    assert 0 < sum(same) < len(texts)
    assert agreement(full, trimmed, texts) == sum(same) / len(texts)
    assert agreement(full, trimmed, []) == 1.0


def test_no_texts_leave_alphabet_and_special_tokens() -> None:
    trimmed = trim_vocabulary(byte_level(), [])
    assert sorted(trimmed.tokenizer.get_vocab()) == sorted([*pre_tokenizers.ByteLevel.alphabet(), *SPECIAL])


def test_trimming_twice_changes_nothing() -> None:
    once = trim_vocabulary(byte_level(), KNOWN)
    twice = trim_vocabulary(once.tokenizer, KNOWN)
    assert twice.kept_ids == tuple(range(len(once.kept_ids)))
    assert json.loads(twice.tokenizer.to_str()) == json.loads(once.tokenizer.to_str())


def test_the_order_of_texts_does_not_matter() -> None:
    forth, back = trim_vocabulary(byte_level(), KNOWN), trim_vocabulary(byte_level(), [*reversed(KNOWN), *KNOWN])
    assert forth.kept_ids == back.kept_ids
    assert forth.tokenizer.to_str() == back.tokenizer.to_str()


# --- special tokens ---------------------------------------------------------------------------------------------


@every_kind
def test_special_tokens_inside_texts_stay_whole(name: str) -> None:
    full = TOKENIZERS[name]()
    open_token, close_token = ("<|im_start|>", "<|im_end|>") if name.startswith("byte") else ("<s>", "</s>")
    texts = [f"{open_token}user\nwhere is my parcel?{close_token}\n{open_token}assistant\nthe fox has it{close_token}"]
    trimmed = trim_vocabulary(full, texts)
    tokens = trimmed.tokenizer.encode(texts[0]).tokens
    assert tokens.count(open_token) == tokens.count(close_token) == 2
    assert agreement(full, trimmed, texts) == 1.0


def test_a_chat_rendering_ends_as_it_did(tmp_path: Path) -> None:
    """Through the chat layer: prompt and answer of the trimmed tokenizer are those of the full one."""
    full = byte_level(digits=True)
    conversation = (Message("user", "where is my parcel?"),)
    chats = {}
    for name in ("full", "trimmed"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": CHAT_TEMPLATE, "eos_token": "<|im_end|>"})
        )
        chats[name] = folder
    full.save(str(chats["full"] / "tokenizer.json"))
    rendered = ChatTokenizer.load(chats["full"]).render(
        (*conversation, Message("assistant", "yesterday")), add_generation_prompt=False
    )
    trimmed = trim_vocabulary(full, [rendered])
    trimmed.tokenizer.save(str(chats["trimmed"] / "tokenizer.json"))
    before, after = (ChatTokenizer.load(chats[name]).encode_training(conversation, "yesterday") for name in chats)
    assert [trimmed.kept_ids[i] for i in after.input_ids] == before.input_ids
    assert after.loss_mask == before.loss_mask
    ends = [ChatTokenizer.load(chats[name]).eos_token_ids for name in chats]
    assert [tuple(trimmed.kept_ids[i] for i in ends[1])] == [ends[0]]


def test_a_special_token_outside_the_models_vocabulary() -> None:
    """Added behind the trained vocabulary, as fine-tuned models have theirs."""
    full = Tokenizer.from_str(byte_level().to_str())
    full.add_special_tokens([AddedToken("<|tool|>", special=True)])
    full.add_tokens(["PlainAddition"])
    trimmed = trim_vocabulary(full, ["call <|tool|> now with PlainAddition"])
    assert trimmed.kept_ids[-2:] == (full.token_to_id("<|tool|>"), full.token_to_id("PlainAddition"))
    assert "<|tool|>" in trimmed.tokenizer.encode("a<|tool|>b").tokens
    assert "PlainAddition" in trimmed.tokenizer.encode("aPlainAddition").tokens


@pytest.mark.parametrize(
    "processor",
    [
        lambda t: processors.TemplateProcessing(
            single="<|im_start|> $A <|im_end|>",
            special_tokens=[(token, t.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>")],
        ),
        lambda t: processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single="$A <|im_end|>", special_tokens=[("<|im_end|>", t.token_to_id("<|im_end|>"))]
                ),
            ]
        ),
        lambda t: processors.BertProcessing(
            ("<|im_end|>", t.token_to_id("<|im_end|>")), ("<|im_start|>", t.token_to_id("<|im_start|>"))
        ),
    ],
)
def test_post_processors_get_the_new_ids(processor: object) -> None:
    full = Tokenizer.from_str(byte_level().to_str())
    full.add_special_tokens(["<|zz|>"])
    full.post_processor = processor(full)  # type: ignore[operator]
    trimmed = trim_vocabulary(full, KNOWN)
    for text in KNOWN:
        assert trimmed.tokenizer.encode(text).tokens == full.encode(text).tokens
        assert trimmed.tokenizer.encode(text).tokens[-1] == "<|im_end|>"


# --- what cannot be trimmed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_other_kinds_are_refused_with_a_remedy(kind: str) -> None:
    model = {
        "Unigram": lambda: models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0),
        "WordPiece": lambda: models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
    }[kind]()
    with pytest.raises(ModelError, match=f"vocabulary of a {kind} tokenizer cannot be trimmed") as caught:
        trim_vocabulary(Tokenizer(model), ["a"])
    assert caught.value.remedy == "Set student.vocabulary: keep."


def test_a_tokenizer_that_would_read_otherwise_is_refused() -> None:
    """Tokens with a mark for the end of a word are not understood, and that is found out, not shipped."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, end_of_word_suffix="</w>", show_progress=False)
    )
    with pytest.raises(ModelError, match="would read 'the lazy dog' differently") as caught:
        trim_vocabulary(tokenizer, ["the lazy dog"])
    assert caught.value.remedy == "Set student.vocabulary: keep."


# --- tokens of a classifier -------------------------------------------------------------------------------------


def test_with_end_token_closes_every_text() -> None:
    full = byte_level()
    before = full.encode("where is my card").ids
    closing = with_end_token(full, "<|im_end|>")
    assert closing.encode("where is my card").ids == [*before, full.token_to_id("<|im_end|>")]
    assert full.encode("where is my card").ids == before, "the original was changed"
    assert Tokenizer.from_str(closing.to_str()).encode("").ids == [full.token_to_id("<|im_end|>")]


@pytest.mark.parametrize("behind_bytes", [False, True])
def test_with_end_token_beside_a_token_that_opens(behind_bytes: bool) -> None:
    """Tokenizers that put BOS in front (Llama, Gemma) close their texts too, alone and behind another processor."""
    opened = Tokenizer.from_str(byte_level().to_str())
    template = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    opened.post_processor = (
        processors.Sequence([processors.ByteLevel(trim_offsets=False), template]) if behind_bytes else template
    )
    closing = with_end_token(opened, "<|im_end|>")
    assert closing.encode("a b").tokens == ["<|im_start|>", "a", "Ġb", "<|im_end|>"]
    assert with_end_token(closing, "<|im_end|>").to_str() == closing.to_str(), "closed twice"
    trimmed = trim_vocabulary(closing, [*KNOWN, "a b"])
    assert trimmed.tokenizer.encode("a b").tokens == ["<|im_start|>", "a", "Ġb", "<|im_end|>"]


def test_with_end_token_leaves_a_tokenizer_that_closes_by_itself() -> None:
    full = Tokenizer.from_str(byte_level().to_str())
    full.post_processor = processors.BertProcessing(("<|im_end|>", 2), ("<|im_start|>", 1))
    assert with_end_token(full, "<|im_end|>").encode("a b").tokens == ["<|im_start|>", "a", "Ġb", "<|im_end|>"]


def test_common_merges_stay_though_no_text_needs_them() -> None:
    full = byte_level()
    bare, rich = trim_vocabulary(full, KNOWN), trim_vocabulary(full, KNOWN, common_merges=120)
    merges = [tuple(merge) for merge in json.loads(full.to_str())["model"]["merges"]]
    kept = {tuple(merge) for merge in json.loads(rich.tokenizer.to_str())["model"]["merges"]}
    assert set(merges[:120]) < kept
    assert set(bare.kept_ids) < set(rich.kept_ids)
    assert agreement(full, rich, KNOWN) == 1.0
    assert agreement(full, rich, CORPUS) >= agreement(full, bare, CORPUS)
    assert trim_vocabulary(full, KNOWN, common_merges=10**6).kept_ids == tuple(range(full.get_vocab_size()))


def test_encode_texts_cuts_and_never_returns_nothing() -> None:
    tokenizer = byte_level()
    found = encode_texts(tokenizer, ["", "where is my card", "x" * 500], 3)
    assert found[0] == [0]
    assert found[1] == tokenizer.encode("where is my card").ids[:3]
    assert [len(ids) for ids in found] == [1, 3, 3]
    assert encode_texts(tokenizer, [], 3) == []
    assert len(tokenizer.encode("x" * 500).ids) > 3, "the cut stayed behind"


def test_a_cut_text_is_still_closed() -> None:
    """As the runtimes do it: the model has seen the end token behind every text, long ones too."""
    closing = with_end_token(byte_level(), "<|im_end|>")
    [ids] = encode_texts(closing, ["where is my card " * 50], 6)
    assert len(ids) == 6
    assert ids[-1] == closing.token_to_id("<|im_end|>")
    assert ids[:5] == byte_level().encode("where is my card " * 50).ids[:5]


def test_pad() -> None:
    input_ids, attention_mask = pad([[5, 6, 7], [8], [9, 9]])
    assert input_ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert str(input_ids.dtype) == str(attention_mask.dtype) == "torch.int64"


def test_a_folder_without_a_fast_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(tmp_path)
    assert caught.value.remedy == "Name the folder of a model with a fast tokenizer."
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cuts_and_pads_by_itself_is_told_not_to(tmp_path: Path) -> None:
    full = Tokenizer.from_str(byte_level().to_str())
    full.enable_truncation(2)
    full.enable_padding(length=50)
    full.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("where is my card").ids == byte_level().encode("where is my card").ids
