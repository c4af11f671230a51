"""Stage 1 against a teacher on loopback that misbehaves in every way we know of."""

from __future__ import annotations

import email.utils
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from distill_helpers import config, lines, make_dataset, make_draft, row

from fakes.teacher_server import Reply, TeacherServer, broken, first, too_many
from slmops.artifacts import Dataset, Message
from slmops.distill import LocalTeacher, OpenAITeacher, TeacherFailure, ask_teacher
from slmops.distill.budget import UNLIMITED, Limits
from slmops.errors import DataError, PrivacyError, TeacherError
from slmops.progress import Progress
from slmops.recipe import TeacherConfig
from slmops.runtime import Delta, Generation, GenerationRequest, TextScore


def requests(count: int) -> list[GenerationRequest]:
    return [GenerationRequest((Message("user", f"q{i}"),), max_tokens=16) for i in range(count)]


def answers(teacher: OpenAITeacher, count: int, limits: Limits = UNLIMITED) -> dict[int, Generation | TeacherFailure]:
    seen: dict[int, Generation | TeacherFailure] = {}
    for index, outcome in teacher.answer(requests(count), limits=limits):
        assert index not in seen
        seen[index] = outcome
    assert sorted(seen) == list(range(count))
    return seen


def texts(outcomes: dict[int, Generation | TeacherFailure]) -> list[str | None]:
    return [o.text if isinstance(o := outcomes[i], Generation) else None for i in sorted(outcomes)]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.distill.retry.FIRST_WAIT_S", 0.01)


# --- the engine


def test_answers_with_counts_in_order_of_completion() -> None:
    def script(prompt: str, before: int) -> Reply:
        return Reply(f"re {prompt}", delay_s=1.0 if prompt == "q0" else 0.0, prompt_tokens=7, completion_tokens=3)

    with TeacherServer(script) as server:
        teacher = OpenAITeacher(config(server.url, concurrency=4))
        order = [index for index, _ in teacher.answer(requests(12))]
        assert order[0] != 0
        outcomes = answers(teacher, 12)
    assert texts(outcomes) == [f"re q{i}" for i in range(12)]
    assert outcomes[3] == Generation("re q3", "stop", 7, 3)
    body = server.bodies[0]
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("fake", 16, 0.0)


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_no_more_at_once_than_asked(concurrency: int) -> None:
    with TeacherServer(lambda prompt, before: Reply(delay_s=0.03)) as server:
        answers(OpenAITeacher(config(server.url, concurrency=concurrency)), 32)
        assert min(2, concurrency) <= server.most_at_once <= concurrency


@pytest.mark.parametrize(
    "trouble",
    [
        too_many(),
        too_many("0"),
        too_many("nonsense"),
        broken(500),
        broken(503),
        broken(408),
        Reply(cut=True),
        Reply(truncate=True),
        Reply(raw=b"<html>busy</html>"),
        Reply(raw=b'{"choices": [{"message": {"con'),
        Reply(raw=b"{}"),
        Reply(raw=b""),
        Reply(hang=True),
    ],
    ids=lambda reply: str(reply.status) if reply.status != 200 else "",
)
def test_a_passing_trouble_is_survived(trouble: Reply) -> None:
    with TeacherServer(first([trouble], Reply("fine"))) as server:
        outcomes = answers(OpenAITeacher(config(server.url, timeout_s=1.0 if trouble.hang else 20, concurrency=4)), 4)
    assert texts(outcomes) == ["fine"] * 4
    assert set(server.asked.values()) == {2}


@pytest.mark.parametrize(
    ("trouble", "kind", "tries"),
    [
        (too_many(), "rate_limit", 4),
        (broken(), "server_error", 4),
        (Reply(raw=b"junk"), "junk", 4),
        (Reply(cut=True), "connection", 4),
        (Reply(hang=True), "timeout", 4),
        (broken(400), "refused_request", 1),
        (broken(422), "refused_request", 1),
    ],
)
def test_a_lasting_trouble_fails_that_request_alone(trouble: Reply, kind: str, tries: int) -> None:
    with TeacherServer(lambda prompt, before: trouble if prompt == "q2" else Reply("fine")) as server:
        outcomes = answers(OpenAITeacher(config(server.url, timeout_s=0.7 if trouble.hang else 20, concurrency=2)), 6)
    failure = outcomes.pop(2)
    assert isinstance(failure, TeacherFailure)
    assert failure.kind == kind
    assert server.asked["q2"] == tries
    assert texts(outcomes) == ["fine"] * 5


