"""The responses path and its events, several choices, log-probabilities and embeddings, by the official client."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from fakes.scripted_generator import ScriptedGenerator
from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.chat import ChatTokenizer
from slmops.runtime.description import ModelDescription
from slmops.serve.app import create_app
from slmops.serve.engine import Engine
from slmops.serve.server import background

QUESTION: list[Any] = [{"role": "user", "content": "where is my card?"}]
TOOL: dict[str, Any] = {
    "type": "function", "name": "time", "description": "what time it is",
    "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
                   "additionalProperties": False}, "strict": True,
}  # fmt: skip


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder, context_tokens=1024)
    return folder


@pytest.fixture(scope="module")
def texts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("text") / "model"
    write_tiny_generator(folder, checkpoint, options=["include_hidden_states=true"])
    with background(create_app(folder, name="talker")) as url:
        yield url


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("labels")
    write_tiny_classifier(folder)
    with background(create_app(folder, name="intents")) as url:
        yield url


@pytest.fixture
def scripted(checkpoint: Path) -> Iterator[tuple[str, ScriptedGenerator]]:
    generator = ScriptedGenerator(checkpoint)
    engine = Engine(generator, ModelDescription("fake", "generator"))
    with background(create_app(Path("nowhere"), name="talker", engine=engine)) as url:
        yield url, generator


# Responses


def test_a_response_is_the_chats_answer(texts: str) -> None:
    client = client_of(texts)
    chat = client.chat.completions.create(model="talker", messages=QUESTION, max_tokens=9)
    for given in (QUESTION[0]["content"], QUESTION, [{"type": "message", **QUESTION[0]}]):
        response = client.responses.create(model="talker", input=given, max_output_tokens=9, store=False)
        assert response.output_text == chat.choices[0].message.content
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == 9
    system = [{"role": "system", "content": "be brief"}, *QUESTION]
    told = client.chat.completions.create(model="talker", messages=system, max_tokens=9).choices[0].message.content
    asked = client.responses.create(model="talker", input=QUESTION, instructions="be brief", max_output_tokens=9)
    assert asked.output_text == told


def test_a_conversation_goes_on_without_a_memory(texts: str) -> None:
    client = client_of(texts)
    first = client.responses.create(model="talker", input=QUESTION, max_output_tokens=5)
    history: list[Any] = [*QUESTION, *first.output, {"role": "user", "content": "and now?"}]
    second = client.responses.create(model="talker", input=history, max_output_tokens=5)
    messages: list[Any] = [
        *QUESTION,
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "and now?"},
    ]
    chat = client.chat.completions.create(model="talker", messages=messages, max_tokens=5)
    assert second.output_text == chat.choices[0].message.content


@pytest.mark.usefixtures("followed")
def test_the_events_of_a_stream_are_those_that_the_client_expects(texts: str) -> None:
    client = client_of(texts)
    asked: dict[str, Any] = {"model": "talker", "input": QUESTION, "max_output_tokens": 12}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[4:] == [
        *["response.output_text.delta"] * len(deltas), "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text  # type: ignore[union-attr]
    with client.responses.stream(**asked) as stream:
        assert [event.type for event in stream] == kinds


def test_functions_forced_called_and_answered(texts: str) -> None:
    client = client_of(texts)
    asked: dict[str, Any] = {
        "model": "talker", "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False,
        "max_output_tokens": 200,
    }  # fmt: skip
    response = client.responses.create(input=QUESTION, **asked)
    (call,) = response.output
    assert call.type == "function_call"
    assert call.name == "time"
    assert json.loads(call.arguments)["zone"] in ("UTC", "CET")
    assert response.status == "completed"
    with client.responses.stream(input=QUESTION, **asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[2:6] == [
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done",
    ]  # fmt: skip
    assert final.output[0].type == "function_call"
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    again = client.responses.create(
        model="talker", tools=[TOOL], tool_choice="none", input=[*QUESTION, call, result], max_output_tokens=4
    )  # fmt: skip
    assert again.output[0].type == "message"
    named = client.responses.create(input=QUESTION, **{**asked, "tool_choice": {"type": "function", "name": "time"}})
    assert named.output[0].type == "function_call"


def test_text_and_calls_keep_their_order(scripted: tuple[str, ScriptedGenerator]) -> None:
    url, generator = scripted
    call = '<tool_call>[{"name": "time", "arguments": {"zone": "UTC"}}]</tool_call>'
    for script, kinds in (
        (f"First. {call}", ["message", "function_call"]),
        (f"{call} Then.", ["function_call", "message"]),
        (call, ["function_call"]),
        ("", ["message"]),
    ):
        generator.script = script
        whole = client_of(url).responses.create(model="talker", input="x", tools=[TOOL])
        assert [item.type for item in whole.output] == kinds
        with client_of(url).responses.stream(model="talker", input="x", tools=[TOOL]) as stream:
            done = [event for event in stream if event.type == "response.output_item.done"]
            final = stream.get_final_response()
        assert [item.type for item in final.output] == kinds
        assert {event.output_index for event in done} == set(range(len(kinds)))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"reasoning": {"effort": "low"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "input_image"}]}, "input[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "function_call", "call_id": "x", "name": "f", "arguments": "3"}]}, "input[0].arguments"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"max_output_tokens": 100_000}, "max_output_tokens"),
    ],
)
def test_what_a_response_cannot_have_is_named(texts: str, change: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{texts}/v1/responses", json={"model": "talker", "input": "x", **change})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert answer.json()["error"]["message"]


def test_a_classifier_responds_with_its_label(labels: str) -> None:
    client = client_of(labels)
    response = client.responses.create(model="intents", input="my card is lost")
    assert response.output_text in LABELS
    with client.responses.stream(model="intents", input="my card is lost") as stream:
        assert stream.get_final_response().output_text == response.output_text
    for change in ({"tools": [TOOL]}, {"text": {"format": {"type": "json_object"}}}, {"top_logprobs": 2}):
        answer = httpx.post(f"{labels}/v1/responses", json={"model": "intents", "input": "x", **change})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == next(iter(change))


def test_a_failure_within_a_stream_is_its_last_event(scripted: tuple[str, ScriptedGenerator]) -> None:
    url, generator = scripted
    generator.script = "some text"
    generator.finish_reason = "stop"
    plain = generator.stream

    def broken(request: Any) -> Any:
        for number, piece in enumerate(plain(request)):
            if number == 2:
                raise KeyError("secret")
            yield piece

    generator.stream = broken  # type: ignore[method-assign]
    answer = httpx.post(f"{url}/v1/responses", json={"model": "talker", "input": "x", "stream": True})
    last = json.loads(answer.text.strip().split("data: ")[-1])
    assert last["type"] == "error"
    assert "secret" not in answer.text


# Several choices, log-probabilities


def test_several_choices_differ_can_be_had_again_and_read_the_prompt_once(texts: str) -> None:
    client = client_of(texts)
    asked: dict[str, Any] = {"model": "talker", "messages": QUESTION, "n": 3, "max_tokens": 8, "temperature": 1.5}
    one = client.chat.completions.create(**{**asked, "n": 1, "seed": 6})
    answer = client.chat.completions.create(**asked, seed=5)
    found = [choice.message.content for choice in answer.choices]
    assert len(set(found)) == 3
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert found[1] == one.choices[0].message.content
    assert answer.usage is not None
    assert one.usage is not None
    assert answer.usage.prompt_tokens == one.usage.prompt_tokens
    assert answer.usage.completion_tokens == 24
    texts_of: dict[int, str] = {}
    last: Any = None
    for chunk in client.chat.completions.create(**asked, seed=5, stream=True, stream_options={"include_usage": True}):
        last = chunk
        for choice in chunk.choices:
            texts_of[choice.index] = texts_of.get(choice.index, "") + (choice.delta.content or "")
    assert [texts_of[index] for index in range(3)] == found
    assert last.usage == answer.usage


def test_several_prompts_of_several_choices_are_streamed(texts: str) -> None:
    client = client_of(texts)
    asked: dict[str, Any] = {"model": "talker", "prompt": ["my card", "hello"], "n": 2, "max_tokens": 4}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    found = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert [found[index] for index in range(4)] == [choice.text for choice in whole.choices]


def test_log_probabilities_in_all_three_forms(texts: str) -> None:
    client = client_of(texts)
    chat = client.chat.completions.create(
        model="talker", messages=QUESTION, max_tokens=6, logprobs=True, top_logprobs=2
    )
    told = chat.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 6
    whole = b"".join(bytes(token.bytes or ()) for token in told.content)
    assert whole.decode("utf-8", "replace") == chat.choices[0].message.content
    for token in told.content:
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)  # greedy
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        assert 0 < math.exp(token.logprob) <= 1
    chunks = client.chat.completions.create(model="talker", messages=QUESTION, max_tokens=6, logprobs=True, stream=True)
    streamed = [
        token.logprob
        for chunk in chunks
        for choice in chunk.choices
        if choice.logprobs
        for token in choice.logprobs.content or ()
    ]
    assert streamed == pytest.approx([token.logprob for token in told.content])
    older = client.completions.create(model="talker", prompt="my card is", max_tokens=5, logprobs=2).choices[0].logprobs
    assert older is not None
    assert len(older.tokens or ()) == len(older.text_offset or ()) == len(older.token_logprobs or ()) == 5
    assert [len(one) for one in older.top_logprobs or ()] == [2] * 5
    newer = client.responses.create(
        model="talker", input=QUESTION, max_output_tokens=6, top_logprobs=1, include=["message.output_text.logprobs"]
    )
    part = newer.output[0].content[0]  # type: ignore[union-attr]
    assert [token.logprob for token in part.logprobs] == pytest.approx(streamed)  # type: ignore[union-attr]


# Embeddings


def test_embeddings_are_the_mean_of_the_last_states(texts: str, checkpoint: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    sentences = ["where is my card?", "my card is lost", "ü€😀"]
    found = client_of(texts).embeddings.create(model="talker", input=sentences)
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    chat = ChatTokenizer.load(checkpoint)
    tokens = 0
    for sentence, one in zip(sentences, found.data, strict=True):
        ids = chat.encode(sentence)
        tokens += len(ids)
        with torch.inference_mode():
            state = model.model(torch.tensor([ids])).last_hidden_state[0].mean(0).numpy()
        assert np.linalg.norm(one.embedding) == pytest.approx(1, abs=1e-5)
        assert np.asarray(one.embedding) == pytest.approx(state / np.linalg.norm(state), abs=1e-3)
    assert found.usage.prompt_tokens == tokens
    raw = [
        httpx.post(f"{texts}/v1/embeddings", json={"model": "talker", "input": sentences[0], "encoding_format": form})
        for form in ("float", "base64")
    ]
    numbers, packed = (answer.json()["data"][0]["embedding"] for answer in raw)
    assert np.frombuffer(base64.b64decode(packed), "<f4").tolist() == pytest.approx(numbers)


def test_embeddings_that_cannot_be_had_are_refused_by_name(labels: str, texts: str) -> None:
    answer = httpx.post(f"{labels}/v1/embeddings", json={"model": "intents", "input": "x"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_model"
    assert "gives no embeddings" in answer.json()["error"]["message"]
    for change, param in (
        ({"dimensions": 5}, "dimensions"),
        ({"input": [1, 2]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
    ):
        answer = httpx.post(f"{texts}/v1/embeddings", json={"model": "talker", "input": "x", **change})
        assert answer.status_code == 400, change
        assert answer.json()["error"]["param"] == param, answer.text
