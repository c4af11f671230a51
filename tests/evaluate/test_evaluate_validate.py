"""The checklist against servers that are right, and against a named one that is wrong in one way at a time."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Message, Row, drafting
from slmops.cli.app import app
from slmops.errors import UsageError
from slmops.evaluate.machine import machine_facts
from slmops.evaluate.served import Served
from slmops.evaluate.trend import Trend
from slmops.evaluate.validate import CHECKS, Check, Subject, ValidateSettings, Validation, steady, validate
from slmops.evaluate.validate_html import render_validation
from slmops.runtime import open_classifier
from slmops.runtime.description import ModelDescription
from slmops.serve.app import create_app
from slmops.serve.server import background

QUICK = ValidateSettings(soak_requests=300, max_tokens=6, at_once=(1, 4), lengths=(1, 64, 2048))


class Wrong(http.server.ThreadingHTTPServer):
    """A classifier's server with one fault, or none: ``stranger`` (a label of its own), ``crash`` (500 on odd texts),
    ``lenient`` (takes anything), ``forgetful`` (answers change after odd texts), ``flaky`` (fails under load). ``kept``
    counts requests."""

    daemon_threads = True

    def __init__(self, fault: str = "") -> None:
        self.fault, self.odd_seen, self.at_hand, self.kept = fault, 0, 0, 0
        wrong = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._send(200, {"data": [{"id": "wrong"}]})

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                wrong.kept += 1
                wrong.at_hand += 1
                try:
                    kind = self.headers["Content-Type"] == "application/json" or wrong.fault == "lenient"
                    self._send(*wrong.answer(self.path, raw if kind else b""))
                finally:
                    wrong.at_hand -= 1

            def _send(self, status: int, body: Any) -> None:
                told = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, raw: bytes) -> tuple[int, Any]:
        error = {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
        try:
            text = json.loads(raw)["input"]
            good = path == "/v1/classify" and isinstance(text, str) and len(raw) < 2**20
        except (ValueError, KeyError, TypeError, RecursionError):
            text, good = "", False
        if set(json.loads(raw) if good else {}) - {"input"}:
            good = False
        if not good and self.fault != "lenient":
            return 400, error
        odd = not text.isascii() or "\x00" in text
        self.odd_seen += odd
        if self.fault == "crash" and odd:
            return 500, error
        if self.fault == "flaky":
            time.sleep(0.01)
            if self.at_hand > 2:
                return 503, error
        label = "b" if self.fault == "forgetful" and self.odd_seen else "a"
        if self.fault == "stranger":
            label = "zebra"
        return 200, [{"label": label, "confidence": 0.9, "probabilities": {label: 0.9}}]


class Leaking(Served):
    """Tells of a process that keeps what it gets."""

    def __init__(self, wrong: Wrong, bytes_a_request: int) -> None:
        super().__init__(wrong.url)
        self.wrong, self.bytes_a_request = wrong, bytes_a_request

    def memory_bytes(self) -> int:
        return 50_000_000 + self.bytes_a_request * self.wrong.kept


SUBJECT = Subject("wrong", "", ModelDescription("onnx", "classifier", labels=("a", "b")))


def judged(fault: str, check: str, served: Served | None = None, **options: Any) -> Check:
    wrong = Wrong(fault)
    try:
        found = validate(served or Served(wrong.url), SUBJECT, QUICK, machine={}, only=[check], **options)
    finally:
        wrong.shutdown()
    return found.checks[0]


# Servers that are wrong


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "soak"])
def test_a_server_without_a_fault_passes(check: str) -> None:
    found = judged("", check)
    assert found.passed, found


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("stranger", "in_domain", "5 of 5 probes"),
        ("stranger", "format", "'zebra' is none of the labels"),
        ("crash", "edges", "status 500"),
        ("forgetful", "edges", "changed after odd ones"),
        ("lenient", "invalid", "status 200"),
        ("flaky", "concurrency", "requests failed"),
    ],
)
def test_each_fault_is_found_by_its_check(fault: str, check: str, said: str) -> None:
    found = judged(fault, check)
    assert found.passed is False
    assert said in found.found


@pytest.mark.parametrize(("bytes_a_request", "passed"), [(0, True), (200, True), (100_000, False)])
def test_a_leak_is_found(bytes_a_request: int, passed: bool) -> None:
    wrong = Wrong()
    settings = ValidateSettings(soak_requests=2000)
    found = validate(Leaking(wrong, bytes_a_request), SUBJECT, settings, machine={}, only=["soak"])
    wrong.shutdown()
    (check,) = found.checks
    assert check.passed is passed, check.found
    assert check.evidence["slope_bytes"] == pytest.approx(bytes_a_request, rel=0.02, abs=1)


def test_the_last_request_of_a_soak_is_sampled_and_told() -> None:
    wrong, told = Wrong(), []
    settings = ValidateSettings(soak_requests=2001)
    leaking = Leaking(wrong, 10)
    found = validate(leaking, SUBJECT, settings, machine={}, only=["soak"], progress=told.append)
    wrong.shutdown()
    last = [one for one in told if one.task == "soak"][-1]
    assert last.done == last.total == 2001
    assert found.checks[0].evidence["end_bytes"] == leaking.memory_bytes()


def test_memory_that_cannot_be_seen_is_not_counted_as_passed() -> None:
    found = judged("", "soak")
    assert found.passed is None
    assert "cannot be read" in found.found


def test_a_rise_that_matters_is_one() -> None:
    assert steady(Trend(3000, (-5, 6000), 100), 20_000)
    assert steady(Trend(100, (50, 150), 100), 20_000)
    assert steady(Trend(2000, (1500, 2500), 100), 300)
    assert not steady(Trend(2000, (1500, 2500), 100), 1000)


def test_a_score_below_the_promise_fails() -> None:
    rows = [Row(str(n), (Message("user", f"text {n}"),), "a" if n % 2 else "b") for n in range(40)]
    promised = Subject("wrong", "", SUBJECT.description, {"value": 0.9, "ci95": [0.85, 0.95]})
    kept = Subject("wrong", "", SUBJECT.description, {"value": 0.55, "ci95": [0.4, 0.7]})
    wrong = Wrong()
    for subject, passed in ((promised, False), (kept, True)):
        found = validate(Served(wrong.url), subject, QUICK, machine={}, rows=rows, only=["in_domain"])
        assert found.checks[0].passed is passed
        assert found.checks[0].evidence["value"] == 0.5
    wrong.shutdown()


def test_a_server_that_is_lost_fails_the_check() -> None:
    wrong = Wrong()
    served = Served(wrong.url)
    original = wrong.answer

    def lost(path: str, raw: bytes) -> tuple[int, Any]:
        wrong.shutdown()
        wrong.server_close()
        raise ConnectionError

    wrong.answer = lost  # type: ignore[method-assign]
    found = validate(served, SUBJECT, QUICK, machine={}, only=["edges"])
    assert original
    assert found.checks[0].passed is False
    assert "server was lost" in found.checks[0].found


# Real servers, the verb and the page


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ModelDescription]]:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint, context_tokens=128)
    write_tiny_generator(folder, checkpoint)
    with background(create_app(folder, name="talker")) as url:
        yield url, ModelDescription.read(folder)


def test_a_model_that_writes_passes(texts: tuple[str, ModelDescription]) -> None:
    url, description = texts
    found = validate(
        Served(url), Subject("talker", "", description), QUICK, machine=machine_facts(), only=[*CHECKS[:6]]
    )
    assert [check.name for check in found.checks if not check.passed] == []
    sweep = next(check for check in found.checks if check.name == "lengths").evidence["sweep"]
    assert [one["code"] for one in sweep] == [None, "context_length_exceeded", "context_length_exceeded"]


class Text(HTMLParser):
    """What a reader sees, and where the page would fetch from."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.fetched = "", []

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value for name, value in attrs if name in ("src", "href")]