def test_a_slow_drip_is_bounded_as_a_whole() -> None:
    with TeacherServer(lambda prompt, before: Reply(delay_s=30)) as server:
        started = time.monotonic()
        with pytest.raises(TeacherError, match=r"within 0\.2 s"):
            answers(OpenAITeacher(config(server.url, timeout_s=0.2, concurrency=8)), 50)
        assert time.monotonic() - started < 25


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured_by_every_request(form: str) -> None:
    def told() -> str:
        return "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)

    hit: list[str] = []

    def script(prompt: str, before: int) -> Reply:
        if not hit:
            hit.append(prompt)
            return too_many(told())
        return Reply("fine", delay_s=0.02)

    with TeacherServer(script) as server:
        outcomes = answers(OpenAITeacher(config(server.url, concurrency=2)), 8)
    assert texts(outcomes) == ["fine"] * 8
    at = sorted(server.asked_at_s)
    # Those in flight when the pause was told are answered; then nobody asks until it is over.
    assert max(later - earlier for earlier, later in itertools.pairwise(at)) > 0.5
    assert not [moment for moment in at if at[0] + 0.5 < moment < at[0] + 0.95]


def test_a_very_long_retry_after_ends_the_run() -> None:
    script = lambda prompt, before: too_many("86400")  # noqa: E731
    with TeacherServer(script) as server, pytest.raises(TeacherError, match="asks to wait 86,400 s"):
        answers(OpenAITeacher(config(server.url)), 5)


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_fatal_status_ends_the_run_at_once(status: int) -> None:
    with TeacherServer(lambda prompt, before: broken(status)) as server:
        with pytest.raises(TeacherError, match=f"answered {status}") as caught:
            answers(OpenAITeacher(config(server.url, concurrency=2)), 500)
        assert sum(server.asked.values()) <= 4
    assert server.url in str(caught.value)


def test_spent_quota_is_not_asked_again() -> None:
    quota = Reply(status=429, raw=b'{"error": {"message": "pay", "code": "insufficient_quota"}}')
    with TeacherServer(lambda prompt, before: quota) as server:
        with pytest.raises(TeacherError, match="429"):
            answers(OpenAITeacher(config(server.url, concurrency=1)), 50)
        assert sum(server.asked.values()) == 1


def test_unreachable_is_told_fast_with_the_url() -> None:
    with TeacherServer() as server:
        url = server.url
    started = time.monotonic()
    with pytest.raises(TeacherError, match="cannot be reached") as caught:
        answers(OpenAITeacher(config(url, retries=5)), 5000)
    assert time.monotonic() - started < 30
    assert url in str(caught.value)
    assert "base_url" in (caught.value.remedy or "")


def test_a_server_that_dies_ends_the_run_after_its_answers() -> None:
    with TeacherServer(lambda prompt, before: Reply(delay_s=0.01)) as server:
        teacher = OpenAITeacher(config(server.url, concurrency=4, retries=1))
        seen: list[int] = []

        def ask_on() -> None:
            for index, _ in teacher.answer(requests(5000)):
                seen.append(index)
                if len(seen) == 10:
                    server.stop()

        with pytest.raises(TeacherError, match="answers, which are kept"):
            ask_on()
        assert 10 <= len(seen) < 5000


def test_redirects_are_not_followed() -> None:
    with TeacherServer() as elsewhere:
        away = Reply(status=307, headers={"Location": f"{elsewhere.url}/chat/completions"}, raw=b"")
        with TeacherServer(lambda prompt, before: away) as server, pytest.raises(TeacherError, match="307"):
            answers(OpenAITeacher(config(server.url)), 3)
        assert sum(elsewhere.asked.values()) == 0


def test_loopback_does_not_go_through_a_proxy_nor_carry_foreign_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "proj-secret")
    with TeacherServer() as server:
        assert texts(answers(OpenAITeacher(config(server.url)), 2)) == ["ok", "ok"]
    assert "secret" not in json.dumps(server.headers)


def test_api_key_is_sent_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TEACHER_KEY", " k-123\n")
    with TeacherServer() as server:
        answers(OpenAITeacher(config(server.url, api_key_env="MY_TEACHER_KEY")), 1)
    assert server.headers[0]["authorization"] == "Bearer k-123"


