"""Functions over HTTP, driven by the official client: offered, forced, called, answered; and schemas of answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from fakes.scripted_generator import ScriptedGenerator
from fakes.tiny_models import write_tiny_generator, write_tiny_llama
from slmops.chat.tools import HERMES, LLAMA, SMOLLM, ToolFormat
from slmops.runtime.constraint import check_constraint
from slmops.runtime.description import ModelDescription
from slmops.serve.app import create_app
from slmops.serve.engine import Engine
from slmops.serve.server import background
from slmops.serve.tools import CallScanner, calls_grammar

QUESTION: list[Any] = [{"role": "user", "content": "where is my card?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "the sky over a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"place": {"enum": ["Rom", "Bonn"]}},
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
TWO = ('<tool_call>\n{"name": "time"}\n</tool_call>', '<tool_call>{"name": "time"}</tool_call>')
CALL = '<tool_call>[{"name": "weather", "arguments": {"place": "Rom", "days": 2}}]</tool_call>'


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint, context_tokens=1024)
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def texts(folder: Path) -> Iterator[str]:
    with background(create_app(folder, name="talker")) as url:
        yield url


@pytest.fixture
def scripted(folder: Path) -> Iterator[tuple[str, ScriptedGenerator]]:
    generator = ScriptedGenerator(folder)
    engine = Engine(generator, ModelDescription("fake", "generator"))
    with background(create_app(Path("nowhere"), name="talker", engine=engine)) as url:
        yield url, generator


def place_of(arguments: str) -> Any:
    value = json.loads(arguments)
    assert value["place"] in ("Rom", "Bonn")
    assert 1 <= value["days"] <= 9
    return value["place"]


# Forced, by a real model that knows nothing


def test_a_required_call_is_made_and_keeps_to_its_schema(texts: str) -> None:
    for options in ({}, {"temperature": 1.5, "seed": 4}):
        answer = client_of(texts).chat.completions.create(
            model="talker", messages=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
            max_tokens=300, **options,
        )  # fmt: skip
        (choice,) = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls or ()
        assert (call.type, call.function.name) == ("function", "weather")
        assert call.id.startswith("call_")
        place_of(call.function.arguments)


def test_a_named_function_is_the_one_that_is_called(texts: str) -> None:
    for name in ("weather", "time"):
        answer = client_of(texts).chat.completions.create(
            model="talker", messages=QUESTION, tools=[WEATHER, TIME], parallel_tool_calls=False, max_tokens=300,
            tool_choice={"type": "function", "function": {"name": name}},
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.function.name == name
        if name == "time":
            assert call.function.arguments == "{}"


def test_no_arguments_are_made_up_that_the_function_does_not_name(texts: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    for seed in range(3):
        answer = client_of(texts).chat.completions.create(
            model="talker", messages=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False,
            max_tokens=60, temperature=1.5, seed=seed,
        )  # fmt: skip
        (call,) = answer.choices[0].message.tool_calls or ()
        assert json.loads(call.function.arguments) in ({"a": 1}, {"a": 2})


def test_a_streamed_call_is_the_whole_one(texts: str) -> None:
    asked: dict[str, Any] = {
        "model": "talker", "messages": QUESTION, "tools": [WEATHER], "tool_choice": "required",
        "parallel_tool_calls": False, "max_tokens": 300,
    }  # fmt: skip
    whole = client_of(texts).chat.completions.create(**asked).choices[0].message.tool_calls
    chunks = list(client_of(texts).chat.completions.create(**asked, stream=True))
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert whole is not None
    assert [(delta.index, delta.function.name, delta.function.arguments) for delta in deltas if delta.function] == [
        (0, "weather", whole[0].function.arguments)  # type: ignore[union-attr]
    ]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client_of(texts).chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.message.tool_calls is not None
    assert final.message.tool_calls[0].function.name == "weather"


def test_the_whole_round_by_the_clients_own_types(texts: str) -> None:
    client = client_of(texts)
    first = client.chat.completions.create(
        model="talker", messages=QUESTION, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False,
        max_tokens=300,
    )  # fmt: skip
    message = first.choices[0].message
    assert message.tool_calls is not None
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    messages: list[Any] = [*QUESTION, message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(model="talker", messages=messages, tools=[WEATHER], max_tokens=4)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.prompt_tokens > first.usage.prompt_tokens


class Booking(BaseModel):
    place: Literal["Rom", "Bonn"]
    people: int
    vegetarian: bool


def test_a_structured_answer_is_parsed_by_the_client(texts: str) -> None:
    done = client_of(texts).chat.completions.parse(
        model="talker", messages=QUESTION, response_format=Booking, max_tokens=300
    )
    assert isinstance(done.choices[0].message.parsed, Booking)
    response = client_of(texts).responses.parse(
        model="talker", input="where?", text_format=Booking, max_output_tokens=300
    )
    assert isinstance(response.output_parsed, Booking)
    tool = openai.pydantic_function_tool(Booking)
    called = client_of(texts).chat.completions.parse(
        model="talker", messages=QUESTION, tools=[tool], tool_choice="required", parallel_tool_calls=False,
        max_tokens=300,
    )  # fmt: skip
    assert called.choices[0].message.tool_calls is not None
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Booking)


def test_any_object_and_a_schema_of_ones_own(texts: str) -> None:
    client = client_of(texts)
    numbers = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}
    form: Any = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": numbers, "strict": True}}
    for stream in (False, True):
        answer = client.chat.completions.create(
            model="talker", messages=QUESTION, response_format=form, max_tokens=200, stream=stream, temperature=1.2
        )
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in answer)  # type: ignore[union-attr]
            if stream
            else answer.choices[0].message.content  # type: ignore[union-attr]
        )
        value = json.loads(text or "")
        assert 2 <= len(value) <= 3
        assert all(isinstance(one, int) for one in value)
    small: Any = {**form, "json_schema": {"name": "x", "schema": {"const": {"a": 1}}}}
    whole = client.chat.completions.create(model="talker", messages=QUESTION, response_format=small, n=2, logprobs=True)
    assert [choice.message.content for choice in whole.choices] == ['{"a": 1}'] * 2 or all(
        json.loads(choice.message.content or "") == {"a": 1} for choice in whole.choices
    )
    text = (
        client.chat.completions.create(
            model="talker", messages=QUESTION, response_format={"type": "json_object"}, max_tokens=40
        )
        .choices[0]
        .message.content
    )
    assert (text or "").startswith("{")


# Chosen by the model


def test_a_call_is_read_out_of_the_text(scripted: tuple[str, ScriptedGenerator]) -> None:
    url, generator = scripted
    generator.script = f"Let me see.\n{CALL}"
    asked: dict[str, Any] = {"model": "talker", "messages": QUESTION, "tools": [WEATHER]}
    (choice,) = client_of(url).chat.completions.create(**asked).choices
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls or ()
    assert place_of(call.function.arguments) == "Rom"
    assert choice.finish_reason == "tool_calls"
    assert generator.asked[-1].constraint is None
    assert generator.asked[-1].tools[0]["function"]["name"] == "weather"
    chunks = list(client_of(url).chat.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Let me see."
    assert sum(len(chunk.choices[0].delta.tool_calls or ()) for chunk in chunks) == 1
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_without_tools_a_call_is_text(scripted: tuple[str, ScriptedGenerator]) -> None:
    url, generator = scripted
    generator.script = CALL
    for more in ({}, {"tools": [TIME]}, {"tools": [WEATHER], "tool_choice": "none"}):
        (choice,) = client_of(url).chat.completions.create(model="talker", messages=QUESTION, **more).choices
        assert choice.message.content == CALL
        assert choice.message.tool_calls is None
        assert choice.finish_reason == "stop"
    assert generator.asked[-1].tools == ()


def test_strict_functions_are_held_to_their_schema_whenever_they_are_called(
    scripted: tuple[str, ScriptedGenerator],
) -> None:
    url, generator = scripted
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    client_of(url).chat.completions.create(model="talker", messages=QUESTION, tools=[strict])
    constraint = generator.asked[-1].constraint
    assert constraint is not None
    assert constraint.kind == "grammar"
    assert "until0" in constraint.source


def test_an_engine_without_the_ability_refuses_by_name(scripted: tuple[str, ScriptedGenerator]) -> None:
    url, generator = scripted
    generator.abilities = frozenset()
    form = {"type": "json_object"}
    for change, param in (
        ({"tools": [WEATHER]}, "tools"),
        ({"response_format": form}, "response_format"),
        ({"logprobs": True}, "logprobs"),
    ):
        answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "talker", "messages": QUESTION, **change})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert answer.json()["error"]["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("form", "text", "expected"),
    [
        (SMOLLM, "plain text with a < sign\n", ["plain text with a < sign\n"]),
        (SMOLLM, CALL, [("weather", '{"place": "Rom", "days": 2}')]),
        (HERMES, f"{TWO[0]}\n{TWO[1]}\n", [("time", "{}")] * 2),
        (HERMES, 'a <tool_call>{"name": "time"}</tool_call> b', ["a", ("time", "{}"), " b"]),
        (HERMES, '<tool_call>{"name": "time"}', [("time", "{}")]),
        (HERMES, '<tool_call>{"name": "ti', ['<tool_call>{"name": "ti']),
        (HERMES, "<tool_call>no</tool_call> and on", ["<tool_call>no</tool_call>", " and on"]),
        (HERMES, '{"name": "time", "arguments": {}}', [("time", "{}")]),
        (HERMES, '{"temperature": 3}', ['{"temperature": 3}']),
        (HERMES, "<tool_cal", ["<tool_cal"]),
        (HERMES, " \n", [" \n"]),
        (LLAMA, '\n{"name": "time", "parameters": {}}', [("time", "{}")]),
        (LLAMA, "It is {late}.", ["It is {late}."]),
        (LLAMA, "{late}", ["{late}"]),
    ],
)  # fmt: skip
def test_the_scanner_gives_the_same_however_the_pieces_are_cut(form: ToolFormat, text: str, expected: Any) -> None:
    for size in (1, 2, 5, 1000):
        scanner = CallScanner(form, {"weather", "time"})
        found: list[Any] = []
        for start in range(0, len(text), size):
            found += scanner.push(text[start : start + size])
        found += scanner.finish()
        assert put_together(found) == put_together(expected), size


def put_together(parts: list[Any]) -> list[Any]:
    """Neighbouring texts as one."""
    made: list[Any] = []
    for part in parts:
        if isinstance(part, str) and made and isinstance(made[-1], str):
            made[-1] += part
        else:
            made.append(part)
    return made


def test_a_grammar_of_every_form() -> None:
    functions: Any = [("weather", WEATHER["function"]["parameters"]), ("time", {"type": "object"})]
    for form in (HERMES, LLAMA, SMOLLM):
        for otherwise in (None, "text", {"type": "integer"}):
            constraint = calls_grammar(functions, form, parallel=True, otherwise=otherwise)  # type: ignore[arg-type]
            check_constraint(constraint)
            assert bool(constraint.tags) == (form is not LLAMA)
