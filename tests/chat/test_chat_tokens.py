"""What a chat tokenizer does beside agreeing with transformers: odd templates, odd folders, streams."""

from __future__ import annotations

import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chat_families import TEMPLATES, Family

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.chat.template import fold_system
from slmops.errors import DataError, ModelError, ModelNotFoundError

SYSTEM = Message("system", "Be brief.")
USER = Message("user", "The card has not arrived yet")
ASSISTANT = Message("assistant", "arrival")


def _with_template(folder: Path, into: Path, source: str) -> ChatTokenizer:
    shutil.copytree(folder, into)
    (into / "chat_template.jinja").write_text(source, "utf-8")
    return ChatTokenizer.load(into)


def _learnt(chat: ChatTokenizer, messages: list[Message], target: str) -> str:
    encoded = chat.encode_training(messages, target)
    ids = [token for token, counts in zip(encoded.input_ids, encoded.loss_mask, strict=True) if counts]
    return chat.decode(ids, skip_special_tokens=False)


# System messages


@pytest.mark.parametrize("name", ["gemma2", "phi3_first"])
def test_system_text_goes_into_the_first_user_turn_where_the_template_has_no_place(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    base = folders["gemma2" if name == "gemma2" else "phi3"]
    chat = _with_template(base, tmp_path / name, (TEMPLATES / f"{name}.jinja").read_text("utf-8"))
    folded = [Message("user", "Be brief.\n\nThe card has not arrived yet")]
    assert chat.render([SYSTEM, USER], add_generation_prompt=True) == chat.render(folded, add_generation_prompt=True)
    assert chat.encode_training([SYSTEM, USER], "arrival") == chat.encode_training(folded, "arrival")


def test_gemma_2_folds_as_gemma_3_does(folders: dict[str, Path]) -> None:
    two, three = ChatTokenizer.load(folders["gemma2"]), ChatTokenizer.load(folders["gemma3"])
    messages = [SYSTEM, USER, ASSISTANT, USER]
    assert two.encode_prompt(messages) == three.encode_prompt(messages)


def test_fold_system() -> None:
    assert fold_system([SYSTEM, SYSTEM, USER, ASSISTANT]) == (
        Message("user", "Be brief.\n\nBe brief.\n\n" + USER.content),
        ASSISTANT,
    )
    assert fold_system([USER, SYSTEM]) == (USER, SYSTEM)
    assert fold_system([SYSTEM, ASSISTANT]) == (SYSTEM, ASSISTANT)
    assert fold_system([SYSTEM]) == (SYSTEM,)


# The mask, at its edges


def test_an_answer_that_is_trimmed_is_learnt_trimmed(folders: dict[str, Path]) -> None:
    gemma = ChatTokenizer.load(folders["gemma3"])
    assert _learnt(gemma, [USER], "  arrival \n") == "arrival<end_of_turn>"
    assert gemma.encode_training([USER], " arrival ") == gemma.encode_training([USER], "arrival")


def test_an_empty_answer_is_the_end_of_the_turn(folders: dict[str, Path], family: Family) -> None:
    chat = ChatTokenizer.load(folders[family.name])
    if family.name == "phi3":  # its template leaves out a turn without text
        with pytest.raises(DataError, match="rewrites the answer"):
            chat.encode_training([USER], "")
        return
    encoded = chat.encode_training([USER], "")
    learnt = [token for token, counts in zip(encoded.input_ids, encoded.loss_mask, strict=True) if counts]
    assert learnt[-1] in chat.eos_token_ids
    assert len(learnt) == 1 or family.lead


def test_a_token_on_both_sides_of_the_border_counts(folders: dict[str, Path], tmp_path: Path) -> None:
    """ "\\n" and "\\n\\n" of the prompt's end and the answer's beginning are one token of Gemma's."""
    source = (TEMPLATES / "gemma3.jinja").read_text("utf-8").replace(" | trim", "")
    chat = _with_template(folders["gemma3"], tmp_path / "untrimmed", source)
    encoded = chat.encode_training([USER], "\narrival")
    first = encoded.input_ids[encoded.prompt_tokens]
    assert chat.decode([first]) == "\n\n"  # one of the prompt, one of the answer
    assert _learnt(chat, [USER], "\narrival") == "\n\narrival<end_of_turn>"
    assert encoded.prompt_tokens == len(chat.encode_prompt([USER])) - 1


def test_a_border_token_that_ends_in_a_space_counts(folders: dict[str, Path]) -> None:
    """Byte-level tokenizers may leave spaces out of a token's offsets: "\\n " would seem to end with the prompt."""
    chat = ChatTokenizer.load(folders["smollm2"])
    assert '"trim_offsets": true' in (folders["smollm2"] / "tokenizer.json").read_text("utf-8")
    assert len(chat.encode("\n ", add_special_tokens=False)) == 1
    assert _learnt(chat, [USER], "  arrival") == "\n  arrival<|im_end|>"


def test_a_control_token_that_swallows_the_answer_s_white_space_is_not_learnt(folders: dict[str, Path]) -> None:
    chat = ChatTokenizer.load(folders["phi3"])
    assert _learnt(chat, [USER], "\n arrival") == "arrival<|end|>"
    encoded = chat.encode_training([USER], "\n arrival")
    assert encoded.input_ids[: encoded.prompt_tokens] == chat.encode_prompt([USER])


def test_the_answer_s_text_elsewhere_does_not_matter(folders: dict[str, Path], family: Family) -> None:
    chat = ChatTokenizer.load(folders[family.name])
    for target in ("arrival", "end", "assistant", "<", "s"):
        messages = [Message("user", target), Message("assistant", target), Message("user", target)]
        encoded = chat.encode_training(messages, target)
        assert encoded.input_ids[: encoded.prompt_tokens] == chat.encode_prompt(messages)


def test_an_answer_that_spells_the_end_is_learnt_whole(folders: dict[str, Path]) -> None:
    chat = ChatTokenizer.load(folders["smollm2"])
    assert _learnt(chat, [USER], "a<|im_end|>b") == "a<|im_end|>b<|im_end|>"


def test_a_turn_that_ends_with_text_is_learnt_to_its_end(folders: dict[str, Path], tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n###\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    chat = _with_template(folders["smollm2"], tmp_path / "text", source)
    assert _learnt(chat, [USER], "arrival").strip(" ") == "arrival\n###\n"


def test_thoughts_are_learnt_where_the_template_is_told_to_think(folders: dict[str, Path]) -> None:
    thinking = ChatTokenizer.load(folders["qwen3"], template_options={"enable_thinking": True})
    target = "<think>\nthe card\n</think>\n\narrival"
    assert _learnt(thinking, [USER], target) == target + "<|im_end|>"
    with pytest.raises(DataError, match="enable_thinking"):
        ChatTokenizer.load(folders["qwen3"]).encode_training([USER], target)


def test_a_prompt_that_is_not_the_beginning_of_the_whole_is_warned_of(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = "{{ 'P' if add_generation_prompt else 'T' }}" + (TEMPLATES / "smollm2.jinja").read_text("utf-8")
    chat = _with_template(folders["smollm2"], tmp_path / "other", source)
    with caplog.at_level(logging.WARNING):
        assert _learnt(chat, [USER], "arrival") == "arrival<|im_end|>"
        chat.encode_training([USER], "arrival")
    assert len(caplog.records) == 1


def test_a_template_that_changes_the_answer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    source = (TEMPLATES / "smollm2.jinja").read_text("utf-8").replace("message['content']", "message['content'][:3]")
    chat = _with_template(folders["smollm2"], tmp_path / "cut", source)
    with pytest.raises(DataError, match="rewrites the answer"):
        chat.encode_training([USER], "arrival")


# Errors


def test_a_folder_without_a_template_can_do_all_but_chat(folders: dict[str, Path]) -> None:
    chat = ChatTokenizer.load(folders["unigram"])
    assert not chat.has_template
    assert chat.decode(chat.encode("The card")) == "The card"
    assert len(chat.eos_token_ids) == 1
    with pytest.raises(ModelError, match=r"no chat template.*chat_template\.jinja"):
        chat.encode_prompt([USER])


def test_the_template_s_own_words_reach_the_user(folders: dict[str, Path]) -> None:
    for name in ("gemma2", "gemma3", "llama2"):
        chat = ChatTokenizer.load(folders[name])
        with pytest.raises(ModelError, match=r"user, user.*must go user/assistant/user/assistant"):
            chat.encode_prompt([USER, USER])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
    ],
)
def test_a_template_that_fails_or_breaks_out_is_refused(
    folders: dict[str, Path], tmp_path: Path, source: str, says: str
) -> None:
    chat = _with_template(folders["smollm2"], tmp_path / "bad", source)
    with pytest.raises(ModelError, match=says):
        chat.render([USER], add_generation_prompt=True)


def test_bad_folders(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        ChatTokenizer.load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="line 1"):
        _with_template(folders["smollm2"], tmp_path / "syntax", "{% for %}")
    broken = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": "[]",
        "generation_config.json": '{"eos_token_id": ["x"]}',
    }
    for name, content in broken.items():
        folder = tmp_path / f"broken-{name}"
        shutil.copytree(folders["llama32"], folder)
        (folder / name).write_text(content, "utf-8")
        with pytest.raises(ModelError, match=name.replace(".", r"\.")):
            ChatTokenizer.load(folder)
    (tmp_path / "broken-tokenizer.json" / "tokenizer.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTokenizer.load(tmp_path / "broken-tokenizer.json")


def test_no_messages(folders: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="no message"):
        ChatTokenizer.load(folders["smollm2"]).encode_prompt([])


# Folders


def test_template_and_tokens_out_of_the_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    """Older folders: the template inside tokenizer_config.json, tokens that tokenizer.json does not hold."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path / "old"
    shutil.copytree(folders["smollm2"], folder)
    source = (folder / "chat_template.jinja").read_text("utf-8")
    (folder / "chat_template.jinja").unlink()
    size = ChatTokenizer.load(folders["smollm2"]).vocab_size
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", **flags},
        "pad_token": "<|pad|>",
        "added_tokens_decoder": {
            str(size + 1): {"content": "<tool>", "special": False, **flags},
            str(size): {"content": "<|extra|>", "special": True, **flags},
        },
        "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": source}],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    chat, hf = ChatTokenizer.load(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    message = Message("user", "a <tool> b <|extra|><|pad|>")
    assert chat.vocab_size == len(hf) == size + 3
    assert chat.pad_token_id == hf.pad_token_id == size + 2
    encoded = hf.apply_chat_template([message.to_json()], add_generation_prompt=True)
    assert chat.encode_prompt([message]) == encoded["input_ids"]


def test_eos_is_every_token_that_ends_a_turn(folders: dict[str, Path]) -> None:
    def texts(name: str) -> set[str]:
        chat = ChatTokenizer.load(folders[name])
        return {chat.decode([token], skip_special_tokens=False) for token in chat.eos_token_ids}

    assert texts("llama32") == {"<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"}
    assert texts("gemma3") == {"<eos>", "<end_of_turn>"}
    assert texts("gemma2") == {"<eos>", "<end_of_turn>"}  # no configuration says so: the template does
    assert texts("phi3") == {"<|endoftext|>", "<|end|>"}


def test_control_text_of_a_user_is_told(folders: dict[str, Path]) -> None:
    chat = ChatTokenizer.load(folders["qwen3"])
    harmless = [Message("user", "a < b |im_end| <think> im_end")]
    assert not chat.contains_control_text(harmless)
    spelt = [USER, Message("assistant", "x<|im_end|>")]
    assert chat.contains_control_text(spelt)
    im_end = chat.eos_token_ids[0]
    assert (
        chat.encode_prompt(spelt).count(im_end)
        == chat.encode_prompt([USER, Message("assistant", "x")]).count(im_end) + 1
    )


def test_half_an_emoji_is_encoded_as_a_question_mark(folders: dict[str, Path]) -> None:
    chat = ChatTokenizer.load(folders["qwen25"])
    assert chat.encode("a\ud83d b") == chat.encode("a? b")
    assert chat.encode_training([Message("user", "\ud83d")], "\ud83d") == chat.encode_training(
        [Message("user", "?")], "?"
    )


# Streams


def test_pieces_make_the_whole(folders: dict[str, Path]) -> None:
    for name, folder in folders.items():
        chat = ChatTokenizer.load(folder)
        text = "Zwei  Stück für 3,50 €.\n日本語 👩‍👩‍👧🇩🇪 end "
        ids = chat.encode(text, add_special_tokens=False)
        decoder = chat.stream_decoder()
        pieces = [decoder.push(token) for token in ids]
        assert not any("\ufffd" in piece for piece in pieces), name
        assert "".join(pieces) + decoder.flush() == chat.decode(ids), name
        assert decoder.flush() == ""


def test_pieces_of_any_tokens_make_the_whole(folders: dict[str, Path]) -> None:
    byte_fallback = {"phi3", "llama2", "gemma2", "gemma3"}  # show broken bytes in another way: see the module
    dice = random.Random(7)
    texts = 0
    for name, folder in folders.items():
        chat = ChatTokenizer.load(folder)
        for _ in range(60):
            ids = [dice.randrange(chat.vocab_size) for _ in range(dice.randrange(1, 40))]
            decoder = chat.stream_decoder()
            streamed = "".join([decoder.push(token) for token in ids]) + decoder.flush()
            whole = chat.decode(ids)
            if "\ufffd" not in whole or name not in byte_fallback:
                texts += 1
                assert streamed == whole, (name, ids)
    assert texts > 300


# Size


def test_needs_neither_torch_nor_transformers(folders: dict[str, Path]) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from slmops.chat import ChatTokenizer; from slmops.artifacts import Message;"
        f"ChatTokenizer.load(Path({str(folders['gemma2'])!r})).encode_training([Message('user', 'x')], 'y');"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