def test_budget_is_never_overrun() -> None:
    with TeacherServer(lambda prompt, before: Reply(prompt_tokens=8, completion_tokens=12, delay_s=0.005)) as server:
        outcomes = answers(OpenAITeacher(config(server.url, concurrency=8)), 100, Limits(tokens=500))
    done = [o for o in outcomes.values() if isinstance(o, Generation)]
    spent = sum(o.prompt_tokens + o.completion_tokens for o in done)
    assert 450 <= spent <= 500
    assert {o.kind for o in outcomes.values() if isinstance(o, TeacherFailure)} == {"budget"}
    assert sum(server.asked.values()) == len(done)


def test_closing_stops_the_work() -> None:
    with TeacherServer(lambda prompt, before: Reply(delay_s=0.02)) as server:
        outcomes = OpenAITeacher(config(server.url, concurrency=2)).answer(requests(1000))
        next(outcomes)
        outcomes.close()  # type: ignore[attr-defined]
        asked = sum(server.asked.values())
        time.sleep(0.2)
        assert sum(server.asked.values()) == asked < 900


def test_works_inside_a_running_event_loop() -> None:
    import asyncio

    async def notebook(url: str) -> int:
        return len(answers(OpenAITeacher(config(url)), 3))

    with TeacherServer() as server:
        assert asyncio.run(notebook(server.url)) == 3


def test_no_requests_need_no_server() -> None:
    assert answers(OpenAITeacher(config("http://127.0.0.1:9/v1")), 0) == {}


# --- the whole of stage 1

LABELS = ("card_arrival", "lost_card", "refund")


def closed(folder: Path, count: int = 12) -> Dataset:
    rows = [row(i, f"text {i}", LABELS[i % 3], slice="s") for i in range(count)]
    return make_dataset(folder, rows, [row(900, "text v", "refund")], [row(999, "secret test", "refund")], LABELS)


def by_gold(prompt: str, before: int) -> Reply:
    number = prompt.removeprefix("text ")
    return Reply("refund" if number == "v" else LABELS[int(number) % 3].upper() + ".")


def test_closed_task_end_to_end(tmp_path: Path) -> None:
    dataset, draft = closed(tmp_path), make_draft(tmp_path)
    events: list[Progress] = []

    def script(prompt: str, before: int) -> Reply:
        special = {
            "text 0": Reply("lost_card"),  # gold says card_arrival
            "text 1": Reply("I'm sorry, but I can't help with that."),
            "text 2": Reply("weather"),
            "text 3": Reply("card_arr", finish_reason="length"),
            "text 4": Reply(""),
            "text 5": broken(400),
        }
        return special.get(prompt) or by_gold(prompt, before)

    with TeacherServer(script) as server:
        teacher = config(server.url)
        ask_teacher(dataset, "classification", teacher, OpenAITeacher(teacher), draft, progress=events.append)

    assert server.asked["secret test"] == 0
    assert (draft.path / "test.jsonl").read_bytes() == (dataset.path / "test.jsonl").read_bytes()
    kept = lines(draft.path / "train.jsonl")
    assert [one["id"] for one in kept] == [f"r{i}" for i in range(12)]
    assert [one["target"] for one in kept] == [LABELS[i % 3] for i in range(12)]
    assert [one["meta"]["target_source"] for one in kept] == ["gold"] * 6 + ["teacher"] * 6
    assert kept[0]["meta"]["slice"] == "s"
    told = lines(draft.path / "teacher.jsonl")
    assert [one["reason"] for one in told[:7]] == [
        "disagrees_with_gold",
        "refusal",
        "not_a_label",
        "truncated",
        "empty",
        "failed_refused_request",
        None,
    ]
    assert told[0]["answer"] == "lost_card"
    assert told[12] == {
        "id": "r900",
        "split": "validation",
        "answer": "refund",
        "finish_reason": "stop",
        "prompt_tokens": 20,
        "completion_tokens": 5,
        "accepted": True,
        "reason": None,
    }
    quarantine = lines(draft.path / "quarantine.jsonl")
    assert quarantine[0] == {"reason": "was here before"}
    assert len(quarantine) == 7
    assert quarantine[1]["row"]["id"] == "r0"
    summary = json.loads((draft.path / "summary.json").read_text())
    assert summary["labels"] == list(LABELS)
    assert summary["kept"] == "as it was"
    teacher_summary = summary["teacher"]
    assert (teacher_summary["asked"], teacher_summary["accepted"], teacher_summary["failed"]) == (13, 7, 1)
    assert teacher_summary["rejected"] == {
        "disagrees_with_gold": 1,
        "refusal": 1,
        "not_a_label": 1,
        "truncated": 1,
        "empty": 1,
    }
    assert teacher_summary["prompt_tokens"] == 12 * 20
    assert teacher_summary["completion_tokens"] == 12 * 5
    assert teacher_summary["success_ratio"] == pytest.approx(7 / 13)
    assert "seconds" not in teacher_summary  # the same answers have the same digest, however long they took
    logs = np.load(draft.path / "teacher_train.npy")
    assert logs.shape == (12, 3)
    assert logs.dtype == np.float32
    np.testing.assert_allclose(np.exp(logs).sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.exp(logs[1]), [0.05, 0.9, 0.05], atol=1e-6)
    assert [LABELS[i] for i in logs.argmax(axis=1)] == [one["target"] for one in kept]
    assert np.load(draft.path / "teacher_validation.npy").shape == (1, 3)
    assert (events[-1].done, events[-1].total) == (13, 13)


