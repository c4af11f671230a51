"""A server in operation: metrics, traces, logs, reloads, drains, and callers that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.server
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes.slow_generator import SlowGenerator
from fakes.tiny_models import write_tiny_classifier
from slmops.artifacts import drafting
from slmops.errors import ModelError, UsageError
from slmops.runtime.description import ModelDescription
from slmops.serve import connections, limits
from slmops.serve.engine import Engine
from slmops.serve.keys import KeyFile
from slmops.serve.logs import JsonFormatter, RequestLog
from slmops.serve.operate import Operated, ServeOptions, operate
from slmops.serve.reload import Version
from slmops.serve.server import background
from slmops.serve.tracing import Tracer
from slmops.serve.watch import Watch

QUESTION = [{"role": "user", "content": "a secret of mine"}]
SLMOPS = [sys.executable, "-c", "from slmops.cli import main; main()"]


class Talker(SlowGenerator):
    """Says its version, slowly; one that is ``broken`` cannot answer."""

    def __init__(self, version: str, step_s: float = 0.002) -> None:
        super().__init__(step_s)
        self.version = version
        self.closed = False

    def stream(self, request: Any) -> Iterator[Any]:
        if self.version == "broken":
            raise ModelError("It cannot answer.")
        for delta in super().stream(request):
            yield delta if delta.finish_reason else type(delta)(f"{self.version} ")

    def close(self) -> None:
        self.closed = True


class Shelf:
    """Versions by name, as a disk has them."""

    def __init__(self) -> None:
        self.talkers: dict[str, Talker] = {}

    def load(self, source: str) -> tuple[Version, Engine]:
        if source == "missing":
            raise ModelError("There is nothing there.", remedy="Name another.")
        talker = self.talkers[source] = Talker(source)
        form = "classifier" if source == "labels" else "generator"
        description = ModelDescription("fake", form, labels=("a",) if source == "labels" else (), name=source)
        return Version(source, Path(source), f"{source}0000000000000000"), Engine(talker, description)

    def operated(self, first: str = "one", **options: Any) -> Operated:
        return operate(first, self.load, ServeOptions("talker", **options))


def ask(url: str, tokens: int = 3, **options: Any) -> httpx.Response:
    body = {"model": "talker", "messages": QUESTION, "max_tokens": tokens, **options}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)


def text_of(response: httpx.Response) -> str:
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def samples(page: str) -> dict[tuple[str, ...], float]:
    """Name and sorted label values -> value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


# Metrics, logs, traces


def test_metrics_count_times_by_version_and_adapter() -> None:
    with background(Shelf().operated()) as url:
        assert ask(url, 5).status_code == 200
        assert ask(url, 5, stream=True).status_code == 200
        assert ask(url, nonsense=1).status_code == 400
        assert httpx.get(f"{url}/a/secret/path").status_code == 404
        response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found = samples(response.text)
    version = "one000000000"
    chat = "/v1/chat/completions"
    assert found["slmops_requests_total", "", chat, "200", version] == 2
    assert found["slmops_requests_total", "", chat, "400", version] == 1
    assert found["slmops_requests_total", "", "(another path)", "404", version] == 1
    assert found["slmops_request_seconds_count", "", chat, version] == 3
    assert found["slmops_queue_seconds_count", "", version] == 2
    assert found["slmops_time_to_first_token_seconds_count", "", version] == 2
    assert 0.001 < found["slmops_time_to_first_token_seconds_sum", "", version] < 2
    assert found["slmops_time_per_token_seconds_count", "", version] == 2
    assert found["slmops_tokens_total", "", "completion", version] == 10
    assert found["slmops_requests_at_hand",] == 0
    assert found["slmops_connections",] >= 1
    assert found["slmops_version_info", "talker", version] == 1
    assert "secret" not in response.text


def test_the_log_is_json_without_what_was_said() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("slmops.serve")
    logger.addHandler(handler)
    level, logger.level = logger.level, logging.INFO
    shelf = Shelf()
    try:
        with background(shelf.operated()) as url:
            answer = ask(url)
            shelf.talkers["one"].fail_at = 2
            assert ask(url).status_code == 500  # the fake's error quotes the question
    finally:
        logger.removeHandler(handler)
        logger.level = level
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    first, *_ = [line for line in lines if line["message"] == "request"]
    assert first["id"] == answer.headers["x-request-id"]
    assert (first["status"], first["version"], first["completion_tokens"]) == (200, "one000000000", 3)
    assert first["first_token_ms"] > 0
    assert any("KeyError" in line["message"] for line in lines)
    assert "secret" not in stream.getvalue()


