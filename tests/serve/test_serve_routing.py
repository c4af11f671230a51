"""What the model is unsure of goes to the teacher: the decision, the counting, and both forms of model over HTTP."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message
from slmops.errors import ServeError
from slmops.runtime import open_classifier, open_generator
from slmops.runtime.base import Delta, Generation, GenerationRequest, TextScore
from slmops.serve.app import create_app
from slmops.serve.engine import Engine
from slmops.serve.operate import ServeOptions, operate
from slmops.serve.reload import Version
from slmops.serve.routing import Policy, Router, Tally, confidence_of, goes_up, label_in, told
from slmops.serve.server import background


class Teacher:
    """Says always the same; ``failing`` raises instead. ``asked``: what it was asked."""

    def __init__(self, says: str, *, failing: bool = False) -> None:
        self.says, self.failing = says, failing
        self.asked: list[GenerationRequest] = []
        self.closed = False

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        self.asked.append(request)
        if self.failing:
            raise ServeError("away")
        yield Delta(self.says)
        yield Delta("", "stop", 7, 1)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return [Generation("".join(piece.text for piece in self.stream(request)), "stop", 7, 1) for request in requests]

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def test_the_unsure_go_up_and_the_unknown_stay() -> None:
    assert goes_up(0.3, 0.5)
    assert not goes_up(0.5, 0.5)
    assert not goes_up(None, 1.0)
    assert not goes_up(0.0, 0.0)
    assert confidence_of(Delta("", "stop", 1, 4, logprob=-4 * math.log(2))) == pytest.approx(0.5)
    assert confidence_of(Delta("", "stop", 1, 0, logprob=0.0)) is None
    assert confidence_of(Delta("", "stop", 1, 3)) is None


def test_shares_and_costs() -> None:
    policy = Policy(0.5, own_cost_per_1000=0.1, teacher_cost_per_1000=4.0)
    assert told(Tally(), policy)["share"] == 0
    found = told(Tally(asked=10, sent=2, failed=1), policy)
    assert (found["share"], found["to_teacher"], found["teacher_failed"]) == (0.3, 2, 1)
    assert found["blended_cost_per_1000"] == pytest.approx(0.1 + 0.3 * 4.0)


def test_a_teachers_label_is_one_of_the_models() -> None:
    assert label_in(' "Refund". ', LABELS) == "refund"
    assert label_in("wann kommt sie?", LABELS) == "wann kommt sie?"
    assert label_in("It is a refund", LABELS) is None


def test_a_failing_teacher_costs_no_answer() -> None:
    teacher = Teacher("", failing=True)
    router = Router(teacher, Policy(1.0))
    own = [Delta("a"), Delta("b", "stop", 1, 2, logprob=-3.0)]
    request = GenerationRequest((Message("user", "x"),))
    assert list(router.routed(iter(own), request)) == own
    assert router.label("x", LABELS, 0.1) is None
    assert (router.told()["teacher_failed"], router.told()["to_teacher"], router.told()["requests"]) == (2, 0, 2)
    sure = Router(Teacher("b"), Policy(0.1))
    assert list(sure.routed(iter(own), request)) == own
    assert sure.told()["share"] == 0


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint)
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_generator_with_a_teacher(text_folder: Path, threshold: float) -> None:
    teacher = Teacher("from above")
    router = Router(teacher, Policy(threshold, 1.0, 10.0))
    engine = Engine.open(text_folder, threads=1, engine="onnx-batch", router=router)
    own = open_generator(text_folder, threads=1).generate(
        [GenerationRequest((Message("user", "hello"),), max_tokens=8)]
    )[0]
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    with background(create_app(text_folder, name="m", engine=engine)) as url:
        whole = httpx.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        streamed = httpx.post(f"{url}/v1/chat/completions", json={**body, "stream": True}).text
        said = httpx.get(f"{url}/v1/routing").json()
    assert whole == ("from above" if threshold else own.text)
    assert ("from above" in streamed) == bool(threshold)
    assert (said["requests"], said["share"]) == (2, threshold)
    assert said["blended_cost_per_1000"] == 1.0 + threshold * 10.0
    assert len(teacher.asked) == 2 * threshold
    assert teacher.closed


def test_a_classifier_with_a_teacher(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_classifier(folder)
    texts = ["my card is lost", "a fee", "where is it"]
    probabilities = open_classifier(folder).probabilities(texts)
    threshold = float(sorted(probabilities.max(axis=1))[1])  # one is less sure than this
    teacher = Teacher("balance")
    engine = Engine.open(folder, router=Router(teacher, Policy(threshold)))
    with background(create_app(folder, name="m", engine=engine)) as url:
        rows = httpx.post(f"{url}/v1/classify", json={"input": texts}).json()
        chats = [
            httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": text}).json()["choices"][0]["text"]
            for text in texts
        ]
        said = httpx.get(f"{url}/v1/routing").json()
    unsure = int(probabilities.max(axis=1).argmin())
    for place, row in enumerate(rows):
        if place == unsure:
            assert (row["label"], row["answered_by"]) == ("balance", "teacher")
        else:
            assert row["label"] == LABELS[int(probabilities[place].argmax())]
            assert "answered_by" not in row
    assert chats == [row["label"] for row in rows]
    assert (said["requests"], said["to_teacher"]) == (6, 2)
    assert texts[unsure] in teacher.asked[0].messages[0].content


def test_metrics_tell_whose_answers_were_given(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_tiny_classifier(folder)

    def load(source: str) -> tuple[Version, Engine]:
        return Version(source, folder, "f" * 20), Engine.open(folder, router=Router(Teacher(LABELS[0]), Policy(1.0)))

    with background(operate("one", load, ServeOptions("m"))) as url:
        assert httpx.post(f"{url}/v1/classify", json={"input": ["a fee", "where is it"]}).status_code == 200
        page = httpx.get(f"{url}/metrics").text
    assert 'slmops_routed_total{outcome="teacher",version="ffffffffffff"} 2.0' in page


def test_without_a_teacher_there_is_no_routing(text_folder: Path) -> None:
    with background(create_app(text_folder, name="m")) as url:
        assert httpx.get(f"{url}/v1/routing").status_code == 404