def test_open_task_leaves_out_rows_that_nobody_answered(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [row(0), row(1, target="gold"), row(2)], [row(3)], [row(4, target="t")])
    draft = make_draft(tmp_path)
    script = lambda prompt, before: Reply("" if prompt[-1] in "01" else f"reply to {prompt}")  # noqa: E731
    with TeacherServer(script) as server:
        teacher = config(server.url, min_success_ratio=0.5)
        ask_teacher(dataset, "conversation", teacher, OpenAITeacher(teacher), draft)
    kept = lines(draft.path / "train.jsonl")
    assert [(one["id"], one["target"]) for one in kept] == [("r1", "gold"), ("r2", "reply to question 2")]
    assert not list(draft.path.glob("*.npy"))
    assert draft.metrics["teacher"]["kept_rows"] == {"train": 2, "validation": 1}


def test_again_asks_nothing_and_same_questions_are_asked_once(tmp_path: Path) -> None:
    rows = [row(i, f"text {i % 5}") for i in range(20)]
    dataset, draft = make_dataset(tmp_path, rows), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply(f"re {prompt}")) as server:
        teacher = config(server.url)
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert sum(server.asked.values()) == 5
        before = {p.name: p.read_bytes() for p in draft.path.iterdir() if p.name != "summary.json"}
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert sum(server.asked.values()) == 5
        assert before == {p.name: p.read_bytes() for p in draft.path.iterdir() if p.name != "summary.json"}
        ask_teacher(dataset, "qa", config(server.url, max_tokens=9), OpenAITeacher(teacher), draft)
        assert sum(server.asked.values()) == 10
    assert len(lines(draft.path / "train.jsonl")) == 20


def test_journal_folder_outlives_the_draft(tmp_path: Path) -> None:
    dataset = closed(tmp_path)
    with TeacherServer(by_gold) as server:
        teacher = config(server.url)
        for name in ("first", "second"):
            draft = make_draft(tmp_path / name)
            ask_teacher(
                dataset, "classification", teacher, OpenAITeacher(teacher), draft, journal_folder=tmp_path / "answers"
            )
            assert not list(draft.work.iterdir())
        assert set(server.asked.values()) == {1}


def test_two_runs_at_once_ask_once(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [row(i) for i in range(30)])
    with TeacherServer(lambda prompt, before: Reply(f"re {prompt}", delay_s=0.02)) as server:
        teacher = config(server.url)

        def run(name: str) -> list[str]:
            draft = make_draft(tmp_path / name)
            ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft, journal_folder=tmp_path / "answers")
            return [one["target"] for one in lines(draft.path / "train.jsonl")]

        with ThreadPoolExecutor(2) as both:
            left, right = both.map(run, ("left", "right"))
    assert left == right == [f"re question {i}" for i in range(30)]
    assert set(server.asked.values()) == {1}


