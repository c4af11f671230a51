"""Two versions behind one address, over real HTTP on loopback: shadow, shares, fall back, switch, kill."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from fakes.tiny_models import write_tiny_classifier
from slmops.artifacts import Variant, drafting
from slmops.errors import CorruptArtifactError, UsageError
from slmops.rollout import Policy, Tally
from slmops.serve.candidate.book import JOURNAL, STATE, Book
from slmops.serve.candidate.pair import Pair
from slmops.serve.candidate.reading import Feedback, answer_of, feedback_of, subject_of
from slmops.serve.candidate.rollout import Rollout, Seen, fraction
from slmops.serve.server import background

OLD, NEW = "a" * 64, "b" * 64
LAX = Policy(
    shares=(0.2, 0.5),
    shadow_requests=40,
    step_requests=20,
    most_requests=600,
    answered_margin=0.2,
    quick_margin=0.5,
    slow_factor=50,
    score_margin=0.3,
    least_feedback=10,
)
"""Margins so wide that a test needs few requests."""


@dataclass
class Stub:
    """A version that answers as it is told, and counts what it was asked."""

    label: str
    status: int = 200
    delay_s: float = 0.0
    break_: bool = False
    asked: Counter[str] = field(default_factory=Counter)
    closed: bool = False
    shadows: int = 0

    def app(self) -> FastAPI:
        from contextlib import asynccontextmanager

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> Any:
            yield
            self.closed = True

        app = FastAPI(lifespan=lifespan)

        @app.post("/v1/classify")
        async def classify(request: Request) -> Any:
            body = await request.json()
            self.asked[body["input"]] += 1
            self.shadows += bool(request.scope.get("slmops.shadow"))
            await asyncio.sleep(self.delay_s)
            if self.break_:
                raise RuntimeError(body["input"])
            if self.status != 200:
                return JSONResponse({"error": "no"}, self.status)
            return [{"label": self.label}]

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await request.json()

            async def pieces() -> Any:
                for text in (self.label, "!"):
                    piece = {"id": f"chat-{self.label}", "choices": [{"delta": {"content": text}}]}
                    yield f"data: {json.dumps(piece)}\n\n"
                    await asyncio.sleep(self.delay_s)

            return StreamingResponse(pieces(), media_type="text/event-stream") if body.get("stream") else {}

        @app.post("/v1/feedback")
        async def feedback(request: Request) -> Any:
            self.asked["feedback"] += 1
            return {"known": bool((await request.json())["id"])}

        @app.get("/health")
        async def health() -> Any:
            return {"label": self.label}

        return app


@contextmanager
def pair(
    tmp_path: Path, old: Stub, new: Stub, policy: Policy = LAX, **options: Any
) -> Iterator[tuple[httpx.Client, Rollout]]:
    book = Book(tmp_path / "rollout")
    rollout = Rollout(book, book.begin(OLD, NEW, policy))
    application = Pair(old.app(), new.app(), rollout, **{"look_s": 0.02, **options})
    with background(application) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client, rollout


def classify(client: httpx.Client, text: str = "hello", subject: str | None = None) -> httpx.Response:
    headers = {} if subject is None else {"x-slmops-subject": subject}
    return client.post("/v1/classify", json={"input": text}, headers=headers)


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.01)


def keep_asking(client: httpx.Client, rollout: Rollout, score: Callable[[str], float] | None = None) -> Counter[int]:
    """Ask until the rollout has ended; the answers by status."""
    found: Counter[int] = Counter()
    ends = time.monotonic() + 60
    while rollout.running:
        assert time.monotonic() < ends, rollout.status()
        response = classify(client, f"text {sum(found.values())}")
        found[response.status_code] += 1
        if score is not None and response.status_code == 200:
            body = {"id": response.headers["x-request-id"], "score": score(response.json()[0]["label"])}
            assert client.post("/v1/feedback", json=body).status_code == 200
    return found


# --- the shadow -------------------------------------------------------------------------------------------------


def test_a_shadow_is_asked_and_never_heard(tmp_path: Path) -> None:
    old, new = Stub("old"), Stub("new", delay_s=0.05)
    with pair(tmp_path, old, new, replace(LAX, shadow_requests=1000)) as (client, rollout):
        started = time.perf_counter()
        answers = [classify(client, f"text {number}") for number in range(10)]
        assert time.perf_counter() - started < 10 * 0.05 + 1  # nobody waits for the shadow
        assert {answer.json()[0]["label"] for answer in answers} == {"old"}
        assert {answer.headers["x-slmops-version"] for answer in answers} == {OLD[:12]}
        until(lambda: rollout.state.tally.pair("answered").rows == 10)
        assert new.shadows == 10
        assert old.shadows == 0
        assert rollout.state.tally.agreement.mean == 0.0
        status = client.get("/v1/rollout").json()
        assert (status["stage"], status["requests"], status["agreement"]) == ("shadow", 10, 0.0)


def test_too_many_shadows_are_dropped_and_counted(tmp_path: Path) -> None:
    old, new = Stub("old"), Stub("new", delay_s=30)
    with pair(tmp_path, old, new, replace(LAX, shadow_requests=1000)) as (client, rollout):
        for number in range(40):
            assert classify(client, f"text {number}").status_code == 200
        assert rollout.state.tally.dropped >= 40 - 32 - 2


def test_a_correction_judges_both_in_the_shadow(tmp_path: Path) -> None:
    with pair(tmp_path, Stub("old"), Stub("new"), replace(LAX, shadow_requests=1000)) as (client, rollout):
        for number, correction in enumerate(["new", "new", "old", "third"]):
            answer = classify(client, f"text {number}")
            until(lambda count=number + 1: rollout.state.tally.pair("answered").rows == count)  # type: ignore[misc]
            body = {"id": answer.headers["x-request-id"], "correction": correction}
            for _ in range(2):  # said twice, counted once
                assert client.post("/v1/feedback", json=body).json() == {"known": True}
        scored = rollout.state.tally.pair("score")
        assert (scored.better, scored.same, scored.worse) == (2, 1, 1)


def test_a_broken_candidate_goes_back_before_anybody_meets_it(tmp_path: Path) -> None:
    old, new = Stub("old"), Stub("new", break_=True)
    with pair(tmp_path, old, new) as (client, rollout):
        assert set(keep_asking(client, rollout)) == {200}
        assert rollout.state.outcome == "back"
        until(lambda: new.closed)
        assert not old.closed
        assert classify(client).json()[0]["label"] == "old"
    [*_, last] = Book(tmp_path / "rollout").entries()
    assert last["event"] == "back"
    assert "More requests fail" in last["why"]


# --- shares -----------------------------------------------------------------------------------------------------


def test_a_good_candidate_takes_over_without_a_failed_request(tmp_path: Path) -> None:
    old, new = Stub("old"), Stub("new")
    ended: list[str] = []
    with pair(tmp_path, old, new, on_end=ended.append) as (client, rollout):
        statuses = keep_asking(client, rollout, score=lambda label: 1.0 if label == "new" else 0.3)
        assert set(statuses) == {200}
        assert rollout.state.outcome == "over"
        until(lambda: old.closed and ended == ["over"])
        after = classify(client)
        assert (after.json()[0]["label"], after.headers["x-slmops-version"]) == ("new", NEW[:12])
        assert client.get("/health").json() == {"label": "new"}
    entries = Book(tmp_path / "rollout").entries()
    assert [entry["event"] for entry in entries] == ["begun", "further", "further", "over"]
    assert [entry["step"] for entry in entries] == ["shadow", "shadow", "20 %", "50 %"]
    assert entries[-1]["findings"][2]["difference"] > 0.5


def test_a_candidate_that_callers_dislike_goes_back(tmp_path: Path) -> None:
    policy = replace(LAX, shadow_requests=0)
    with pair(tmp_path, Stub("old"), Stub("new"), policy) as (client, rollout):
        keep_asking(client, rollout, score=lambda label: 0.0 if label == "new" else 1.0)
        assert rollout.state.outcome == "back"
    assert "The answers are worse" in Book(tmp_path / "rollout").entries()[-1]["why"]


def test_what_the_candidate_fails_the_old_version_answers(tmp_path: Path) -> None:
    for broken in (Stub("new", break_=True), Stub("new", status=503), Stub("new", status=429)):
        policy = replace(LAX, shadow_requests=0, shares=(0.9, 0.95), step_requests=1000, answered_margin=0.99)
        with pair(tmp_path / f"{broken.status}{broken.break_}", Stub("old"), broken, policy) as (client, rollout):
            answers = [classify(client, f"text {number}") for number in range(20)]
            assert [answer.status_code for answer in answers] == [200] * 20
            assert rollout.state.tally.undone >= 10
            assert (rollout.state.tally.arm("new", "answered").rows > 0) is (broken.status != 429)


def test_a_caller_keeps_its_version_and_shares_only_grow(tmp_path: Path) -> None:
    policy = replace(LAX, shadow_requests=0, shares=(0.3, 0.6), step_requests=10_000)
    with pair(tmp_path, Stub("old"), Stub("new"), policy) as (client, rollout):
        first = {name: classify(client, subject=name).json()[0]["label"] for name in map(str, range(40))}
        again = {name: classify(client, subject=name).json()[0]["label"] for name in first}
        assert first == again
        assert 3 <= sum(label == "new" for label in first.values()) <= 22
        rollout.state = replace(rollout.state, step=1)
        later = {name: classify(client, subject=name).json()[0]["label"] for name in first}
        assert all(later[name] == "new" for name, label in first.items() if label == "new")
        assert sum(label == "new" for label in later.values()) > sum(label == "new" for label in first.values())


def test_a_fraction_is_even_and_secret() -> None:
    found = [fraction("00" * 32, str(number)) for number in range(2000)]
    assert abs(sum(value < 0.25 for value in found) / 2000 - 0.25) < 0.04
    assert found[:5] != [fraction("01" * 32, str(number)) for number in range(5)]


def test_a_stream_passes_through_and_is_understood(tmp_path: Path) -> None:
    policy = replace(LAX, shadow_requests=1000)
    with pair(tmp_path, Stub("old", delay_s=0.01), Stub("old"), policy) as (client, rollout):
        response = client.post("/v1/chat/completions", json={"stream": True, "user": "me"})
        assert response.text.count("data: ") == 2
        until(lambda: rollout.state.tally.agreement.rows == 1)
        assert rollout.state.tally.agreement.mean == 1.0


def test_the_switch_waits_for_answers_at_hand(tmp_path: Path) -> None:
    old, new = Stub("old", delay_s=0.6), Stub("new")
    with pair(tmp_path, old, new, replace(LAX, shadow_requests=0, shares=(0.01, 0.02))) as (client, rollout):
        answers: list[httpx.Response] = []
        slow = threading.Thread(target=lambda: answers.append(classify(client, "slow")))
        slow.start()
        until(lambda: old.asked["slow"] == 1)
        rollout.state = replace(rollout.state, outcome="over")
        until(lambda: client.get("/health").json() == {"label": "new"})
        assert not old.closed
        slow.join()
        assert (answers[0].status_code, answers[0].json()[0]["label"]) == (200, "old")
        until(lambda: old.closed)


# --- on disk ----------------------------------------------------------------------------------------------------


def test_a_rollout_goes_on_where_it_was(tmp_path: Path) -> None:
    book = Book(tmp_path)
    state = replace(book.begin(OLD, NEW, LAX), tally=Tally().paired("answered", True, True), slow_ms=12.5)
    book.save(state)
    again = Book(tmp_path).begin(OLD, NEW, Policy())
    assert (again.tally, again.slow_ms, again.key, again.policy) == (state.tally, 12.5, state.key, LAX)
    assert [entry["event"] for entry in book.entries()] == ["begun", "resumed"]
    assert (tmp_path / STATE).stat().st_mode & 0o077 == 0


def test_a_decision_that_was_written_down_counts_though_the_state_was_not(tmp_path: Path) -> None:
    book = Book(tmp_path)
    state = book.begin(OLD, NEW, LAX)
    book.note(state, "further", {"step": "shadow"})
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(b'{"number": 3, "event": "fur')  # torn by a kill
    found = Book(tmp_path).read()
    assert found is not None
    assert (found.step, found.number, found.tally) == (0, 2, Tally())
    book.note(found, "over", {"step": "20 %"})
    assert Book(tmp_path).read().outcome == "over"  # type: ignore[union-attr]


def test_a_state_of_other_versions_or_of_nothing_is_refused(tmp_path: Path) -> None:
    Book(tmp_path).begin(OLD, NEW, LAX)
    with pytest.raises(CorruptArtifactError, match="of the rollout of bbbb"):
        Book(tmp_path).begin(NEW, OLD, LAX)
    (tmp_path / STATE).write_text("{}")
    with pytest.raises(CorruptArtifactError, match="cannot be read"):
        Book(tmp_path).begin(OLD, NEW, LAX)


def test_a_disk_that_takes_nothing_stops_no_request_and_no_step_is_taken(tmp_path: Path) -> None:
    book = Book(tmp_path / "rollout")
    rollout = Rollout(book, book.begin(OLD, NEW, replace(LAX, shadow_requests=1)))
    rollout.saw_both(Seen("1", True, 1.0, "a"), Seen("2", True, 1.0, "a"))
    (tmp_path / "rollout" / JOURNAL).unlink()
    (tmp_path / "rollout" / JOURNAL).mkdir()
    decision = asyncio.run(rollout.look())
    assert decision is not None
    assert decision.action == "further"
    assert rollout.state.step == -1
    (tmp_path / "rollout" / JOURNAL).rmdir()
    asyncio.run(rollout.look())
    assert rollout.state.step == 0


# --- reading ----------------------------------------------------------------------------------------------------


def test_what_an_exchange_says() -> None:
    assert subject_of([(b"X-Slmops-Subject", b"me")], b"{}") == "me"
    assert subject_of([], b'{"user": "you"}') == "you"
    assert subject_of([], b"\xff") is subject_of([], b"[1]") is subject_of([], b'{"user": 3}') is None
    kind = [(b"content-type", b"application/json")]
    assert answer_of(kind, b'{"id": "7", "choices": [{"message": {"content": "hi"}}]}') == ("7", "hi")
    assert answer_of(kind, b'{"id": "8", "choices": [{"text": "hi"}]}') == ("8", "hi")
    assert answer_of([(b"x-request-id", b"9")], b'[{"label": "a"}, {"label": "b"}]') == ("9", "a\nb")
    assert answer_of(kind, b"torn") == (None, None)
    assert answer_of(kind, b'{"choices": []}') == (None, None)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"id": "1", "score": 1}', Feedback("1", 1.0, None)),
        (b'{"id": "1", "score": true}', Feedback("1", 1.0, None)),
        (b'{"id": "1", "correction": "a"}', Feedback("1", None, "a")),
        (b'{"id": "1", "score": 7}', None),
        (b'{"id": "1", "score": NaN}', None),
        (b'{"id": 1, "score": 1}', None),
        (b'{"id": "1"}', None),
        (b"[]", None),
        (b"\x00", None),
    ],
)
def test_what_feedback_says(body: bytes, expected: Feedback | None) -> None:
    assert feedback_of(body) == expected


# --- the verb ---------------------------------------------------------------------------------------------------


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Variant, Variant]:
    found = []
    for name in ("old", "new"):
        with drafting("variant", tmp_path / name) as draft:
            write_tiny_classifier(draft.path / "model")
            (draft.path / "name.txt").write_text(name)
        found.append(Variant.open(tmp_path / name))
    return found[0], found[1]


def serve(old: Variant, new: Variant, policy: Path) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-m", "slmops", "serve", str(old.path), "--candidate", str(new.path)]
    process = subprocess.Popen(
        [*command, "--policy", str(policy), "--port", "0", "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def test_a_server_that_is_killed_picks_up_where_it_was(versions: tuple[Variant, Variant], tmp_path: Path) -> None:
    old, new = versions
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump({**LAX.to_json(), "step_requests": 60}))
    journal = tmp_path / "rollout" / f"{old.digest[:12]}-{new.digest[:12]}" / JOURNAL
    events, statuses = [], Counter[int]()
    for life in range(8):
        process, ready = serve(old, new, policy)
        try:
            with httpx.Client(base_url=ready["url"], timeout=30) as client:
                ends = time.monotonic() + 60
                while time.monotonic() < ends:
                    for _ in range(25):
                        statuses[client.post("/v1/classify", json={"input": "where is my card"}).status_code] += 1
                    events = [json.loads(line)["event"] for line in journal.read_text().splitlines()]
                    if events[-1] == "over" or (life < 2 and len(events) >= (2, 4)[life]):
                        break
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        if events[-1] == "over":
            break
    assert set(statuses) == {200}
    assert [event for event in events if event != "resumed"] == ["begun", "further", "further", "over"]
    assert events.count("resumed") >= 1
    process, ready = serve(old, new, policy)
    process.terminate()
    process.wait(30)
    assert ready["digest"] == new.digest
    told = subprocess.run(
        [sys.executable, "-m", "slmops", "improve", "why", str(tmp_path / "rollout")], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    assert "took over" in told.stdout
    assert "e-values" in told.stdout


def test_wrong_use_is_told(versions: tuple[Variant, Variant], tmp_path: Path) -> None:
    from slmops.cli.candidate import read_policy

    (tmp_path / "bad.yaml").write_text("alhpa: 1")
    with pytest.raises(UsageError, match="Unknown key alhpa"):
        read_policy(tmp_path / "bad.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        read_policy(tmp_path / "nothing.yaml")
    command = [sys.executable, "-m", "slmops", "serve", str(versions[0].path)]
    ran = subprocess.run([*command, "--policy", "x"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "--candidate" in ran.stderr
    write_tiny_classifier(tmp_path / "bare")
    ran = subprocess.run([*command, "--candidate", str(tmp_path / "bare")], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "has no version" in ran.stderr
