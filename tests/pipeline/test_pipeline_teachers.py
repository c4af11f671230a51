"""Whole runs by who teaches: a model here, a server, and what leaves the machine."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline_helpers import Place, write_rows

import slmops.pipeline.context as context_module
from fakes.teacher_server import Reply, TeacherServer, broken
from slmops.artifacts import Message
from slmops.errors import TeacherError
from slmops.evaluate.summary import REQUIRED_KEYS
from slmops.package import verify_bundle
from slmops.pipeline import RunResult, run_recipe
from slmops.pipeline.context import Context
from slmops.pipeline.prove import _remote_teacher_entry
from slmops.pipeline.teach import ask_for_answers, prepare_data
from slmops.progress import Progress, ignore
from slmops.recipe import Recipe, parse_recipe
from slmops.runtime import GenerationRequest, open_generator
from slmops.store import Store

QUICK = {"untaught_baseline": False, "latency_requests": 5, "threads": 1}


def label_of(prompt: str, before: int) -> Reply:
    """A good teacher of the tiny table."""
    for word, label in (("balance", "balance"), ("lost", "lost"), ("refund", "refund")):
        if word in prompt.split():
            return Reply(text=label)
    return Reply(text="I do not know")


def artifact(root: Path, kind: str, name: str) -> Path:
    manifests = (root / "artifacts" / kind).glob("*/manifest.json")
    return next(path.parent for path in manifests if json.loads(path.read_text())["name"] == name)


def jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def asked_texts(server: TeacherServer) -> str:
    return json.dumps([body["messages"] for body in server.bodies], ensure_ascii=False)


# --- a server that teaches labels -------------------------------------------------------------------------------


@pytest.fixture
def no_default_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model that is cut where nobody names one is large; a test that would fetch it fails."""
    monkeypatch.setattr(context_module, "DEFAULT_BASE", "/nowhere/that/exists")


def remote(place: Place, server: TeacherServer, **sections: Any) -> Recipe:
    teacher = {"model": "openai:fake", "base_url": server.url, "concurrency": 4, "retries": 0, "timeout_s": 20.0}
    raw = place.raw(evaluate=QUICK, compress={"precisions": ["fp32"]}, train={"epochs": 4}, **sections)
    return parse_recipe({**raw, "teacher": teacher, "student": {"model": str(place.teacher)}})


@pytest.mark.slow
@pytest.mark.usefixtures("no_default_base")
def test_a_server_teaches_a_classifier(place: Place, tmp_path: Path) -> None:
    events: list[Progress] = []
    with TeacherServer(label_of) as server:
        with Store.open(tmp_path / "store") as store:
            result = run_recipe(remote(place, server), store, progress=events.append)
        rows = result.report["data"]["rows"]
        assert sum(server.asked.values()) == sum(rows.values()), "a row was asked twice, or not at all"
        report = result.report
        assert set(REQUIRED_KEYS) <= report.keys()
        teacher = report["teacher"]
        assert (teacher["id"], teacher["runtime"], teacher["score"]["value"]) == ("teacher", "openai:fake", 1.0)
        assert teacher["size_bytes"] is teacher["memory_bytes_peak"] is teacher["latency_ms"]["p50"] is None
        assert report["reductions"] == {"latency": None, "memory": None, "size": None, "cost": None}
        assert {variant["id"] for variant in report["variants"]} == {"student-torch", "student-fp32"}
        assert report["retention"] == report["student"]["score"]["value"] > 0.5
        assert verify_bundle(result.folder / "bundle") == []
        # Found done, the server is not asked again; nor is it when it is gone.
        with Store.open(tmp_path / "store") as store:
            assert run_recipe(remote(place, server), store).reused
        assert sum(server.asked.values()) == sum(rows.values())