def test_the_verb_starts_a_server_and_writes_a_page_that_stands_alone(tmp_path: Path) -> None:
    with drafting("variant", tmp_path / "variant") as draft:
        write_tiny_classifier(draft.path / "model", name="<b>intents</b>")
    page = tmp_path / "page.html"
    ran = CliRunner().invoke(
        app,
        ["validate", str(tmp_path / "variant"), "--requests", "500", "--out", str(page), "--json"],
        catch_exceptions=False,
    )
    report = json.loads(ran.stdout)
    assert ran.exit_code == (0 if report["passed"] else 1)
    assert [check["name"] for check in report["checks"]] == list(CHECKS)
    assert [check["name"] for check in report["checks"] if check["passed"] is False] == []
    assert report["digest"]
    shown = Text()
    shown.feed(page.read_text())
    assert shown.fetched == []
    assert "<b>intents</b>: passed" in " ".join(shown.text.split())
    for title in ("Answers in domain", "Memory in long use", "Callers at once"):
        assert title in shown.text
    assert page.read_text().count("<svg") >= 2


def test_a_failed_check_is_exit_code_1_and_open_on_the_page(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path / "model")
    wrong = Wrong("lenient")
    page = tmp_path / "page.html"
    ran = CliRunner().invoke(
        app,
        ["validate", str(tmp_path / "model"), "--url", wrong.url, "--only", "invalid", "--out", str(page)],
        catch_exceptions=False,
    )
    wrong.shutdown()
    assert ran.exit_code == 1
    assert "✗ invalid" in ran.output
    assert "1 of 1 checks failed: invalid requests." in page.read_text()
    assert "<details open>" in page.read_text()


