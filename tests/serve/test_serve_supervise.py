"""A server that comes back after kill -9, on the address that its callers know."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from fakes.tiny_models import write_tiny_classifier
from slmops.serve.supervise import (
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    SETTLED_S,
    gives_up,
    inherited_socket,
    next_pause_s,
)

MODULE = [sys.executable, "-m", "slmops"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labels")
    write_tiny_classifier(folder)
    return folder


class Supervised:
    def __init__(self, folder: Path) -> None:
        command = [*MODULE, "serve", str(folder), "--port", "0", "--json", "--supervise"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.url: str = json.loads(self.process.stdout.readline())["url"]

    @property
    def child(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (child,) = children.read_text().split()
        return int(child)


@pytest.fixture
def supervised(folder: Path) -> Iterator[Supervised]:
    server = Supervised(folder)
    yield server
    server.process.terminate()
    try:
        server.process.wait(30)
    finally:
        server.process.kill()
        server.process.wait()


def ask(url: str) -> int:
    return httpx.post(f"{url}/v1/classify", json={"input": "fee"}, timeout=60).status_code


def test_after_kill_9_callers_wait_and_are_answered(supervised: Supervised) -> None:
    assert ask(supervised.url) == 200
    for _ in range(2):
        child = supervised.child
        os.kill(child, signal.SIGKILL)
        while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_bytes():
            time.sleep(0.005)
        assert ask(supervised.url) == 200  # connected while nobody answered, and not refused
        assert supervised.child != child


def test_sighup_and_sigterm_reach_the_child(supervised: Supervised) -> None:
    child = supervised.child
    supervised.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + 20
    reloaded = 'slmops_reloads_total{result="switched"} 1.0'
    while reloaded not in httpx.get(f"{supervised.url}/metrics").text and time.monotonic() < deadline:
        time.sleep(0.05)
    assert reloaded in httpx.get(f"{supervised.url}/metrics").text
    assert supervised.child == child
    supervised.process.terminate()
    assert supervised.process.wait(30) == 0
    assert not Path(f"/proc/{child}").exists()


def test_a_wrong_configuration_is_not_tried_for_ever(tmp_path: Path) -> None:
    command = [*MODULE, "serve", str(tmp_path), "--port", "0", "--supervise"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 1
    assert ran.stderr.count("holds no model") == 1


def test_pauses_double_and_begin_again() -> None:
    pauses = [FIRST_PAUSE_S]
    for _ in range(10):
        pauses.append(next_pause_s(pauses[-1], lived_s=0.1))
    assert pauses[:3] == [0.1, 0.2, 0.4]
    assert pauses[-1] == LONGEST_PAUSE_S
    assert next_pause_s(LONGEST_PAUSE_S, SETTLED_S) == FIRST_PAUSE_S
    assert gives_up(2, 0.5)
    assert not gives_up(2, SETTLED_S)
    assert not gives_up(-9, 0.5)


def test_systemds_socket_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert inherited_socket() is None
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        monkeypatch.setattr("slmops.serve.supervise.SYSTEMD_FIRST_FD", os.dup(listening.fileno()))
        found = inherited_socket()
        assert found is not None
        with found:
            assert found.getsockname() == listening.getsockname()
        monkeypatch.setenv("LISTEN_PID", "1")
        assert inherited_socket() is None