def test_one_in_a_hundred_fails_for_good(tmp_path: Path) -> None:
    rows = [row(i) for i in range(300)]
    dataset, draft = make_dataset(tmp_path, rows), make_draft(tmp_path)

    def script(prompt: str, before: int) -> Reply:
        return broken() if int(prompt.split()[1]) % 100 == 7 else Reply(f"re {prompt}")

    with TeacherServer(script) as server:
        teacher = config(server.url, concurrency=16, min_success_ratio=0.98, retries=2)
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert server.asked["question 107"] == 3
        assert draft.metrics["teacher"]["accepted"] == 297
        assert draft.metrics["teacher"]["failures"] == {"server_error": 3}
        server.script = lambda prompt, before: Reply("now")
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert Counter(server.asked.values()) == {1: 297, 4: 3}
    assert draft.metrics["teacher"]["accepted"] == 300


def test_budget_ends_clearly_and_going_on_pays_only_for_the_rest(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(40)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply("a fine answer")) as server:
        small = config(server.url, budget_tokens=500, max_tokens=20)
        with pytest.raises(TeacherError, match="token budget is spent") as caught:
            ask_teacher(dataset, "qa", small, OpenAITeacher(small), draft)
        assert "budget_tokens" in (caught.value.remedy or "")
        first_round = sum(server.asked.values())
        assert 5 < first_round <= 20
        with pytest.raises(TeacherError, match="token budget is spent"):
            ask_teacher(dataset, "qa", small, OpenAITeacher(small), draft)
        assert sum(server.asked.values()) <= 20
        enough = config(server.url, budget_tokens=5000, max_tokens=20)
        ask_teacher(dataset, "qa", enough, OpenAITeacher(enough), draft)
    assert set(server.asked.values()) == {1}
    assert len(lines(draft.path / "train.jsonl")) == 40


def test_too_few_good_answers(tmp_path: Path) -> None:
    dataset, draft = closed(tmp_path), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply("weather, probably" if before == 0 else "?")) as server:
        teacher = config(server.url, min_success_ratio=0.8)
        with pytest.raises(TeacherError) as caught:
            ask_teacher(dataset, "classification", teacher, OpenAITeacher(teacher), draft)
        message = str(caught.value)
        for part in ("0 good answers of 13", "0.8", "13 not a label", "weather, probably", "row r", "teacher.system"):
            assert part in message
        assert message.count("weather, probably") == 3
        lower = config(server.url, min_success_ratio=0.0)
        ask_teacher(dataset, "classification", lower, OpenAITeacher(lower), draft)
        assert set(server.asked.values()) == {1}


def test_a_hopeless_teacher_is_stopped_early(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(2000)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply("")) as server:
        teacher = config(server.url, min_success_ratio=0.8)
        with pytest.raises(TeacherError, match="ended early"):
            ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert 100 <= sum(server.asked.values()) < 1500


def test_junk_only(tmp_path: Path) -> None:
    dataset, draft = closed(tmp_path, 3), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply(raw=b"<html>It works!</html>")) as server:
        teacher = config(server.url, min_success_ratio=0.8, retries=1)
        with pytest.raises(TeacherError, match="It works!"):
            ask_teacher(dataset, "classification", teacher, OpenAITeacher(teacher), draft)


def test_closed_task_without_labels(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(0)]), make_draft(tmp_path)
    with pytest.raises(DataError, match="no labels"):
        ask_teacher(dataset, "nli", config("http://127.0.0.1:9"), Silent(), draft)


class Silent:
    identity = "silent"

    def answer(
        self, requests: Sequence[GenerationRequest], *, limits: Limits = UNLIMITED
    ) -> Iterator[tuple[int, Generation | TeacherFailure]]:
        raise AssertionError("nothing may be asked")


def test_nothing_leaves_unredacted(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(0, "I am Ann")]), make_draft(tmp_path)
    remote = TeacherConfig(model="openai:x", base_url="https://teacher.example/v1")
    with pytest.raises(PrivacyError, match="no redaction"):
        ask_teacher(dataset, "qa", remote, Silent(), draft)
    with TeacherServer(lambda prompt, before: Reply(f"hello {prompt}")) as server:
        teacher = config(server.url, system="Ann's helper")
        hide = lambda text: text.replace("Ann", "<NAME>")  # noqa: E731
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft, redact=hide)
    assert "Ann" not in json.dumps(server.bodies)
    (kept,) = lines(draft.path / "train.jsonl")
    assert kept["messages"][0]["content"] == "I am Ann"
    assert kept["target"] == "hello I am <NAME>"


