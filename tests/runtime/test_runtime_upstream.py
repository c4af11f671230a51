"""Models that answer side by side: llama.cpp's slots, another server, Foundry Local."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from skipping import skip_or_fail
from slmops.artifacts import Message
from slmops.errors import ContextLengthError, PrivacyError, ServeError, UsageError
from slmops.runtime import open_generator
from slmops.runtime.base import Delta, GenerationRequest
from slmops.runtime.engines import open_engine
from slmops.runtime.gguf_slots import SLOTS, GgufSlots
from slmops.runtime.side_by_side import called_back
from slmops.runtime.upstream import Upstream, UpstreamGenerator, asking, check_allowed, event_lines, refusal, written
from slmops.serve.app import create_app
from slmops.serve.server import background

TEXTS = ["hello", "my card is lost and I want a refund", "ü€😀", "where is my top up"]


def ask(text: str, **options: Any) -> GenerationRequest:
    return GenerationRequest((Message("user", text),), **{"max_tokens": 16, **options})


# llama.cpp's slots


@pytest.fixture(scope="module")
def slots(tiny_gguf: Path) -> Iterator[GgufSlots]:
    opened = open_engine("llama.cpp-slots", tiny_gguf, threads=1)
    assert isinstance(opened, GgufSlots)
    yield opened
    opened.close()


def test_slots_answer_as_one_by_one(slots: GgufSlots, tiny_gguf: Path) -> None:
    one_by_one = open_generator(tiny_gguf, threads=1)
    expected = [one_by_one.generate([ask(text)])[0] for text in TEXTS]
    found = slots.generate([ask(text) for text in TEXTS] * 2)
    half = "\ufffd"  # of a character that the length cut: the engine keeps it to itself
    assert [one.text.rstrip(half) for one in found] == [one.text.rstrip(half) for one in expected] * 2
    assert [one.prompt_tokens for one in found[: len(TEXTS)]] == [one.prompt_tokens for one in expected]
    assert found[0].completion_tokens == expected[0].completion_tokens
    known = [(one.logprob, other.logprob) for one, other in zip(found, expected, strict=False) if one.logprob]
    assert all(one == pytest.approx(other, abs=0.05) for one, other in known)
    (short,), (same,) = slots.generate([ask("x", max_tokens=1)]), one_by_one.generate([ask("x", max_tokens=1)])
    assert short.logprob in (None, pytest.approx(same.logprob, abs=0.05))
    one_by_one.close()


def test_a_slot_is_free_again_when_its_answer_is_given_up(slots: GgufSlots) -> None:
    whole = slots.generate([ask("hello", max_tokens=200)])[0].text
    for _ in range(SLOTS + 1):
        pieces = slots.stream(ask("hello", max_tokens=200))
        assert isinstance(next(pieces), Delta)
        pieces.close()  # type: ignore[attr-defined]
    assert slots.generate([ask("hello", max_tokens=200)])[0].text == whole
    stop = whole[5:9]
    assert slots.generate([ask("hello", max_tokens=200, stop=(stop,))])[0].text == whole[: whole.index(stop)]
    with pytest.raises(ContextLengthError):
        slots.stream(ask("x" * 400))


def test_an_engine_that_calls_back_is_an_iterator() -> None:
    told: list[bool] = []

    def work(take: Any) -> None:
        for number in range(100):
            if take(number):
                told.append(True)
                return
            time.sleep(0.001)

    numbers = called_back(work)
    assert [next(numbers), next(numbers)] == [0, 1]
    numbers.close()  # type: ignore[attr-defined]
    assert told == [True]

    def breaks(take: Any) -> None:
        take(1)
        raise KeyError("x")

    broken = called_back(breaks)
    assert next(broken) == 1
    with pytest.raises(KeyError):
        next(broken)


# Another server


@pytest.fixture(scope="module")
def server(tiny_onnx: Path) -> Iterator[str]:
    with background(create_app(tiny_onnx, name="talker")) as url:
        yield f"{url}/v1"


def test_an_upstream_answers_through_us(server: str, tiny_onnx: Path) -> None:
    upstream = UpstreamGenerator(Upstream("talker", server))
    assert Upstream("talker", server).is_local
    expected = open_generator(tiny_onnx, threads=1).generate([ask(text) for text in TEXTS])
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda text: upstream.generate([ask(text)])[0], TEXTS))
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.completion_tokens for one in found] == [one.completion_tokens for one in expected]
    pieces = upstream.stream(ask("hello", max_tokens=100))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    with pytest.raises(ServeError, match="404: The model 'other' does not exist"):
        UpstreamGenerator(Upstream("other", server)).generate([ask("hello")])
    upstream.close()


def test_an_upstream_that_is_not_there_is_told() -> None:
    with pytest.raises(ServeError, match="could not be asked: ConnectError"):
        UpstreamGenerator(Upstream("m", "http://127.0.0.1:9/v1")).generate([ask("hello")])


def test_another_machine_needs_leave_and_redaction() -> None:
    far = Upstream("m", "https://models.example/v1", key="k")
    with pytest.raises(PrivacyError, match=r"models\.example is another machine"):
        check_allowed(far, redacts=True)
    with pytest.raises(PrivacyError, match="as they are"):
        check_allowed(Upstream("m", far.base_url, remote=True), redacts=False)
    check_allowed(Upstream("m", far.base_url, remote=True), redacts=True)
    check_allowed(Upstream("m", "http://[::1]:8000/v1"), redacts=False)
    with pytest.raises(PrivacyError):
        UpstreamGenerator(far)
    for wrong in ("ftp://127.0.0.1/v1", "models.example", ""):
        with pytest.raises(UsageError, match="no address"):
            check_allowed(Upstream("m", wrong), redacts=True)


def test_what_is_sent_is_redacted_and_no_more_than_asked() -> None:
    request = GenerationRequest((Message("system", "be kind"), Message("user", "I am a@b.example")), max_tokens=5)
    body = asking("m", request, lambda text: text.replace("a@b.example", "[email]"))
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "I am [email]"}],
        "max_tokens": 5,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    more = asking("m", ask("x", top_p=0.5, seed=3, stop=("a",)), None)
    assert (more["top_p"], more["seed"], more["stop"]) == (0.5, 3, ["a"])


def test_events_of_an_upstream_are_read_and_an_end_is_wanted() -> None:
    events = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "a"}}]},
        {"choices": [{"delta": {"content": "b"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}},
    ]
    lines = [": comment", *(f"data: {json.dumps(one)}" for one in events), "", "data: [DONE]", "data: {"]
    assert list(written(event_lines(iter(lines)))) == [Delta("a"), Delta("b"), Delta("", "length", 3, 2)]
    with pytest.raises(ServeError, match="within an answer"):
        list(written(iter(events[:2])))
    with pytest.raises(ServeError, match="failed"):
        list(written(iter([{"error": "x"}])))
    assert "429: slow down" in str(refusal(429, b'{"error": {"message": "slow down"}}'))
    assert "502: bad" in str(refusal(502, b"bad"))


def test_foundry_local_answers_and_comes_back_from_death(tiny_onnx: Path) -> None:
    from slmops.runtime.foundry import find_foundry

    try:
        find_foundry()
    except UsageError:
        skip_or_fail("Foundry Local is not installed (SLMOPS_FOUNDRY_PYTHON)")
    foundry = UpstreamGenerator.foundry(tiny_onnx)
    try:
        (answer,) = foundry.generate([ask("hello", max_tokens=8)])
        assert answer.text
        pid = foundry.child_pid()
        os.kill(pid, 9)
        deadline = time.monotonic() + 120
        while True:
            try:
                again = foundry.generate([ask("hello", max_tokens=8)])[0]
                break
            except ServeError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert again.text == answer.text
        assert foundry.child_pid() != pid
    finally:
        foundry.close()