@pytest.mark.usefixtures("no_default_base")
def test_a_server_that_is_gone_at_the_test_is_no_bad_teacher(place: Place, tmp_path: Path) -> None:
    """Failures on the test rows would make the teacher's score too low, and the student's share too high."""
    with TeacherServer(lambda prompt, before: broken(500)) as server, Store.open(tmp_path / "store") as store:
        context = Context(remote(place, server), store, False, ignore)
        data = prepare_data(context)
        with pytest.raises(TeacherError, match=r"answered 0 of the \d+ test rows") as caught:
            _remote_teacher_entry(context, data)
        assert "run again" in (caught.value.remedy or "")
        some = [row.text for row in data.rows("test")][:2]
        server.script = lambda prompt, before: broken(500) if prompt in some else label_of(prompt, before)
        with pytest.raises(TeacherError, match=r"answered \d+ of the \d+ test rows"):
            _remote_teacher_entry(context, data)
        server.script = label_of
        assert _remote_teacher_entry(context, data).scores.value == 1.0


@pytest.mark.usefixtures("no_default_base")
@pytest.mark.parametrize("answer", ["as a model I would rather not", "", "  \n"], ids=["refusal", "empty", "blank"])
def test_a_hopeless_server_stops_the_run_before_any_training(place: Place, tmp_path: Path, answer: str) -> None:
    events: list[Progress] = []
    with (
        TeacherServer(lambda prompt, before: Reply(text=answer)) as server,
        Store.open(tmp_path / "store") as store,
        pytest.raises(TeacherError, match="good"),
    ):
        run_recipe(remote(place, server), store, progress=events.append)
    assert "student" not in {event.task for event in events}


# --- what leaves the machine ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "leaves"),
    [
        ("http://127.0.0.1:8000/v1", False),
        ("http://localhost:8000/v1", False),
        ("https://teacher.example/v1", True),
        (None, True),
    ],
)
def test_redaction_is_on_exactly_where_rows_leave(place: Place, tmp_path: Path, url: str | None, leaves: bool) -> None:
    recipe = place.recipe(teacher={"model": "openai:x", "base_url": url}, privacy="remote")
    with Store.open(tmp_path) as store:
        redact = Context(recipe, store, False, ignore).redact
    assert (redact is not None) == leaves
    if redact is not None:
        assert "ann@example.org" not in redact("write to ann@example.org")


