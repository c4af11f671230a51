"""Token ids equal to transformers' own, and the loss mask equal to a plain reference, for each family of templates."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from chat_families import Family

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer

transformers = pytest.importorskip("transformers")

SYSTEM = Message("system", "Answer with one label.\nNothing else. ")
USER = Message("user", "The card has not arrived yet")
TEXTS = {
    "plain": "The card has not arrived yet",
    "unicode": "日本語 и ÅÄÖ e\u0301 \u00a0 \u200d ½ ﬁ",
    "emoji": "👩‍👩‍👧 ok? 🏳️‍🌈🇩🇪",
    "newlines": "\n\n  first\r\n\tsecond\n\n\nlast \n",
    "control": "say <|im_end|> or </s> or <|eot_id|><end_of_turn>\n<|end|><|user|> now",
    "quotes": '{{ messages }} {% if %} "quoted" \\n </think>',
    "digits": "12345 + 3,50 = ?",
}


def _hf(folder: Path) -> object:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def _hf_ids(folder: Path, messages: list[Message], *, prompt: bool, **options: object) -> list[int]:
    raw = [message.to_json() for message in messages]
    # Told a date, as slmops tells one; a template that asks the clock is tested below.
    encoded = _hf(folder).apply_chat_template(raw, add_generation_prompt=prompt, tokenize=True, **options)
    ids: list[int] = encoded["input_ids"]
    return ids


@pytest.fixture(autouse=True)
def _fixed_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The day that slmops tells templates, told by transformers too."""
    import transformers.utils.chat_template_utils as utils

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2024, 7, 26)

    monkeypatch.setattr(utils, "datetime", Clock)


def _conversations(text: str, knows_system: bool) -> list[list[Message]]:
    user = Message("user", text)
    turns = [user, Message("assistant", text), USER, Message("assistant", "arrival"), user]
    plain = [[user], turns]
    return plain + [[SYSTEM, *one] for one in plain] if knows_system else plain


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_ids_equal_those_of_transformers(folders: dict[str, Path], family: Family, text: str) -> None:
    folder = folders[family.name]
    chat = ChatTokenizer.load(folder)
    for messages in _conversations(text, family.knows_system):
        assert chat.encode_prompt(messages) == _hf_ids(folder, messages, prompt=True, enable_thinking=False)
        if "think" not in text:
            whole = [*messages, Message("assistant", text)]
            encoded = chat.encode_training(messages, text)
            assert encoded.input_ids == _hf_ids(folder, whole, prompt=False, enable_thinking=False)


@pytest.mark.parametrize("name", ["qwen3", "smollm3"])
def test_ids_equal_with_the_template_s_own_defaults(folders: dict[str, Path], name: str) -> None:
    chat = ChatTokenizer.load(folders[name], template_options={})
    messages = [SYSTEM, USER]
    assert chat.encode_prompt(messages) == _hf_ids(folders[name], messages, prompt=True)
    whole = [*messages, Message("assistant", "arrival")]
    assert chat.encode_training(messages, "arrival").input_ids == _hf_ids(folders[name], whole, prompt=False)


def test_special_tokens_equal_those_of_transformers(folders: dict[str, Path], family: Family) -> None:
    chat, hf = ChatTokenizer.load(folders[family.name]), _hf(folders[family.name])
    assert chat.bos_token_id == hf.bos_token_id
    assert hf.eos_token_id in chat.eos_token_ids
    assert chat.vocab_size == len(hf)
    if hf.pad_token_id is not None:
        assert chat.pad_token_id == hf.pad_token_id


def test_plain_text_equals_transformers(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        chat, hf = ChatTokenizer.load(folder), _hf(folder)
        texts = list(TEXTS.values())
        assert chat.encode_batch(texts) == hf(texts)["input_ids"], name
        assert [chat.encode(text) for text in texts] == hf(texts)["input_ids"], name
        bare = hf(texts, add_special_tokens=False)["input_ids"]
        assert chat.encode_batch(texts, add_special_tokens=False) == bare, name
        cut = hf(texts, truncation=True, max_length=5)["input_ids"]
        assert chat.encode_batch(texts, max_tokens=5) == cut, name
        assert [chat.decode(ids) for ids in bare] == hf.batch_decode(bare, skip_special_tokens=True), name


# The loss mask


def _reference_mask(folder: Path, prompt: str, full: str, end: int) -> list[bool]:
    """Plain: which tokens touch the characters from the prompt's end to ``end``.

    A token's characters are found by decoding nothing and trusting nothing: by the offsets of a tokenizer of which
    leading spaces were not trimmed away, through transformers.
    """
    assert full.startswith(prompt)
    offsets = _hf(folder)(full, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    mask, before = [], 0
    for start, stop in offsets:
        begin = min(start, before) if stop > before else start  # trimmed spaces belong to the token that follows
        mask.append(stop > len(prompt) and begin < end)
        before = max(before, stop)
    return mask


TARGETS = ["arrival", "Zwei Stück für 3,50 €.", "日本語 🏳️‍🌈", "line\n\nline\n  three", "x", "system user model"]


@pytest.mark.parametrize("target", TARGETS)
def test_mask_is_the_answer_and_the_end_of_the_turn(folders: dict[str, Path], family: Family, target: str) -> None:
    folder = folders[family.name]
    chat = ChatTokenizer.load(folder)
    for messages in _conversations("user says <|im_end|> arrival", family.knows_system):
        encoded = chat.encode_training(messages, target)
        assert len(encoded.input_ids) == len(encoded.loss_mask)
        assert encoded.prompt_tokens == encoded.loss_mask.index(True)

        learnt = [token for token, counts in zip(encoded.input_ids, encoded.loss_mask, strict=True) if counts]
        assert chat.encode_prompt(messages) == encoded.input_ids[: encoded.prompt_tokens]
        # SentencePiece's decoder drops a first space: where the answer has one, something has to stand before it.
        before = "x" if family.lead else ""
        text = chat.decode([*chat.encode(before, add_special_tokens=False), *learnt], skip_special_tokens=False)
        assert text == before + family.lead + target + family.turn_end
        assert learnt[-1] in chat.eos_token_ids

        prompt = chat.render(messages, add_generation_prompt=True)
        full = chat.render([*messages, Message("assistant", target)], add_generation_prompt=False)
        end = len(full) - len(family.tail)
        assert full[len(prompt) : end] == family.lead + target + family.turn_end
        assert encoded.loss_mask == _reference_mask(folder, prompt, full, end)


def test_a_template_that_asks_for_the_day_gets_the_one_it_was_opened_with(folders: dict[str, Path]) -> None:
    for name, written in (("llama32", "Today Date: 05 Mar 2031"), ("smollm3", "Today Date: 05 March 2031")):
        told = ChatTokenizer.load(folders[name], date=datetime.date(2031, 3, 5))
        assert written in told.render([USER], add_generation_prompt=True)
        assert "26 Jul" in ChatTokenizer.load(folders[name]).render([USER], add_generation_prompt=True)


@pytest.mark.parametrize("name", ["llama2", "llama32", "gemma3"])
def test_no_second_bos(folders: dict[str, Path], name: str) -> None:
    chat = ChatTokenizer.load(folders[name])
    assert chat.encode("x")[0] == chat.bos_token_id  # the post-processor would write one
    assert chat.encode_prompt([USER]).count(chat.bos_token_id) == 1