def test_an_exceptions_text_is_not_logged() -> None:
    said = QUESTION[0]["content"]
    try:
        raise ValueError(said)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "went wrong", None, sys.exc_info())
    told = json.loads(JsonFormatter().format(record))
    assert (told["message"], told["error"]) == ("went wrong", "ValueError")
    assert "secret" not in json.dumps(told)


class Collector(http.server.ThreadingHTTPServer):
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    import gzip

                    body = gzip.decompress(body)
                collector.got.append((self.path, body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def test_traces_go_to_the_collector_that_the_variable_names(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_address[1]}")
    tracer = Tracer.open()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with background(operate("one", Shelf().load, ServeOptions("talker"), observers=(tracer,))) as url:
        body = {"model": "talker", "messages": QUESTION, "max_tokens": 3}
        httpx.post(f"{url}/v1/chat/completions", json=body, headers={"traceparent": parent})
    tracer.close()
    collector.shutdown()
    (path, raw), *_ = collector.got
    assert path == "/v1/traces"
    assert b"secret" not in raw
    (span,) = ExportTraceServiceRequest.FromString(raw).resource_spans[0].scope_spans[0].spans
    assert span.name == "POST /v1/chat/completions"
    assert span.trace_id.hex() == parent.split("-")[1]
    assert span.parent_span_id.hex() == parent.split("-")[2]
    assert {event.name for event in span.events} == {"model began", "first token"}
    told = {one.key: one.value.string_value or one.value.int_value for one in span.attributes}
    assert told["gen_ai.usage.output_tokens"] == 3
    assert told["slmops.version"] == "one000000000"


def test_a_collector_that_is_gone_costs_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracer = Tracer.open()
    with background(operate("one", Shelf().load, ServeOptions("talker"), observers=(tracer,))) as url:
        assert ask(url).status_code == 200
    tracer.close()


def test_nothing_is_sent_unless_it_is_said_where_to() -> None:
    with pytest.raises(UsageError, match="OTEL_EXPORTER_OTLP_ENDPOINT"):
        Tracer.open({})


def test_a_token_after_the_first_is_a_mean() -> None:
    watch = Watch(first_s=1.0, last_s=3.0, completion_tokens=5)
    assert watch.per_token_s == 0.5
    assert Watch(first_s=1.0, last_s=1.0, completion_tokens=1).per_token_s is None


# Reload


def keyed(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    file = KeyFile(tmp_path / "keys.json")
    return file.path, {"Authorization": f"Bearer {file.make('operator', ['admin', 'infer'])[1]}"}


def test_a_reload_under_load_fails_no_request(tmp_path: Path) -> None:
    keys, headers = keyed(tmp_path)
    shelf = Shelf()
    stop = threading.Event()
    answers: list[str] = []

    def caller(url: str) -> None:
        body = {"model": "talker", "messages": QUESTION, "max_tokens": 4}
        with httpx.Client(headers=headers, timeout=30) as client:
            while not stop.is_set():
                response = client.post(f"{url}/v1/chat/completions", json=body)
                assert response.status_code == 200, response.text
                answers.append(text_of(response))

    with background(shelf.operated(keys=keys)) as url, ThreadPoolExecutor(6) as pool:
        callers = [pool.submit(caller, url) for _ in range(6)]
        versions = ["two", "one", "two", "three"]
        for version in versions:
            time.sleep(0.15)
            response = httpx.post(f"{url}/admin/reload", json={"bundle": version}, headers=headers, timeout=30)
            assert response.status_code == 200, response.text
            assert response.json()["source"] == version
        time.sleep(0.15)
        stop.set()
        for one in callers:
            one.result(timeout=30)
        status = httpx.get(f"{url}/admin/status", headers=headers).json()
        page = httpx.get(f"{url}/metrics", headers=headers).text
    assert len(answers) > 20
    assert set(answers) == {f"{name} {name} {name} {name} " for name in ("one", "two", "three")}
    assert (status["version"], status["draining"]) == ("three0000000", [])
    assert samples(page)["slmops_reloads_total", "switched"] == 4
    assert all(talker.closed for talker in shelf.talkers.values())


@pytest.mark.parametrize(
    ("bundle", "why"), [("missing", "nothing there"), ("broken", "cannot answer"), ("labels", "holds a classifier")]
)
def test_a_version_that_is_no_good_is_refused_and_the_old_one_stays(tmp_path: Path, bundle: str, why: str) -> None:
    keys, headers = keyed(tmp_path)
    shelf = Shelf()
    with background(shelf.operated(keys=keys)) as url:
        response = httpx.post(f"{url}/admin/reload", json={"bundle": bundle}, headers=headers, timeout=30)
        assert response.status_code == 422
        assert why in response.json()["error"]["message"]
        assert "Nothing was changed" in response.json()["error"]["message"]
        assert httpx.get(f"{url}/admin/status", headers=headers).json()["source"] == "one"
        assert samples(httpx.get(f"{url}/metrics", headers=headers).text)["slmops_reloads_total", "refused"] == 1
        body = {"model": "talker", "messages": QUESTION, "max_tokens": 2}
        assert text_of(httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)) == "one one "
    assert bundle == "missing" or shelf.talkers[bundle].closed


def test_an_answer_that_is_being_written_is_finished_by_its_version(tmp_path: Path) -> None:
    keys, headers = keyed(tmp_path)
    shelf = Shelf()
    with background(shelf.operated(keys=keys)) as url:
        old = shelf.talkers["one"]
        body = {"model": "talker", "messages": QUESTION, "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers, timeout=30) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert httpx.post(f"{url}/admin/reload", json={"bundle": "two"}, headers=headers).status_code == 200
            assert httpx.get(f"{url}/admin/status", headers=headers).json()["draining"] == ["one000000000"]
            assert not old.closed
            rest = "".join(lines)
        assert rest.count('"one ') >= 190
        assert rest.endswith("[DONE]")
        deadline = time.monotonic() + 10
        while not old.closed and time.monotonic() < deadline:
            time.sleep(0.01)
        assert old.closed


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"bundle": 3}', b'{"folder": "x"}'])
def test_a_reload_that_says_nonsense_is_refused(tmp_path: Path, body: bytes) -> None:
    keys, headers = keyed(tmp_path)
    with background(Shelf().operated(keys=keys)) as url:
        assert httpx.post(f"{url}/admin/reload", content=body, headers=headers).status_code == 400
        assert httpx.get(f"{url}/admin/reload", headers=headers).status_code == 405


# Callers that behave badly


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections.Guarded, "head_limit_s", 0.4)
    monkeypatch.setattr(limits, "BODY_LIMIT_S", 0.4)


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def test_a_thousand_silent_connections_do_not_stop_the_others() -> None:
    with background(Shelf().operated()) as url, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address(url))) for _ in range(1000)]
        for one in silent[::2]:
            one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n")  # half a head
        started = time.monotonic()
        assert ask(url).status_code == 200
        assert time.monotonic() - started < 5
        assert samples(httpx.get(f"{url}/metrics").text)["slmops_connections",] > 900