def test_an_unknown_check_is_wrong_use(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path / "model")
    ran = CliRunner().invoke(app, ["validate", str(tmp_path / "model"), "--only", "luck"])
    assert isinstance(ran.exception, UsageError)
    assert "in_domain" in str(ran.exception)


def test_a_check_that_was_not_made_is_told_apart() -> None:
    unmade = Check("soak", None, "It could not be made.", "nothing")
    whole = Validation(SUBJECT, QUICK, (unmade, Check("format", True, "Good.", "good")), machine_facts(), 1.0)
    page = render_validation(whole.to_json())
    assert "All 1 checks that were made passed. 1 could not be made." in page


def test_rows_are_asked_as_the_report_was_made(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path / "model")
    classifier = open_classifier(tmp_path / "model")
    texts = ["my card is lost", "fee", "hello", "top up"]
    best = classifier.probabilities(texts).argmax(axis=1)
    rows = [
        Row(str(n), (Message("user", text),), LABELS[label])
        for n, (text, label) in enumerate(zip(texts, best, strict=True))
    ]
    with background(create_app(tmp_path / "model", name="intents")) as url:
        subject = Subject("intents", "", ModelDescription.read(tmp_path / "model"), {"value": 1.0})
        found = validate(Served(url), subject, QUICK, machine={}, rows=rows, only=["in_domain"])
    assert found.checks[0].evidence["value"] == 1.0
    assert found.passed


def test_the_recipes_test_rows_are_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_classifier(tmp_path / "model", task="classification")
    classifier = open_classifier(tmp_path / "model")
    texts = [
        f"{verb} my {noun} number {n}" for n in range(20) for verb in ("lost", "top up") for noun in ("card", "fee")
    ]
    best = classifier.probabilities(texts).argmax(axis=1)
    lines = [f'"{text}",{json.dumps(LABELS[label])}' for text, label in zip(texts, best, strict=True)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    recipe = {
        "name": "rows",
        "task": "classification",
        "data": {"train": "rows.csv", "input": "{text}", "target": "{label}", "near_duplicates": None},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    ran = CliRunner().invoke(
        app,
        ["validate", "model", "--recipe", "recipe.yaml", "--only", "in_domain", "--json"],
        catch_exceptions=False,
    )
    (check,) = json.loads(ran.stdout)["checks"]
    assert (check["evidence"]["metric"], check["evidence"]["value"]) == ("accuracy", 1.0)
    assert check["evidence"]["rows"] >= 4
    assert ran.exit_code == 0
