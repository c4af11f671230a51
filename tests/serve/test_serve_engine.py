"""A batch behind the server: many callers at once, one that goes away, an engine that dies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.tiny_models import write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message
from slmops.runtime import open_generator
from slmops.runtime.base import Delta, GenerationRequest
from slmops.runtime.batch import BatchGenerator
from slmops.runtime.description import ModelDescription
from slmops.runtime.engines import open_engine
from slmops.runtime.upstream import Upstream, UpstreamGenerator
from slmops.serve.app import create_app
from slmops.serve.batch_loop import gathered
from slmops.serve.engine import Engine
from slmops.serve.server import background

CHAT = "/v1/chat/completions"


def body(text: str, **options: Any) -> dict[str, Any]:
    return {"model": "talker", "messages": [{"role": "user", "content": text}], "max_tokens": 24, **options}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint, context_tokens=1024)
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    return Engine.open(folder, threads=1, engine="onnx-batch")


@pytest.fixture(scope="module")
def server(folder: Path, engine: Engine) -> Iterator[str]:
    with background(create_app(folder, name="talker", engine=engine)) as url:
        yield url


def test_sixty_four_callers_get_their_own_answers(server: str, folder: Path) -> None:
    texts = [f"hello {number % 7}" for number in range(64)]
    one_by_one = open_generator(folder, threads=1)
    expected = {
        text: one_by_one.generate([GenerationRequest((Message("user", text),), max_tokens=24)])[0].text
        for text in set(texts)
    }

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0) as client:

            async def ask(number: int) -> str:
                if number % 2:
                    whole = await client.chat.completions.create(**body(texts[number]))
                    return str(whole.choices[0].message.content)
                chunks = await client.chat.completions.create(**body(texts[number]), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(ask(number) for number in range(64)))

    assert asyncio.run(ask_all()) == [expected[text] for text in texts]
    assert httpx.get(f"{server}/health").json()["at_hand"] == 0


def test_a_caller_that_goes_away_leaves_the_batch(server: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.model
    assert isinstance(model, BatchGenerator)
    step = model.step

    def slow() -> None:
        time.sleep(0.01)
        step()

    monkeypatch.setattr(model, "step", slow)  # 900 tokens take longer than any machine is busy
    with httpx.stream("POST", f"{server}{CHAT}", json=body("hello", max_tokens=900, stream=True)) as response:
        next(response.iter_lines())
        assert model.running == 1
    gone = time.monotonic()
    while model.running and time.monotonic() - gone < 8:
        time.sleep(0.01)
    assert model.running == 0
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server}{CHAT}", json=body("hello", max_tokens=900), timeout=0.5)
    gone = time.monotonic()
    while (model.running or engine.at_hand) and time.monotonic() - gone < 8:
        time.sleep(0.01)
    assert (model.running, engine.at_hand) == (0, 0)


def test_an_engine_that_dies_is_opened_anew(folder: Path) -> None:
    engine = Engine.open(folder, threads=1, engine="onnx-batch")
    with background(create_app(folder, name="talker", engine=engine)) as url:
        before = httpx.post(f"{url}{CHAT}", json=body("hello")).json()
        found: list[httpx.Response] = []
        caller = threading.Thread(
            target=lambda: found.append(httpx.post(f"{url}{CHAT}", json=body("hello", max_tokens=900), timeout=30))
        )
        caller.start()
        model = engine.model
        assert isinstance(model, BatchGenerator)
        while not model.running:
            time.sleep(0.001)
        model._session = None  # type: ignore[attr-defined] # the next step fails
        caller.join()
        assert found[0].status_code == 500
        assert "Ask again" in found[0].json()["error"]["message"]
        assert "NoneType" not in found[0].text
        assert httpx.post(f"{url}{CHAT}", json=body("hello")).json()["choices"] == before["choices"]
        assert engine.restarts == 1
        assert engine.model is not model
        assert httpx.get(f"{url}/health").status_code == 200


def test_an_engine_that_cannot_be_opened_again_is_not_ready(folder: Path) -> None:
    def reopen() -> BatchGenerator:
        raise OSError("no memory")

    model = open_engine("onnx-batch", folder, threads=1)
    assert isinstance(model, BatchGenerator)
    engine = Engine(model, ModelDescription.read(folder), reopen=reopen)
    with background(create_app(folder, name="talker", engine=engine)) as url:
        assert httpx.get(f"{url}/health").status_code == 200
        model._session = None  # type: ignore[attr-defined]
        assert httpx.post(f"{url}{CHAT}", json=body("hello")).status_code == 500
        assert httpx.post(f"{url}{CHAT}", json=body("hello"), timeout=5).status_code == 500
        assert httpx.get(f"{url}/health").status_code == 503


def test_the_queue_is_bounded_and_empties(folder: Path) -> None:
    engine = Engine.open(folder, threads=1, engine="onnx-batch", max_waiting=3)

    async def ask_all(url: str) -> list[int]:
        async with httpx.AsyncClient(timeout=30) as client:
            posts = [client.post(f"{url}{CHAT}", json=body("hello", max_tokens=300)) for _ in range(12)]
            return [answer.status_code for answer in await asyncio.gather(*posts)]

    with background(create_app(folder, name="talker", engine=engine)) as url:
        statuses = asyncio.run(ask_all(url))
        assert set(statuses) == {200, 429}
        assert statuses.count(200) >= 3
        assert httpx.post(f"{url}{CHAT}", json=body("hello")).status_code == 200


def test_an_upstream_is_served_side_by_side(server: str) -> None:
    upstream = UpstreamGenerator(Upstream("talker", f"{server}/v1"))
    engine = Engine(upstream, upstream.description, name="upstream")
    with background(create_app(Path("nowhere"), name="talker", engine=engine)) as url:
        direct, through = (httpx.post(f"{one}{CHAT}", json=body("hello")).json() for one in (server, url))
        assert through["choices"] == direct["choices"]
        assert through["usage"] == direct["usage"]
        refused = httpx.post(f"{url}/v1/completions", json={"model": "talker", "prompt": "x"}).json()["error"]
        assert "conversations alone" in refused["message"]


def test_a_classifier_is_served_as_before(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path / "model")
    engine = Engine.open(tmp_path / "model")
    assert (engine.name, engine.ready, engine.restarts) == ("", True, 0)
    engine.close()
    assert not engine.ready


def test_pieces_that_wait_together_become_one() -> None:
    loop = asyncio.new_event_loop()
    one: Any = asyncio.Queue()
    other: Any = asyncio.Queue()
    error = ValueError("x")
    out: list[Any] = [
        (loop, one, Delta("a")),
        (loop, other, Delta("x")),
        (loop, one, Delta("b")),
        (loop, one, Delta("c", "length", 3, 4)),
        (loop, one, None),
        (loop, other, error),
    ]
    assert gathered(out) == [
        (loop, one, Delta("abc", "length", 3, 4)),
        (loop, other, Delta("x")),
        (loop, one, None),
        (loop, other, error),
    ]
    loop.close()
