"""What the server tells a recorder of each path, and feedback over HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.slow_generator import SlowGenerator
from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message
from slmops.artifacts.events import Answered, Feedback
from slmops.errors import StorageError
from slmops.runtime.description import ModelDescription
from slmops.serve.app import create_app
from slmops.serve.engine import Engine
from slmops.serve.recording import Recording
from slmops.serve.seen import Seen, answers_of
from slmops.serve.server import background
from slmops.serve.watch import WATCH, Watch


class Notebook:
    """A recorder that remembers, knows the answers it was told, and fails when it is told to."""

    def __init__(self) -> None:
        self.reads: list[Callable[[], Sequence[Answered]]] = []
        self.given: list[Feedback] = []
        self.broken = False
        self.full = False
        self.closed = False

    def observe(self, read: Callable[[], Sequence[Answered]]) -> None:
        if self.broken:
            raise RuntimeError("the recorder is broken")
        self.reads.append(read)

    def feedback(self, given: Feedback) -> bool:
        if self.full:
            raise StorageError("the disk is full.")
        self.given.append(given)
        return given.answer_id in {one.id for one in self.answers()}

    def state(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        self.closed = True

    def answers(self) -> list[Answered]:
        return [one for read in list(self.reads) for one in read()]

    def wait_for(self, count: int) -> list[Answered]:
        end = time.monotonic() + 10
        while len(self.answers()) < count:
            assert time.monotonic() < end, f"{len(self.answers())} of {count} answers were told"
            time.sleep(0.01)
        return self.answers()


@pytest.fixture(scope="module")
def label_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_tiny_classifier(folder)
    return folder


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint, context_tokens=128)
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def labels(label_folder: Path, notebook: Notebook) -> Iterator[str]:
    with background(create_app(label_folder, name="intents", recorder=notebook)) as url:
        yield url


@pytest.fixture
def texts(text_folder: Path, notebook: Notebook) -> Iterator[str]:
    with background(create_app(text_folder, name="talker", recorder=notebook)) as url:
        yield url


def test_labels_of_several_texts(labels: str, notebook: Notebook) -> None:
    before = time.time()
    body = {"input": ["my card is lost", "hello"], "user": "ann", "metadata": {"tenant": "acme"}}
    response = httpx.post(f"{labels}/v1/classify", json=body, headers={"X-Slmops-Slice": "lang=de, tenant=other"})
    rows, name = response.json(), response.headers["x-request-id"]
    first, second = notebook.wait_for(2)
    assert (first.id, second.id) == (f"{name}-0", f"{name}-1")
    assert (first.label, first.confidence) == (rows[0]["label"], rows[0]["confidence"])
    assert first.messages == (Message("user", "my card is lost"),)
    assert second.input == "hello"
    assert first.subject == "ann"
    assert first.slices == {"tenant": "other", "lang": "de"}
    assert (first.kind, first.status, first.completion_tokens) == ("classify", 200, 1)
    assert first.prompt_tokens is not None
    assert before <= first.at <= time.time()
    assert 0 < first.latency_ms < 10_000
    assert first.label in LABELS


def test_a_classifier_that_is_chatted_with(labels: str, notebook: Notebook) -> None:
    client = openai.OpenAI(base_url=f"{labels}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model="intents", messages=[{"role": "user", "content": "my card"}], user="bob", metadata={"tenant": "acme"}
    )
    (told,) = notebook.wait_for(1)
    assert told.id == answer.id
    assert told.label == answer.choices[0].message.content
    assert told.confidence is not None
    assert 0 < told.confidence <= 1
    assert (told.subject, dict(told.slices)) == ("bob", {"tenant": "acme"})


def test_a_text_whole_and_streamed_is_told_alike(texts: str, notebook: Notebook) -> None:
    client = openai.OpenAI(base_url=f"{texts}/v1", api_key="none", max_retries=0)
    messages: Any = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "where is my card?"}]
    asked: dict[str, Any] = {"model": "talker", "messages": messages, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    pieces = list(client.chat.completions.create(**asked, stream=True))
    first, second = notebook.wait_for(2)
    assert (first.id, second.id) == (whole.id, pieces[0].id)
    assert first.output == second.output == whole.choices[0].message.content
    assert first.messages == second.messages == (Message("system", "be kind"), Message("user", "where is my card?"))
    assert first.finish_reason == second.finish_reason == "length"
    assert whole.usage is not None
    for told in (first, second):
        assert (told.prompt_tokens, told.completion_tokens) == (whole.usage.prompt_tokens, 12)
        assert told.label is None
    assert first.first_ms is None
    assert second.first_ms is not None
    assert 0 < second.first_ms <= second.latency_ms


def test_completions_and_failures(texts: str, notebook: Notebook) -> None:
    httpx.post(f"{texts}/v1/completions", json={"model": "talker", "prompt": ["a", "b"], "max_tokens": 3})
    httpx.post(f"{texts}/v1/completions", json={"model": "another", "prompt": "a"})
    httpx.post(f"{texts}/v1/chat/completions", content=b"\xff\xfe not json")
    first, second, unknown, broken = notebook.wait_for(4)
    assert [first.input, second.input] == ["a", "b"]
    assert first.completion_tokens is not None
    assert second.completion_tokens is not None
    assert first.completion_tokens + second.completion_tokens == 6
    assert (unknown.status, unknown.output) == (404, "")
    assert (broken.status, broken.messages) == (400, ())


def test_paths_that_answer_nothing_are_not_told(labels: str, notebook: Notebook) -> None:
    for path in ("/health", "/v1/models", "/v1/nothing"):
        httpx.get(labels + path)
    httpx.post(f"{labels}/v1/feedback", json={"id": "x", "score": 1})
    assert notebook.answers() == []


def test_a_caller_that_goes_away_is_told_as_gone(notebook: Notebook) -> None:
    engine = Engine(SlowGenerator(0.05), ModelDescription("fake", "generator"))
    with background(create_app(Path("nowhere"), name="slow", engine=engine, recorder=notebook)) as url:
        body = {"model": "slow", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        (told,) = notebook.wait_for(1)
    assert told.status == 499
    assert told.messages[0].content == "hi"


def test_a_broken_recorder_breaks_no_request(labels: str, notebook: Notebook) -> None:
    notebook.broken = True
    assert httpx.post(f"{labels}/v1/classify", json={"input": "hello"}).status_code == 200


def test_feedback_over_http(labels: str, notebook: Notebook) -> None:
    name = httpx.post(f"{labels}/v1/classify", json={"input": "hello"}).headers["x-request-id"]
    notebook.wait_for(1)
    body = {"id": name, "score": 0, "correction": "fee", "comment": "no", "user": "ann"}
    for _ in range(2):
        response = httpx.post(f"{labels}/v1/feedback", json=body)
        assert (response.status_code, response.json()) == (200, {"object": "feedback", "id": name})
    given = notebook.given[0]
    assert (given.score, given.correction, given.comment, given.subject) == (0.0, "fee", "no", "ann")
    unknown = httpx.post(f"{labels}/v1/feedback", json={"id": "nobody", "score": 1})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "answer_not_found")
    notebook.full = True
    full = httpx.post(f"{labels}/v1/feedback", json=body)
    assert (full.status_code, full.headers["retry-after"]) == (503, "5")
    assert "disk is full" in full.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"id": "x"}, "give a score from 0 to 1"),
        ({"score": 1}, "Missing required parameter: 'id'"),
        ({"id": "x", "score": 2}, "Invalid 'score'"),
        ({"id": "x", "score": "good"}, "Invalid 'score'"),
        ({"id": "x", "comment": "y" * 40_000}, "Invalid 'comment'"),
        ({"id": "x", "score": 1, "stars": 5}, "Unsupported parameter: 'stars'"),
    ],
)
def test_feedback_that_says_nothing_or_too_much(labels: str, body: dict[str, Any], told: str) -> None:
    response = httpx.post(f"{labels}/v1/feedback", json=body)
    assert response.status_code == 400
    assert told in response.json()["error"]["message"]


def test_without_a_recorder_feedback_says_so(label_folder: Path) -> None:
    with background(create_app(label_folder, name="intents")) as url:
        response = httpx.post(f"{url}/v1/feedback", json={"id": "x", "score": 1})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "not_recording")


def test_the_recorder_is_left_open_by_the_application(label_folder: Path, notebook: Notebook) -> None:
    with background(create_app(label_folder, name="intents", recorder=notebook)):
        pass
    assert not notebook.closed


async def _nothing() -> Any:
    return {"type": "http.request", "body": b'{"input": "x"}', "more_body": False}


def test_a_layer_further_out_gives_its_id_and_what_it_knows(notebook: Notebook) -> None:
    heads: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b'[{"label": "fee", "confidence": 0.5}]'})

    async def keep(message: Any) -> None:
        heads.extend(message.get("headers", ()))

    watch = Watch(id="outer", digest="new", adapter="a", prompt_tokens=4)
    scope = {"type": "http", "method": "POST", "path": "/v1/classify", "headers": [], WATCH: watch}
    asyncio.run(Recording(inner, recorder=notebook)(scope, _nothing, keep))
    (told,) = notebook.answers()
    assert (told.id, told.version, told.adapter, told.prompt_tokens) == ("outer", "new", "a", 4)
    assert told.completion_tokens is None
    assert heads == []


# The wire of paths that are read but may be served elsewhere


def seen(kind: str, request: Any, response: Any, **changes: Any) -> Seen:
    whole = response if isinstance(response, bytes) else json.dumps(response).encode()
    base: dict[str, Any] = {
        "kind": kind,
        "request_id": "req",
        "at": 1.0,
        "status": 200,
        "latency_ms": 1.0,
        "first_ms": None,
        "headers": (),
        "request": (json.dumps(request).encode(),),
        "response": (whole[:7], whole[7:]),
        "streamed": False,
    }
    return Seen(**{**base, **changes})


def test_a_response_whole_and_streamed() -> None:
    request = {"model": "m:adapter", "instructions": "be kind", "input": "hi", "safety_identifier": "ann"}
    body = {
        "id": "resp-1",
        "output": [{"type": "reasoning"}, {"type": "message", "content": [{"type": "output_text", "text": "hello"}]}],
        "usage": {"input_tokens": 5, "output_tokens": 2},
        "incomplete_details": {"reason": "max_output_tokens"},
    }
    events = [{"type": "response.created", "response": {"id": "resp-1"}}, {"type": "response.done", "response": body}]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    for one in (seen("response", request, body), seen("response", request, stream, streamed=True)):
        (told,) = answers_of(one)
        assert (told.id, told.output, told.finish_reason) == ("resp-1", "hello", "length")
        assert (told.model, told.adapter, told.subject) == ("m", "adapter", "ann")
        assert (told.prompt_tokens, told.completion_tokens) == (5, 2)
        assert told.messages == (Message("system", "be kind"), Message("user", "hi"))


def test_several_choices_and_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = {"messages": [{"role": "user", "content": parts}], "response_format": {"type": "json_schema"}}
    body = {"id": "c", "choices": [{"message": {"content": text}, "finish_reason": "stop"} for text in ("x", None)]}
    first, second = answers_of(seen("chat", request, body))
    assert (first.id, second.id) == ("c-0", "c-1")
    assert (first.output, second.output) == ("x", "")
    assert first.input == "ab"
    assert first.wants_json


def test_labels_in_an_envelope_and_notes_of_the_service() -> None:
    body = {"id": "cls-1", "data": [{"label": "fee", "confidence": 0.5}], "usage": {"prompt_tokens": 3}}
    (told,) = answers_of(seen("classify", {"input": "x"}, body, notes={"version": "new", "completion_tokens": 1}))
    assert (told.id, told.label, told.confidence, told.version) == ("cls-1", "fee", 0.5, "new")
    assert (told.prompt_tokens, told.completion_tokens) == (3, 1)


@pytest.mark.parametrize("raw", [b"", b"[", b"[1, 2]", b'{"input": 5}', b'{"messages": [1, {"role": 3}]}', b"\xff"])
@pytest.mark.parametrize("kind", ["chat", "completion", "response", "classify", "embedding"])
def test_whatever_was_sent_is_told_without_a_fault(kind: str, raw: bytes) -> None:
    (told,) = answers_of(replace(seen(kind, {}, b"null"), request=(raw,), status=400))
    assert told.status == 400
    assert answers_of(seen(kind, {}, raw))[0].id