def cut_off(dribbling: socket.socket, *, within_s: float) -> bool:
    """Send a byte of a head at a time, which does not count as a head."""
    deadline = time.monotonic() + within_s
    try:
        dribbling.sendall(b"GET / HTTP/1.1\r\nx: ")
        while time.monotonic() < deadline:
            dribbling.sendall(b"x")
            time.sleep(0.05)
    except (BrokenPipeError, ConnectionResetError):
        return True
    return False


@pytest.mark.usefixtures("impatient")
def test_whoever_sends_nothing_is_let_go() -> None:
    with background(Shelf().operated()) as url:
        silent, dribbling = (socket.create_connection(address(url)) for _ in range(2))
        with silent, dribbling:
            silent.settimeout(5)
            assert cut_off(dribbling, within_s=5)
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(1) == b""


@pytest.mark.usefixtures("impatient")
def test_a_body_that_does_not_come_is_not_waited_for() -> None:
    with background(Shelf().operated()) as url, socket.create_connection(address(url)) as slow:
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 50\r\n"
        )
        slow.sendall(f"{head}\r\n{{".encode())
        slow.settimeout(5)
        assert b"408" in slow.recv(4096).split(b"\r\n")[0]


ENDLESS = [b"GET / HTTP/1.1\r\nx: ", b"GET /"]
"""Heads that go on in a header, or in the path."""


