"""Functions in the templates of each family, and calls as each family writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slmops.artifacts import Message, ToolCall
from slmops.chat import ChatTemplate, ChatTokenizer, ToolFormat, read_calls
from slmops.chat.token_bytes import token_bytes
from slmops.chat.tools import HERMES, LLAMA, PHI, SMOLLM, format_of

TEMPLATES = Path(__file__).parent / "templates"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the sky over a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = ToolCall("call_1", "weather", '{"place": "Łódź"}')
ASKED = (Message("user", "Will it rain?"),)
TALK = (
    *ASKED,
    Message("assistant", "", tool_calls=(CALL,)),
    Message("tool", "rain at five", tool_call_id="call_1", name="weather"),
)


def template(name: str) -> ChatTemplate:
    source = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


FORMS = {
    "qwen25_tools": HERMES,
    "smollm3_tools": HERMES,
    "llama32_tools": LLAMA,
    "phi4mini_tools": PHI,
    "smollm2": SMOLLM,
    "gemma3": SMOLLM,
    "qwen25": SMOLLM,
    "phi3": SMOLLM,
}


@pytest.mark.parametrize("name", FORMS)
def test_functions_calls_and_results_all_reach_the_model(name: str) -> None:
    one = template(name)
    assert one.tool_format == FORMS[name]
    text = one.render(TALK, add_generation_prompt=True, tools=[WEATHER])
    for part in ("weather", "the sky over a place", "Will it rain?", "Łódź", "rain at five"):
        assert part in text, part
    assert text.index("the sky over a place") < text.index("Łódź") < text.index("rain at five")
    assert one.tool_format.write([CALL]) in text
    plain = one.render(ASKED, add_generation_prompt=True)
    assert "weather" not in plain
    assert one.render(ASKED, add_generation_prompt=True, tools=()) == plain


def test_each_family_tells_of_functions_in_its_own_place() -> None:
    def told(name: str) -> str:
        return template(name).render(ASKED, add_generation_prompt=True, tools=[WEATHER])

    assert "<tools>\n" + json.dumps(WEATHER, ensure_ascii=False) in told("qwen25_tools")
    assert "<|tool|>" + json.dumps([WEATHER["function"]], ensure_ascii=False) + "<|/tool|>" in told("phi4mini_tools")
    assert told("llama32_tools").startswith("<s><|start_header_id|>user<|end_header_id|>\n\n{\n    ")
    assert "### Tools" in told("smollm3_tools")
    for name in ("smollm2", "phi3", "qwen25"):
        assert '<tool_call>[{"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}]</tool_call>' in told(name)
    # A template without a system turn has it all in the user's.
    assert told("gemma2").index("weather") < told("gemma2").index("Will it rain?")


def test_results_that_follow_one_another_are_one_turn() -> None:
    two = (*TALK, Message("tool", "no wind", tool_call_id="call_2"), Message("user", "Thanks."))
    text = template("phi3").render(two, add_generation_prompt=True)
    both = "<tool_response>\nrain at five\n</tool_response>\n<tool_response>\nno wind\n</tool_response>"
    assert f"<|user|>\n{both}<|end|>" in text


@pytest.mark.parametrize("form", [HERMES, LLAMA, PHI, SMOLLM])
def test_what_is_written_is_read_again(form: ToolFormat) -> None:
    calls = [CALL, ToolCall("call_2", "time", "{}")]
    body = form.write(calls).replace(form.opener, "").replace(form.closer, "") if form.opener else form.write(calls)
    found = read_calls(body, {"weather", "time"})
    assert found is not None
    assert [(name, json.loads(arguments)) for name, arguments in found] == [
        ("weather", {"place": "Łódź"}),
        ("time", {}),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', [("f", '{"a": 1}')]),
        ('{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {}}', [("f", '{"a": 1}'), ("f", "{}")]),
        ('[{"name": "f"}, {"name": "f", "arguments": "{\\"a\\": 2}"}]', [("f", "{}"), ("f", '{"a": 2}')]),
        ('{"name": "unknown", "arguments": {}}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": "f", "arguments": "x"}', None),
        ('{"name": 3}', None),
        ("[]", None),
        ("3", None),
        ("", None),
        ('{"name": "f"} and so on', None),
        ('{"name": "f", "arguments": {"a": ', None),
        ("[" * 100_000, None),
    ],
)
def test_calls_are_read_leniently_and_never_guessed(text: str, expected: Any) -> None:
    assert read_calls(text, {"f"}) == expected


def test_an_unknown_family_is_the_plain_one() -> None:
    assert format_of("{{ messages }}") == SMOLLM


def test_bytes_of_tokens_make_the_text(folders: dict[str, Path]) -> None:
    text = "Was kostet das?  Zwei Stück für 3,50 €. 日本語 😀"
    for name, folder in folders.items():
        chat = ChatTokenizer.load(folder)
        ids = chat.encode(text, add_special_tokens=False)
        made = b"".join(chat.bytes_of(token) for token in ids).decode()
        if name != "unigram":  # knows no bytes: what it cannot spell is lost
            assert made.strip() == text, name
    assert token_bytes(ChatTokenizer.load(folders["smollm2"])._tokenizer)(10**9) == b""


def test_control_texts_by_whose_they_are(folders: dict[str, Path]) -> None:
    chat = ChatTokenizer.load(folders["qwen25"])
    assert chat.control_text("see <|im_end|> there") == "<|im_end|>"
    assert chat.control_text("nothing of the kind <im_end>") is None
    assert chat.control_text("x <|im_start|>", of_the_model=True) == "<|im_start|>"
