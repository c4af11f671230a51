"""Batches that are never closed: what a request gets does not depend on who came with it, nor on who left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slmops.artifacts import Message
from slmops.errors import ContextLengthError, CorruptArtifactError, ModelError, ServeError, UsageError
from slmops.runtime import open_generator
from slmops.runtime.base import Delta, Generation, GenerationRequest
from slmops.runtime.batch import BatchedStream, BatchGenerator
from slmops.runtime.engines import engines_of, open_engine, runs
from slmops.runtime.onnx_batch import MAX_ROWS, OnnxBatch
from slmops.runtime.onnx_cache import Beginnings, CacheShape, RowCache, common_tokens

TEXTS = ["hello", "how are you today? my card is lost and I want a refund", "x", "ü€😀", "", "where is my top up"]


def ask(text: str, **options: Any) -> GenerationRequest:
    return GenerationRequest((Message("user", text),), **{"max_tokens": 24, **options})


def stream(batch: BatchGenerator, request: GenerationRequest) -> BatchedStream:
    made = batch.stream(request)
    assert isinstance(made, BatchedStream)
    return made


def step_until_idle(batch: BatchGenerator) -> None:
    while batch.busy:
        batch.step()


def plain(answer: Generation) -> tuple[str, str, int, int]:
    return answer.text, answer.finish_reason, answer.prompt_tokens, answer.completion_tokens


@pytest.fixture(scope="module", params=["onnx-batch", "openvino-batch"])
def folder(request: pytest.FixtureRequest) -> tuple[str, Path]:
    name = str(request.param)
    return name, request.getfixturevalue("tiny_onnx" if name.startswith("onnx") else "tiny_openvino")


@pytest.fixture(scope="module")
def batch(folder: tuple[str, Path]) -> Iterator[BatchGenerator]:
    opened = open_engine(folder[0], folder[1], threads=1)
    assert isinstance(opened, BatchGenerator)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def expected(folder: tuple[str, Path]) -> list[tuple[str, str, int, int]]:
    """What the engine for one answer at a time says to the same texts."""
    model = open_generator(folder[1], threads=1)
    answers = [plain(model.generate([ask(text)])[0]) for text in TEXTS]
    model.close()
    return answers


def test_a_batch_answers_as_one_by_one(batch: BatchGenerator, expected: list[tuple[str, str, int, int]]) -> None:
    assert [plain(batch.generate([ask(text)])[0]) for text in TEXTS] == expected
    assert [plain(one) for one in batch.generate([ask(text) for text in TEXTS])] == expected
    assert not batch.busy


def test_who_joins_and_who_leaves_changes_nothing(
    batch: BatchGenerator, expected: list[tuple[str, str, int, int]]
) -> None:
    first = [stream(batch, ask(text)) for text in TEXTS[:3]]
    for _ in range(7):
        batch.step()
    later = [stream(batch, ask(text)) for text in TEXTS[3:]]
    for _ in range(5):
        batch.step()
    first[0].close()
    later[1].close()
    left = [first[1], first[2], later[0], later[2]]
    texts = ["".join(piece.text for piece in one) for one in left]
    assert texts == [expected[place][0] for place in (1, 2, 3, 5)]
    assert list(first[0]) == []
    batch.step() if batch.busy else None
    assert not batch.busy


def test_sixty_four_at_once(batch: BatchGenerator, expected: list[tuple[str, str, int, int]]) -> None:
    answers = batch.generate([ask(TEXTS[number % len(TEXTS)]) for number in range(64)])
    assert [plain(one) for one in answers] == [expected[number % len(TEXTS)] for number in range(64)]


def test_seed_and_temperature_are_each_requests_own(batch: BatchGenerator) -> None:
    requests = [ask("hello", temperature=1.5, seed=seed) for seed in (3, 3, 4)] + [ask("hello")]
    alone = batch.generate([ask("hello", temperature=1.5, seed=3)])[0].text
    one, same, other, greedy = (answer.text for answer in batch.generate(requests))
    assert one == same == alone
    assert len({one, other, greedy}) == 3
    assert len({answer.text for answer in batch.generate([ask("hello", temperature=1.5)] * 2)}) == 2


def test_stop_texts_lengths_and_context(batch: BatchGenerator, expected: list[tuple[str, str, int, int]]) -> None:
    whole = expected[0][0]
    cut = whole[4:7]
    stopped, short = batch.generate([ask("hello", stop=(cut,)), ask("hello", max_tokens=3)])
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(cut)], "stop")
    assert (short.completion_tokens, short.finish_reason) == (3, "length")
    with pytest.raises(ContextLengthError, match="256"):
        batch.stream(ask("x" * 400))
    long = batch.generate([ask("hello", max_tokens=10_000)])[0]
    assert long.prompt_tokens + long.completion_tokens <= 256
    with pytest.raises(UsageError, match="no adapter"):
        batch.stream(ask("hello", adapter="other"))


def test_the_likelihood_of_an_answer_is_told_where_it_is_wanted(batch: BatchGenerator) -> None:
    assert batch.generate([ask("hello", max_tokens=8)])[0].logprob is None
    batch.tells_logprobs = True
    try:
        (answer,) = batch.generate([ask("hello", max_tokens=8)])
    finally:
        batch.tells_logprobs = False
    (score,) = batch.score([((Message("user", "hello"),), answer.text)])  # with the end of the turn, which it lacks
    assert answer.logprob is not None
    assert score.logprob < answer.logprob < 0


def test_a_prompt_that_begins_as_another_did_gets_the_same_answer(
    batch: BatchGenerator, folder: tuple[str, Path]
) -> None:
    system = Message("system", "my card is lost and I want a refund for the fee, hello world how are you. " * 2)
    requests = [
        GenerationRequest((system, Message("user", text)), max_tokens=16) for text in ("hello", "balance", "hello")
    ]
    one_by_one = open_generator(folder[1], threads=1)
    fresh = [one_by_one.generate([request])[0].text for request in requests]
    assert [batch.generate([request])[0].text for request in requests] == fresh
    assert [answer.text for answer in batch.generate(requests)] == fresh


def test_a_step_that_fails_ends_what_runs_and_no_more(folder: tuple[str, Path]) -> None:
    opened = open_engine(folder[0], folder[1], threads=1)
    assert isinstance(opened, BatchGenerator)
    running = stream(opened, ask("hello"))
    opened.step()
    if folder[0] == "openvino-batch":
        os.kill(opened.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    else:
        opened._session = None  # type: ignore[attr-defined]
    with pytest.raises((ServeError, AttributeError)):
        step_until_idle(opened)
    with pytest.raises((ServeError, AttributeError)):
        list(running)
    assert not opened.busy
    opened.close()
    with pytest.raises(ServeError, match="closed"):
        list(opened.stream(ask("hello")))


def test_a_caller_that_drives_is_told_of_arrivals(batch: BatchGenerator) -> None:
    woken: list[bool] = []
    batch.driven = lambda: woken.append(True)
    try:
        one = stream(batch, ask("hello", max_tokens=2))
        assert woken
        seen: list[Delta | Exception] = []
        one.listen(seen.append)
        while batch.busy:
            batch.step()
    finally:
        batch.driven = None
    last = seen[-1]
    assert isinstance(last, Delta)
    assert last.completion_tokens == 2


# The cache of onnxruntime's batch


def test_rows_move_grow_and_are_given_back() -> None:
    cache = RowCache(CacheShape(("0.key", "0.value"), heads=2, size=4, kind=np.float32))
    assert cache.fit(1, 5)
    assert (cache.rows, cache.tokens) == (1, 128)
    cache.arrays[0][0, :, :5] = 7
    assert not cache.fit(1, 128)
    assert cache.fit(3, 200)
    assert (cache.rows, cache.tokens) == (4, 256)
    assert (cache.arrays[0][0, :, :5] == 7).all()
    cache.move(0, 2, 5)
    assert (cache.arrays[0][2, :, :5] == 7).all()
    assert (cache.arrays[0][2, :, 5:] == 0).all()
    kept = cache.copy_out(2, 5)
    cache.copy_in(1, kept, 3)
    assert (cache.arrays[0][1, :, :3] == 7).all()
    assert (cache.arrays[0][1, :, 3:] == 0).all()
    assert not cache.idle()
    assert cache.shape.token_bytes == 2 * 2 * 4 * 4


def test_beginnings_are_found_by_their_longest_common_part() -> None:
    beginnings = Beginnings(most_tokens=100, least=4)
    beginnings.keep(range(50), [])
    beginnings.keep([*range(30), *range(100, 110)], [])
    found, kept = beginnings.longest([*range(40), 7, 7])
    assert found == 40
    assert kept is not None
    assert len(kept.ids) == 50
    assert beginnings.longest(list(range(50)))[0] == 49  # the last token is always read
    assert beginnings.longest([5, 6, 7, 8, 9]) == (0, None)
    assert not beginnings.wants(list(range(50)))
    assert not beginnings.wants([1, 2])
    beginnings.keep(range(200, 240), [])  # 130 tokens: the one without use goes
    assert beginnings.longest([*range(30), *range(100, 111)])[0] == 30
    assert common_tokens(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_tokens(np.array([1]), np.array([1, 2])) == 1


def test_more_than_the_rows_wait_their_turn(tiny_onnx: Path) -> None:
    batch = OnnxBatch.load(tiny_onnx, threads=1)
    streams = [stream(batch, ask("hello", max_tokens=4)) for _ in range(MAX_ROWS + 3)]
    batch.step()
    assert batch.running == MAX_ROWS
    assert len({"".join(piece.text for piece in one) for one in streams}) == 1
    batch.close()


# Engines by name


def test_engines_are_found_by_what_the_folder_was_made_for(tiny_onnx: Path, tiny_checkpoint: Path) -> None:
    assert engines_of(tiny_onnx) == ("onnx-batch", "onnx-genai")
    assert engines_of(tiny_checkpoint) == ("torch",)
    assert runs("foundry", tiny_onnx)
    assert not runs("openvino", tiny_onnx)
    with pytest.raises(UsageError, match="no engine named 'fast'"):
        open_engine("fast", tiny_onnx)
    with pytest.raises(UsageError, match="made for onnx-genai, which openvino-batch does not run"):
        open_engine("openvino-batch", tiny_onnx)


def test_openvino_without_its_tokenizers_is_for_one_at_a_time(tiny_openvino: Path, tmp_path: Path) -> None:
    import shutil

    assert engines_of(tiny_openvino) == ("openvino-batch", "openvino-bf16", "openvino")
    folder = Path(shutil.copytree(tiny_openvino, tmp_path / "model"))
    (folder / "openvino_tokenizer.xml").unlink()
    assert engines_of(folder) == ("openvino",)
    with pytest.raises(ModelError, match="openvino_tokenizer"):
        open_engine("openvino-batch", folder)
    (folder / "openvino_tokenizer.xml").write_text("", "utf-8")
    (folder / "openvino_model.xml").write_text("<net", "utf-8")
    with pytest.raises(CorruptArtifactError, match="cannot be loaded"):
        open_engine("openvino-batch", folder)
