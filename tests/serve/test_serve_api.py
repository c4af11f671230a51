"""The server on loopback, driven by the official client, for both forms of model."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.slow_generator import SlowGenerator
from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message
from slmops.errors import ServeError
from slmops.runtime import open_classifier, open_generator
from slmops.runtime.base import GenerationRequest
from slmops.runtime.calibration import calibrated
from slmops.runtime.description import ModelDescription
from slmops.serve.app import create_app
from slmops.serve.engine import Engine
from slmops.serve.server import background, bind

QUESTION: list[Any] = [{"role": "user", "content": "where is my card?"}]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def label_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_tiny_classifier(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint, context_tokens=128)
    write_tiny_generator(folder, checkpoint, system="be kind")
    return folder


@pytest.fixture(scope="module")
def labels(label_folder: Path) -> Iterator[str]:
    with background(create_app(label_folder, name="intents")) as url:
        yield url


@pytest.fixture(scope="module")
def texts(text_folder: Path) -> Iterator[str]:
    with background(create_app(text_folder, name="talker")) as url:
        yield url


def slow_server(generator: SlowGenerator, **options: Any) -> Any:
    engine = Engine(generator, ModelDescription("fake", "generator"), **options)
    return background(create_app(Path("nowhere"), name="slow", engine=engine))


# What an answer looks like


def test_models_and_health(labels: str) -> None:
    (model,) = client_of(labels).models.list().data
    assert (model.id, model.object, model.owned_by) == ("intents", "model", "slmops")
    assert client_of(labels).models.retrieve("intents").id == "intents"
    health = httpx.get(f"{labels}/health")
    assert health.status_code == 200
    assert health.json() == {"status": "ok", "live": True, "ready": True, "model": "intents", "at_hand": 0}


def test_a_chat_answer_is_the_engines(texts: str, text_folder: Path) -> None:
    request = GenerationRequest((Message("system", "be kind"), Message("user", QUESTION[0]["content"])), max_tokens=12)
    (expected,) = open_generator(text_folder, threads=1).generate([request])
    answer = client_of(texts).chat.completions.create(model="talker", messages=QUESTION, max_tokens=12)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == expected.completion_tokens == 12
    assert answer.usage.total_tokens == expected.prompt_tokens + 12
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert abs(answer.created - time.time()) < 60


def test_a_system_message_of_the_callers_own_replaces_the_models(texts: str) -> None:
    own = [{"role": "developer", "content": "be kind"}, *QUESTION]
    answers = [
        client_of(texts).chat.completions.create(model="talker", messages=messages, max_completion_tokens=12)
        for messages in (QUESTION, own, [{"role": "system", "content": "other"}, *QUESTION])
    ]
    first, same, other = (answer.choices[0].message.content for answer in answers)
    assert first == same
    assert first != other


@pytest.mark.usefixtures("followed")
def test_a_streamed_chat_is_the_whole_one_in_pieces(texts: str) -> None:
    client = client_of(texts)
    whole = client.chat.completions.create(model="talker", messages=QUESTION, max_tokens=24)
    chunks = list(
        client.chat.completions.create(
            model="talker", messages=QUESTION, max_tokens=24, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, counts = chunks
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert counts.choices == []
    assert counts.usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(pieces) > 4


def test_the_stream_ends_with_done_and_has_no_usage_unless_asked(texts: str) -> None:
    body = {"model": "talker", "messages": QUESTION, "max_tokens": 2, "stream": True}
    response = httpx.post(f"{texts}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    assert all(json.loads(event[6:])["choices"] for event in events[:-2])


def test_the_async_client_streams_several_at_once(texts: str) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model="talker", messages=QUESTION, max_tokens=8, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{texts}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    assert len(set(asyncio.run(ask_all()))) == 1


def test_plain_completions_continue_the_text(texts: str) -> None:
    client = client_of(texts)
    answer = client.completions.create(model="talker", prompt="my card is", max_tokens=8)
    assert answer.object == "text_completion"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    both = client.completions.create(model="talker", prompt=["my card is", "hello"], max_tokens=8)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[0].text == answer.choices[0].text
    streamed = client.completions.create(model="talker", prompt="my card is", max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == answer.choices[0].text


def test_sampling_stop_and_seed_reach_the_engine(texts: str) -> None:
    def ask(**options: Any) -> str:
        options = {"max_tokens": 16, **options}
        return (
            client_of(texts)
            .chat.completions.create(model="talker", messages=QUESTION, **options)
            .choices[0]
            .message.content
            or ""
        )

    assert ask(temperature=1.5, seed=3) == ask(temperature=1.5, seed=3)
    assert len({ask(temperature=1.5, seed=seed) for seed in range(3)}) == 3
    greedy = ask()
    assert ask(temperature=2, top_p=1e-6, seed=1) == greedy
    assert ask(stop=greedy[3:6]) == greedy[: greedy.index(greedy[3:6])]


def test_a_classifier_answers_with_its_label(labels: str, label_folder: Path) -> None:
    client = client_of(labels)
    classifier = open_classifier(label_folder)
    history = [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a fee"},
        {"role": "assistant", "content": "y"},
    ]
    for text in ("my card is lost", "", "ü€😀"):
        expected = LABELS[int(classifier.probabilities([text])[0].argmax())]
        messages: list[Any] = [*history, {"role": "user", "content": [{"type": "text", "text": text}]}]
        answer = client.chat.completions.create(model="intents", messages=messages, temperature=0)
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(
            client.chat.completions.create(
                model="intents", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert chunks[-1].usage == answer.usage
        assert client.completions.create(model="intents", prompt=text).choices[0].text == expected


def test_classify_gives_the_five_likeliest(labels: str, label_folder: Path) -> None:
    texts = ["my card is lost", "fee"]
    expected = open_classifier(label_folder).probabilities(texts)
    rows = httpx.post(f"{labels}/v1/classify", json={"input": texts, "model": "intents"}).json()
    for row, probabilities in zip(rows, expected, strict=True):
        assert row["label"] == LABELS[int(probabilities.argmax())]
        assert row["confidence"] == pytest.approx(float(probabilities.max()), abs=1e-5)
        assert list(row["probabilities"].values()) == pytest.approx(sorted(probabilities.tolist())[::-1][:5], abs=1e-5)
    assert httpx.post(f"{labels}/v1/classify", json={"input": texts[0]}).json() == rows[:1]


def test_a_bundles_calibration_and_threshold_are_applied(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path, calibration={"temperature": 2.5, "threshold": 0.6})
    texts = ["my card is lost", "fee", "hello", "refund", "x"]
    plain = open_classifier(tmp_path).probabilities(texts)
    expected = calibrated(plain, 2.5)
    with background(create_app(tmp_path, name="intents")) as url:
        rows = httpx.post(f"{url}/v1/classify", json={"input": texts}).json()
        for row, before, after in zip(rows, plain, expected, strict=True):
            assert row["label"] == LABELS[int(before.argmax())]
            assert row["confidence"] == pytest.approx(float(after.max()), abs=1e-5)
            assert row["abstain"] is bool(after.max() < 0.6)
        assert {row["abstain"] for row in rows} == {True, False}
        none = httpx.post(f"{url}/v1/classify", json={"input": texts, "threshold": 0}).json()
        assert not any(row["abstain"] for row in none)
        every = httpx.post(f"{url}/v1/classify", json={"input": texts, "threshold": 1}).json()
        assert all(row["abstain"] for row in every)
        for wrong in (-0.1, 1.1, "half", True):
            failure(url, "/v1/classify", 400, json={"input": "x", "threshold": wrong})


# What a failure looks like


def failure(url: str, path: str, status: int, **sent: Any) -> dict[str, Any]:
    response = httpx.post(f"{url}{path}", **sent)
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    return error


CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {"model": "talker", "messages": QUESTION}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", "auto"),
        ("store", True),
        ("logit_bias", {"5": 1}),
        ("frequency_penalty", 0.5),
        ("presence_penalty", -1),
        ("reasoning_effort", "low"),
        ("audio", {}),
        ("frobnicate", 1),
    ],
)
def test_a_parameter_without_effect_is_refused_by_name(texts: str, name: str, value: Any) -> None:
    error = failure(texts, CHAT, 400, json={**GOOD, name: value})
    assert error["code"] == "unsupported_parameter"
    assert error["param"] == name
    assert name in error["message"]
    assert error["type"] == "invalid_request_error"


def test_neutral_values_are_taken(texts: str) -> None:
    neutral = {"n": 1, "tools": [], "logprobs": False, "response_format": {"type": "text"}, "frequency_penalty": 0.0}
    neutral |= {
        "stop": None,
        "user": "u1",
        "tool_choice": "none",
        "seed": None,
        "stream_options": None,
        "max_tokens": 1,
    }
    assert httpx.post(f"{texts}{CHAT}", json={**GOOD, **neutral}).status_code == 200


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": None}, "messages"),
        ({"model": None}, "model"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"n": True}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": {"odd": 1}}, "stream_options.odd"),
    ],
)
def test_a_bad_value_is_named(texts: str, change: dict[str, Any], param: str) -> None:
    error = failure(texts, CHAT, 400, json={**GOOD, **change})
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_stream_options_without_stream_are_refused(texts: str) -> None:
    assert "stream" in failure(texts, CHAT, 400, json={**GOOD, "stream_options": {"include_usage": True}})["message"]


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"null", b'"x"', b"\xff\xfe", b"{'a': 1}"])
def test_a_body_that_is_no_object_is_refused(texts: str, content: bytes) -> None:
    error = failure(texts, CHAT, 400, content=content, headers={"Content-Type": "application/json"})
    assert error["code"] == "invalid_json"


def test_nan_is_no_temperature(texts: str) -> None:
    raw = json.dumps({**GOOD, "temperature": float("nan")})
    failure(texts, CHAT, 400, content=raw, headers={"Content-Type": "application/json"})


def test_another_content_type_is_refused(texts: str) -> None:
    failure(texts, CHAT, 400, content=json.dumps(GOOD), headers={"Content-Type": "text/plain"})


def test_an_unknown_model_is_not_found(texts: str, labels: str) -> None:
    with pytest.raises(openai.NotFoundError, match="'talker' does"):
        client_of(texts).chat.completions.create(model="gpt-9", messages=QUESTION)
    error = failure(labels, "/v1/classify", 404, json={"input": "x", "model": "gpt-9"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client_of(texts).models.retrieve("gpt-9")


def test_unknown_paths_and_methods_are_in_the_same_form(texts: str) -> None:
    failure(texts, "/v1/images", 404, json={})
    failure(texts, "/v1/models", 405, json={})
    assert httpx.get(f"{texts}/docs").status_code == 404


def test_a_conversation_that_does_not_fit_is_refused_with_the_numbers(texts: str) -> None:
    long = [{"role": "user", "content": "x" * 300}]
    for change in ({"messages": long}, {"messages": long, "max_tokens": 5}, {"messages": long, "stream": True}):
        error = failure(texts, CHAT, 400, json={**GOOD, **change})
        assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
        assert "128" in error["message"]
    error = failure(texts, CHAT, 400, json={**GOOD, "max_tokens": 5000})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    error = failure(texts, "/v1/completions", 400, json={"model": "talker", "prompt": "x" * 300, "max_tokens": 1})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_a_body_that_is_too_large_is_refused_however_it_comes(label_folder: Path) -> None:
    with background(create_app(label_folder, name="intents", max_body_bytes=1000)) as url:
        assert failure(url, "/v1/classify", 413, json={"input": "x" * 2000})["code"] == "body_too_large"

        def in_chunks() -> Iterator[bytes]:
            yield b'{"input": "'
            yield from [b"x" * 500] * 4
            yield b'"}'

        headers = {"Content-Type": "application/json"}
        assert failure(url, "/v1/classify", 413, content=in_chunks(), headers=headers)["code"] == "body_too_large"
        assert httpx.post(f"{url}/v1/classify", json={"input": "x" * 500}).status_code == 200


def test_what_a_classifier_cannot_do_is_refused(labels: str, texts: str) -> None:
    good = {"model": "intents", "messages": QUESTION}
    assert failure(labels, CHAT, 400, json={**good, "temperature": 0.7})["param"] == "temperature"
    assert failure(labels, CHAT, 400, json={**good, "stop": "x"})["param"] == "stop"
    assert (
        failure(labels, CHAT, 400, json={**good, "messages": [{"role": "system", "content": "x"}]})["param"]
        == "messages"
    )
    assert failure(labels, "/v1/classify", 400, json={"input": []})["param"] == "input"
    assert failure(labels, "/v1/classify", 400, json={})["param"] == "input"
    assert failure(labels, "/v1/classify", 400, json={"input": ["x", 3]})["param"] == "input[1]"
    assert failure(texts, "/v1/classify", 400, json={"input": "x"})["param"] == "model"


def test_what_plain_completions_cannot_do_is_refused(texts: str) -> None:
    good = {"model": "talker", "prompt": "x"}
    for name, value in {"echo": True, "suffix": "x", "best_of": 2, "logprobs": 9}.items():
        assert failure(texts, "/v1/completions", 400, json={**good, name: value})["param"] == name
    assert failure(texts, "/v1/completions", 400, json={**good, "prompt": ""})["param"] == "prompt"
    assert failure(texts, "/v1/completions", 400, json={**good, "prompt": [1, 2]})["param"].startswith("prompt")


# Many callers


def test_a_caller_that_hangs_up_stops_its_stream() -> None:
    generator = SlowGenerator()
    with slow_server(generator) as url:
        body = {"model": "slow", "messages": QUESTION, "max_tokens": 500, "stream": True}
        with httpx.stream("POST", f"{url}{CHAT}", json=body) as response:
            next(response.iter_lines())
        assert generator.stopped.wait(5)
        assert generator.written < 100
        assert _settles(url)


def test_a_caller_that_hangs_up_stops_its_whole_answer() -> None:
    generator = SlowGenerator()
    with slow_server(generator) as url:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}{CHAT}", json={"model": "slow", "messages": QUESTION, "max_tokens": 500}, timeout=0.3)
        assert generator.stopped.wait(5)
        assert generator.written < 100
        assert _settles(url)


def _settles(url: str) -> bool:
    """Whether nothing is at hand any more, within two seconds."""
    for _ in range(100):
        if httpx.get(f"{url}/health").json()["at_hand"] == 0:
            return True
        time.sleep(0.02)
    return False


def test_a_full_queue_says_when_to_come_again_and_health_still_answers() -> None:
    generator = SlowGenerator()
    generator.running.clear()
    with slow_server(generator, max_waiting=2) as url:
        statuses: list[int] = []
        body = {"model": "slow", "messages": QUESTION, "max_tokens": 4}
        threads = [
            threading.Thread(target=lambda: statuses.append(httpx.post(f"{url}{CHAT}", json=body).status_code))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        while httpx.get(f"{url}/health").json()["at_hand"] < 2:
            time.sleep(0.01)
        response = httpx.post(f"{url}{CHAT}", json=body)
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError):
            client_of(url).chat.completions.create(**body)
        assert statuses == []
        generator.running.set()
        for thread in threads:
            thread.join()
        assert statuses == [200, 200]
        assert httpx.post(f"{url}{CHAT}", json={**body, "max_tokens": 1}).status_code == 200


def test_a_bug_is_an_error_in_the_same_form_and_its_words_stay_out_of_answer_and_log(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="slmops")
    generator = SlowGenerator(0.001)
    with slow_server(generator) as url:
        generator.fail_at = 1
        error = failure(url, CHAT, 500, json={"model": "slow", "messages": QUESTION})
        assert (error["type"], error["code"]) == ("server_error", "internal_error")
        generator.fail_at = 5
        body = {"model": "slow", "messages": QUESTION, "stream": True}
        events = httpx.post(f"{url}{CHAT}", json=body).text.strip().split("\n\n")
        assert json.loads(events[-1][6:])["error"]["code"] == "internal_error"
        with pytest.raises(openai.APIError, match="failed"):
            list(client_of(url).chat.completions.create(**body))
        generator.fail_at = None
        httpx.post(f"{url}/v1/my-secret-path", json={**body, "n": "my secret"})
        assert httpx.post(f"{url}{CHAT}", json={**body, "stream": False}).status_code == 200
    out = caplog.text + "".join(capfd.readouterr())
    assert "KeyError" in out
    assert "slow_generator.py" in out
    assert "POST /v1/chat/completions 200" in out
    for secret in ("secret", "where is my card"):
        assert secret not in out


def test_answers_at_hand_are_finished_when_the_server_ends() -> None:
    generator = SlowGenerator()
    server = slow_server(generator)
    url = server.__enter__()
    got: list[httpx.Response] = []
    body = {"model": "slow", "messages": QUESTION, "max_tokens": 30, "stream": True}
    thread = threading.Thread(target=lambda: got.append(httpx.post(f"{url}{CHAT}", json=body)))
    thread.start()
    while generator.written < 3:
        time.sleep(0.01)
    server.__exit__(None, None, None)
    thread.join()
    assert got[0].text.endswith("data: [DONE]\n\n")
    assert generator.written == 30


def test_a_port_in_use_is_one_clear_sentence(labels: str) -> None:
    port = int(labels.rsplit(":", 1)[1])
    with pytest.raises(ServeError, match=f"127.0.0.1:{port}: Address already in use.*--port"):
        bind("127.0.0.1", port)
    with pytest.raises(ServeError, match="is not a host"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(ServeError, match="no such address"):
        bind("192.0.2.1", 0)
    with bind("127.0.0.1", 0) as taken:
        assert taken.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY only then: 40 ms an answer