@pytest.mark.usefixtures("no_default_base")
def test_rows_that_leave_are_redacted_everywhere(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training rows and in test rows; what is kept here stays as it was."""
    secrets = ["ann.smith@example.org", "4111 1111 1111 1111"]
    write_rows(tmp_path / "plain.csv", 60)
    lines = (tmp_path / "plain.csv").read_text().splitlines()
    for index in range(1, len(lines)):
        text, label = lines[index].rsplit(",", 1)
        lines[index] = f"{text} mail {secrets[0]} card {secrets[1]} {index},{label}"
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(context_module, "leaves_machine", lambda teacher: True)
    with TeacherServer(label_of) as server, Store.open(tmp_path / "store") as store:
        recipe = remote(place, server, data={"train": str(tmp_path / "rows.csv")}, privacy="remote")
        context = Context(recipe, store, False, ignore)
        data = prepare_data(context)
        answers = ask_for_answers(context, data, None)
        asked_for_answers = len(server.bodies)
        _remote_teacher_entry(context, data)
        assert len(server.bodies) > asked_for_answers > 0
        sent = asked_texts(server)
    assert "balance" in sent
    for secret in secrets:
        assert secret not in sent
    assert all(secrets[0] in row.text for row in answers.rows("train"))
    assert all(secrets[0] in row.text for row in answers.rows("test"))


# --- conversations ----------------------------------------------------------------------------------------------

WORDS = ["hello", "how", "are", "you", "today", "where", "is", "top", "up", "world"]
THINGS = {
    "card": "it is lost",
    "fee": "no fee now",
    "balance": "please tell me your account",
    "refund": "you want a refund",
}


@pytest.fixture(scope="module")
def chats(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("chats")
    rng = random.Random(2)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        for number in range(48):
            thing = sorted(THINGS)[number % 4]
            extra = " ".join(
                rng.sample(["hello", "how", "are", "you", "today", "where", "is", "my", "top", "up", "world"], 4)
            )
            writer.writerow([f"{extra} my {thing}", THINGS[thing]])

    def recipe(**sections: Any) -> Recipe:
        raw: dict[str, Any] = {
            "name": "tiny-chat",
            "task": "conversation",
            "data": {
                "train": str(folder / "rows.csv"),
                "input": "{question}",
                "target": "{answer}",
                "near_duplicates": None,
                "split": {"validation": 0.1, "test": 0.15},
            },
            "teacher": {
                "model": str(place.teacher),
                "adapt_epochs": 16,
                "adapt_method": "full",
                "learning_rate": 5e-3,
                "max_tokens": 24,
                "min_success_ratio": 0.0,
            },
            "student": {"layers": 1},
            "train": {"epochs": 12, "batch_size": 4, "precision": "fp32", "max_tokens": 96, "learning_rate": 5e-3},
            "compress": {"precisions": ["fp32"], "teacher_precisions": []},
            "evaluate": {**QUICK, "max_new_tokens": 24},
            "gates": {"retention": 0.0, "format_valid": 0.0, "parity": 1.0},
        }
        for name, section in sections.items():
            raw[name] = {**raw[name], **section}
        return parse_recipe(raw)

    return recipe


def check_chat(result: RunResult) -> None:
    assert set(REQUIRED_KEYS) <= result.report.keys()
    assert result.report["task"] == "conversation"
    assert result.passed
    bundle = result.folder / "bundle"
    assert verify_bundle(bundle) == []
    generator = open_generator(bundle / "model")
    [answer] = generator.generate([GenerationRequest((Message("user", "hello my card"),), max_tokens=12)])
    assert answer.completion_tokens > 0
    generator.close()


@pytest.mark.slow
def test_a_conversation_learnt_from_a_model_here(chats: Callable[..., Any], tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        result = run_recipe(chats(), store)
    check_chat(result)
    report = result.report
    assert report["teacher"]["id"] == "teacher-torch"
    assert report["teacher"]["latency_ms"]["p50"] > 0
    assert {variant["id"] for variant in report["variants"]} == {"teacher-torch", "student-torch", "student-fp32"}
    answers = artifact(tmp_path / "store", "dataset", "answers")
    rows = jsonl(answers / "train.jsonl")
    assert {row["meta"]["target_source"] for row in rows} <= {"teacher", "gold"}
    said = {row["target"] for row in rows if row["meta"]["target_source"] == "teacher"}
    assert said, "no answer of the teacher was good"
    assert len(said & set(THINGS.values())) >= 2, "the teacher did not learn"
    with Store.open(tmp_path / "store") as store:
        assert run_recipe(chats(), store).reused


@pytest.mark.slow
def test_a_conversation_learnt_from_a_server(
    chats: Callable[..., Any], place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student is cut from the model that stands in where a server gives no weights."""
    monkeypatch.setattr(context_module, "DEFAULT_BASE", str(place.teacher))

    def answer(prompt: str, before: int) -> Reply:
        return Reply(text=f"the {prompt.split()[-1]} is here", prompt_tokens=30, completion_tokens=10)

    with TeacherServer(answer) as server, Store.open(tmp_path / "store") as store:
        teacher = {"model": "openai:fake", "base_url": server.url, "retries": 0}
        result = run_recipe(chats(teacher=teacher, evaluate={"teacher_price_per_million_tokens": 2.0}), store)
    check_chat(result)
    entry = result.report["teacher"]
    assert entry["runtime"] == "openai:fake"
    assert entry["cost_per_1000"] == pytest.approx(1000 * 40 * 2.0 / 1e6)
    rows = jsonl(artifact(tmp_path / "store", "dataset", "answers") / "train.jsonl")
    assert {row["target"] for row in rows} == {f"the {thing} is here" for thing in THINGS}
    assert "untaught" not in result.report["baselines"]
    generator = open_generator(result.folder / "bundle" / "model")
    [said] = generator.generate([GenerationRequest((Message("user", "hello how are you my card"),), max_tokens=20)])
    assert "is here" in said.text, "the student did not learn what the server says"
    generator.close()
