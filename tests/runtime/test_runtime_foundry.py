"""Foundry Local for real: registered, asked, killed, hung; and nothing sent. Skipped where its SDK is not installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.tiny_models import write_tiny_classifier, write_tiny_generator, write_tiny_llama
from skipping import skip_or_fail
from slmops.artifacts import Message
from slmops.errors import ModelError, UsageError
from slmops.runtime import foundry
from slmops.runtime.foundry import LOCAL_CATALOG, FoundryServer, find_foundry, model_id, quiet_environment

FAKE_CHILD = """
import json, sys
asked = json.loads(sys.stdin.readline())
told = json.loads('%s')
print(json.dumps(told), flush=True)
%s
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("foundry") / "model"
    write_tiny_llama(checkpoint)
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.fixture(scope="module")
def python() -> Path:
    try:
        return find_foundry()
    except UsageError:
        skip_or_fail("foundry-local-sdk in an environment of its own (slmops deploy foundry --install)")
        raise


@pytest.fixture(scope="module")
def server(folder: Path, python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FoundryServer]:
    with FoundryServer.start(folder, name="tiny chat", data=tmp_path_factory.mktemp("data")) as server:
        yield server


def ask(server: FoundryServer) -> str:
    body = {
        "model": server.model_id,
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 8,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{server.base_url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as reply:
        text: str = json.load(reply)["choices"][0]["message"]["content"]
        return text


def until_replaced(server: FoundryServer, pid: int, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while server.pid in (pid, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
    server.wait_until_up()


# The real one


def test_a_model_is_registered_in_the_local_catalog_and_answers(server: FoundryServer, folder: Path) -> None:
    from slmops.runtime.base import GenerationRequest
    from slmops.runtime.genai import GenaiGenerator

    assert server.base_url.startswith("http://127.0.0.1:")
    assert server.base_url.endswith(LOCAL_CATALOG)
    assert server.models == ("tiny-chat:1",)
    (ours,) = GenaiGenerator.load(folder, threads=1).generate(
        [GenerationRequest((Message("user", "hello"),), max_tokens=8)]
    )
    assert ask(server) == ours.text


def test_a_killed_one_is_started_again_on_its_address(server: FoundryServer) -> None:
    url, pid, restarts = server.base_url, server.pid, server.restarts
    os.kill(pid, signal.SIGKILL)
    until_replaced(server, pid)
    assert server.base_url == url
    assert server.restarts == restarts + 1
    assert ask(server)


def test_a_hung_one_is_started_again(server: FoundryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundry, "PROBE_EVERY_S", 0.2)
    monkeypatch.setattr(foundry, "PROBE_LIMIT_S", 1.0)
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    until_replaced(server, pid)
    assert ask(server)


def test_nothing_is_connected_to_but_loopback(folder: Path, python: Path, tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        skip_or_fail("strace")
    trace = tmp_path / "trace"
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {strace} -f -qq -e trace=connect,sendto,sendmsg -o {trace} {python} "$@"\n')
    wrapper.chmod(0o755)
    with FoundryServer.start(folder, data=tmp_path / "data", python=wrapper) as traced:
        assert ask(traced)
        time.sleep(1)
    lines = [line for line in trace.read_text("utf-8", "replace").splitlines() if "AF_INET" in line]
    assert [line for line in lines if "127.0.0.1" not in line and '"::1"' not in line] == []


def test_it_ends_with_whoever_started_it(folder: Path, python: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from slmops.runtime.foundry import FoundryServer\n"
        f"server = FoundryServer.start(Path({str(folder)!r}), data=Path({str(tmp_path)!r}))\n"
        "print(server.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_damaged_model_is_told(folder: Path, python: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/genai_config.json").write_text("{")
    with pytest.raises(ModelError, match="Foundry Local cannot serve"):
        FoundryServer.start(tmp_path / "model", data=tmp_path / "data")


# What needs no SDK


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], then: str) -> None:
    script = tmp_path / "child.py"
    script.write_text(FAKE_CHILD % (json.dumps(told), then))
    monkeypatch.setattr(foundry, "CHILD", script)


def test_one_that_dies_too_often_is_given_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"url": "http://127.0.0.1:9", "id": "x:1", "version": "0", "models": ["x:1"]}
    fake(tmp_path, monkeypatch, told, "sys.exit(3)")
    server = FoundryServer.start(folder, data=tmp_path, python=Path(sys.executable))
    with server, pytest.raises(ModelError, match="ended 6 times within 60 s"):
        server.wait_until_up(30)
    with pytest.raises(ModelError, match="ended 6 times"):
        _ = server.base_url


def test_what_the_child_says_is_the_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, monkeypatch, {"error": "no such thing"}, "")
    with pytest.raises(ModelError, match="no such thing"):
        FoundryServer.start(folder, data=tmp_path, python=Path(sys.executable))
    (tmp_path / "child.py").write_text("raise SystemExit('it went wrong')")
    with pytest.raises(ModelError, match="it went wrong"):
        FoundryServer.start(folder, data=tmp_path, python=Path(sys.executable))


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path)
    with pytest.raises(ModelError, match="classifier for onnx"):
        FoundryServer.start(tmp_path)


def test_without_the_sdk_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foundry, "environment_folder", lambda: tmp_path)
    monkeypatch.delenv(foundry.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="slmops deploy foundry --install"):
        find_foundry()
    monkeypatch.setenv(foundry.PYTHON_VARIABLE, "/nowhere/python")
    with pytest.raises(UsageError, match="/nowhere/python, where no program is"):
        find_foundry()


def test_the_environment_is_quiet_and_tells_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    environment = quiet_environment(tmp_path)
    assert environment["CI"] == "true"
    assert environment["ORT_TELEMETRY_DISABLED"] == "1"
    assert environment["https_proxy"] == "http://127.0.0.1:9"
    assert environment["HOME"] == str(tmp_path)
    assert "secret" not in environment.values()


@pytest.mark.parametrize(
    ("name", "expected"), [("a", "a:1"), ("my model/7", "my-model-7:1"), ("ü", "model:1"), ("a:b", "a-b:1")]
)
def test_names_are_made_to_fit(name: str, expected: str) -> None:
    assert model_id(name) == expected