@pytest.mark.parametrize("begun", ENDLESS)
def test_a_head_without_end_is_refused_and_not_kept(begun: bytes) -> None:
    with background(Shelf().operated()) as url, socket.create_connection(address(url)) as flooding:
        flooding.settimeout(5)
        sent = flood(flooding, begun)
        assert sent < 64 * connections.HEAD_LIMIT_BYTES
        with contextlib.suppress(ConnectionResetError):  # sent on after the refusal: the system throws it away
            assert flooding.recv(4096).startswith(b"HTTP/1.1 431 ")
        assert ask(url).status_code == 200


def test_a_head_without_end_behind_a_request_that_is_answered_ends_both() -> None:
    shelf = Shelf()
    body = json.dumps({"model": "talker", "messages": QUESTION, "max_tokens": 100_000, "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with background(shelf.operated()) as url, socket.create_connection(address(url)) as flooding:
        flooding.settimeout(5)
        flooding.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert b" 200 " in flooding.recv(100)
        assert flood(flooding, ENDLESS[0]) < 64 * connections.HEAD_LIMIT_BYTES
        assert shelf.talkers["one"].stopped.wait(10)


def flood(flooding: socket.socket, begun: bytes) -> int:
    """Send until the other side has had enough; the bytes that it took."""
    sent = 0
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        flooding.sendall(begun)
        while sent < 64 * connections.HEAD_LIMIT_BYTES:
            flooding.sendall(b"x" * 4096)
            sent += 4096
            time.sleep(0.0005)
    return sent


def test_a_long_head_within_the_limit_is_taken() -> None:
    with background(Shelf().operated()) as url:
        response = httpx.get(f"{url}/health", headers={"x-many": "x" * (connections.HEAD_LIMIT_BYTES // 2)})
        assert response.status_code == 200


def test_the_longest_silent_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.serve.server.raise_file_limit", lambda: 5)
    with background(Shelf().operated()) as url, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(address(url))) for _ in range(8)]
        time.sleep(0.2)
        assert ask(url).status_code == 200
        silent[0].settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert silent[0].recv(1) == b""


def test_a_caller_that_goes_away_frees_its_place() -> None:
    shelf = Shelf()
    with background(shelf.operated()) as url:
        talker = shelf.talkers["one"]
        body = {"model": "talker", "messages": QUESTION, "max_tokens": 100_000, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as stream:
            next(stream.iter_lines())
        assert talker.stopped.wait(10)
        assert ask(url).status_code == 200
        assert samples(httpx.get(f"{url}/metrics").text)["slmops_requests_at_hand",] == 0


def test_an_answer_is_cut_to_what_the_server_allows() -> None:
    with background(Shelf().operated(max_new_tokens=4)) as url:
        assert ask(url, 4).json()["usage"]["completion_tokens"] == 4
        error = ask(url, 5).json()["error"]
        assert (error["code"], error["param"]) == ("max_tokens_exceeded", "max_tokens")
        body = {"model": "talker", "messages": QUESTION}
        whole = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30).json()
        assert whole["usage"]["completion_tokens"] == 4


def test_a_body_beyond_the_servers_limit_is_refused() -> None:
    with background(Shelf().operated(max_body_bytes=1000)) as url:
        for content in (b"x" * 1001, iter([b"x" * 600] * 2)):
            response = httpx.post(f"{url}/v1/chat/completions", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"


# The whole process


@pytest.fixture(scope="module")
def two_versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("versions")
    for name in ("first", "second"):
        with drafting("variant", root / name) as draft:
            write_tiny_classifier(draft.path / "model", name=name)
    return root / "first", root / "second"


def test_sighup_goes_over_and_sigterm_finishes_under_load(two_versions: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two_versions
    current = tmp_path / "current"
    current.symlink_to(first)
    log = (tmp_path / "log").open("w+")
    command = [*SLMOPS, "serve", str(current), "--port", "0", "--json", "--log", "json", "--name", "intents"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        asyncio.run(_load_and_signals(process, ready["url"], current, second))
        assert process.wait(30) == 0
    finally:
        process.kill()
        log.seek(0)
        lines = log.read().splitlines()
    answered = [json.loads(line) for line in lines]
    versions = [line["version"] for line in answered if line.get("path") == "/v1/classify"]
    assert len(set(versions)) == 2
    assert ready["digest"].removeprefix("sha256:").startswith(versions[0])


async def _load_and_signals(process: subprocess.Popen[str], url: str, current: Path, second: Path) -> None:
    """Callers on fresh connections, a switch in their midst, then the end: whoever got in is answered."""
    stopping, failures, answers = asyncio.Event(), [], []
    host, port = address(url)
    body = json.dumps({"input": "my card is lost"})
    head = f"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Connection: close\r\n\r\n{body}".encode()

    async def caller() -> None:
        while not stopping.is_set():
            try:
                reader, writer = await asyncio.open_connection(host, port)
            except ConnectionRefusedError:
                if not stopping.is_set():
                    failures.append("refused")
                return
            try:
                writer.write(request)
                answer = await reader.read()
                answers.append(answer)
                if not answer.startswith(b"HTTP/1.1 200") and not (stopping.is_set() and not answer):
                    failures.append(answer[:80])
            except ConnectionResetError:  # accepted by the system after the server had stopped to listen
                if not stopping.is_set():
                    failures.append("reset")
            finally:
                writer.close()

    callers = [asyncio.create_task(caller()) for _ in range(8)]
    await asyncio.sleep(0.5)
    fresh = current.with_name("fresh")
    fresh.symlink_to(second)
    fresh.replace(current)
    process.send_signal(signal.SIGHUP)
    await asyncio.sleep(2.0)
    stopping.set()
    process.send_signal(signal.SIGTERM)
    await asyncio.gather(*callers)
    assert failures == []
    assert len(answers) > 50


def test_a_bad_bundle_on_sighup_changes_nothing(two_versions: tuple[Path, Path], tmp_path: Path) -> None:
    first, _ = two_versions
    current = tmp_path / "current"
    current.symlink_to(first)
    with drafting("variant", tmp_path / "bad") as draft:
        write_tiny_classifier(draft.path / "model", name="bad")
    damaged = tmp_path / "bad/model/tokenizer.json"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    command = [*SLMOPS, "serve", str(current), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = json.loads(process.stdout.readline())["url"]
        current.unlink()
        current.symlink_to(tmp_path / "bad")
        process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 20
        while "refused" not in httpx.get(f"{url}/metrics").text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert httpx.post(f"{url}/v1/classify", json={"input": "fee"}).status_code == 200
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "tokenizer.json" in said
    assert "answers on" in said


def test_serve_says_what_it_was_told_wrongly(two_versions: tuple[Path, Path], tmp_path: Path) -> None:
    def said(*options: str, **environment: str) -> str:
        command = [*SLMOPS, "serve", str(two_versions[0]), "--port", "0", *options]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
        )
        assert ran.returncode in (1, 2)
        assert "Traceback" not in ran.stderr
        return ran.stderr

    assert "Choose text or json" in said("--log", "xml")
    assert "slmops keys make" in said("--keys", str(tmp_path / "none.json"))
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in said("--otel")


def test_a_full_disk_costs_lines_of_the_log_and_no_request() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        RequestLog(Full()) as request_log,
        background(operate("one", Shelf().load, ServeOptions("talker"), request_log=request_log)) as url,
    ):
        for _ in range(2):
            assert ask(url).status_code == 200
            time.sleep(0.3)


def test_the_request_log_has_every_request_in_order() -> None:
    stream = io.StringIO()
    with (
        RequestLog(stream) as request_log,
        background(operate("one", Shelf().load, ServeOptions("talker"), request_log=request_log)) as url,
    ):
        ids = [ask(url).headers["x-request-id"] for _ in range(5)]
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert all(line["path"] == "/v1/chat/completions" and line["ms"] > 0 for line in lines)