CHILD = """
import sys
from pathlib import Path
from slmops.artifacts import Dataset, Draft
from slmops.distill import OpenAITeacher, ask_teacher
from slmops.recipe import TeacherConfig
data, out, work, url = sys.argv[1:]
Path(out).mkdir(exist_ok=True)
config = TeacherConfig(model="openai:fake", base_url=url, concurrency=4, min_success_ratio=0)
ask_teacher(Dataset.open(data), "qa", config, OpenAITeacher(config), Draft(Path(out), Path(work)))
"""


def test_kill_9_in_the_middle_loses_nothing_and_asks_nothing_twice(tmp_path: Path) -> None:
    count, concurrency = 300, 4
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(count)]), make_draft(tmp_path)
    journal = draft.work / "teacher-answers.jsonl"
    with TeacherServer(lambda prompt, before: Reply(f"re {prompt}", delay_s=0.02)) as server:
        command = [sys.executable, "-c", CHILD, str(dataset.path), str(draft.path), str(draft.work), server.url]
        killed = 0
        for goal in (15, 60):
            child = subprocess.Popen(command)
            deadline = time.monotonic() + 200
            while not journal.exists() or journal.read_bytes().count(b"\n") < goal:
                assert time.monotonic() < deadline
                assert child.poll() is None
                time.sleep(0.002)
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            killed += 1
            known = journal.read_bytes().count(b"\n")
            assert known < count
            journal.write_bytes(journal.read_bytes() + b'{"request": "torn')
        time.sleep(0.1)
        asked_before = server.asked.copy()
        assert subprocess.run(command, check=False).returncode == 0
        asked_last = server.asked - asked_before
    # What was in flight when the process died has to be asked again; what was written down must not be.
    assert asked_last.total() == count - known
    assert set(asked_last.values()) == {1}
    twice = sum(times - 1 for times in server.asked.values())
    assert twice <= killed * concurrency
    assert [one["target"] for one in lines(draft.path / "train.jsonl")] == [f"re question {i}" for i in range(count)]


def test_server_stopped_and_started_again(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(400)]), make_draft(tmp_path)
    with TeacherServer(lambda prompt, before: Reply(f"re {prompt}", delay_s=0.01)) as server:
        teacher = config(server.url, concurrency=4, retries=1)

        def stop_after(event: Progress) -> None:
            if event.done == 20:
                server.stop()

        with pytest.raises(TeacherError, match="kept"):
            ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft, progress=stop_after)
        answered = server.answered.total()
        known = len(lines(draft.work / "teacher-answers.jsonl"))
        assert 20 <= known <= answered
        server.start()
        ask_teacher(dataset, "qa", teacher, OpenAITeacher(teacher), draft)
        assert server.answered.total() <= 400 + (answered - known)
    assert len(lines(draft.path / "train.jsonl")) == 400


# --- a teacher in this process


class Parrot:
    """A generator that answers with its prompt, and remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.batches.append(len(requests))
        return [Generation(f"re {request.messages[-1].content}", "stop", 6, 4) for request in requests]

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        raise NotImplementedError

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def test_local_teacher(tmp_path: Path) -> None:
    dataset, draft = make_dataset(tmp_path, [row(i) for i in range(70)], [row(100)]), make_draft(tmp_path)
    parrot = Parrot()
    teacher = TeacherConfig(model="path/to/model")
    ask_teacher(dataset, "qa", teacher, LocalTeacher(parrot, identity="sha-1"), draft)
    assert parrot.batches == [32, 32, 7]
    assert [one["target"] for one in lines(draft.path / "train.jsonl")] == [f"re question {i}" for i in range(70)]
    ask_teacher(dataset, "qa", teacher, LocalTeacher(parrot, identity="sha-1"), draft)
    assert len(parrot.batches) == 3
    ask_teacher(dataset, "qa", teacher, LocalTeacher(parrot, identity="sha-2"), draft)
    assert len(parrot.batches) == 6


def test_local_teacher_and_budget() -> None:
    outcomes = dict(
        LocalTeacher(Parrot(), identity="x", batch_requests=4).answer(requests(12), limits=Limits(tokens=70))
    )
    assert sum(isinstance(outcome, Generation) for outcome in outcomes.values()) == 8
    assert sorted(outcomes) == list(range(12))
