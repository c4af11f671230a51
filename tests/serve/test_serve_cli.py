"""The verbs serve, chat and verify, as a person calls them."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.tiny_models import LABELS, write_tiny_classifier, write_tiny_generator, write_tiny_llama
from slmops.artifacts import Variant, drafting
from slmops.runtime import open_classifier

SLMOPS = [sys.executable, "-c", "from slmops.cli import main; main()"]


def slmops(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    given: dict[str, Any] = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    return subprocess.run([*SLMOPS, *map(str, arguments)], capture_output=True, text=True, timeout=120, **given)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Variant:
    path = tmp_path_factory.mktemp("labels") / "variant"
    with drafting("variant", path) as draft:
        write_tiny_classifier(draft.path / "model")
    return Variant.open(path)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("talker") / "model"
    write_tiny_llama(checkpoint)
    write_tiny_generator(folder, checkpoint)
    return folder


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    with drafting("variant", tmp_path / "variant") as draft:
        write_tiny_classifier(draft.path / "model")
    path = tmp_path / "variant/model/tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b'"refund"', b'"refunt"').replace(b"\n", b" ", 1))
    return tmp_path / "variant"


class Served:
    """``slmops serve`` as a child process that has said it is ready."""

    def __init__(self, arguments: Sequence[object]) -> None:
        command = [*SLMOPS, "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.first_line = self.process.stdout.readline()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def test_serve_says_where_answers_and_ends_cleanly_on_sigterm(labels: Variant) -> None:
    with Served([labels.path, "--port", 0, "--json"]) as served:
        ready = json.loads(served.first_line)
        assert ready == {"url": ready["url"], "model": "tiny-intents", "form": "classifier", "digest": labels.digest}
        assert ready["url"].startswith("http://127.0.0.1:")
        (row,) = httpx.post(f"{ready['url']}/v1/classify", json={"input": "my card is lost"}).json()
        expected = open_classifier(labels.model_path).probabilities(["my card is lost"])[0]
        assert row["label"] == LABELS[int(expected.argmax())]
        code, _, err = served.end()
    assert (code, err) == (0, "")


def test_serve_prints_an_example_that_works(talker: Path) -> None:
    with Served([talker, "--port", 0, "--name", "it's mine"]) as served:
        assert served.process.stdout is not None
        served.process.stdout.readline()
        example = served.process.stdout.readline().strip()
        assert "it's mine" in served.first_line
        assert example.startswith("curl http://127.0.0.1:")
        answer = subprocess.run(["/bin/sh", "-c", f"{example} --silent --max-time 60"], capture_output=True, check=True)
        assert json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_serve_says_which_engine_it_took(talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLMOPS_CACHE", str(tmp_path))
    with Served([talker, "--port", 0, "--json", "--engine", "onnx-genai"]) as served:
        assert json.loads(served.first_line)["engine"] == "onnx-genai"
    with Served([talker, "--port", 0, "--clients", 2, "--threads", 1]) as served:
        assert served.first_line.startswith("Serving tiny-chat")
        _, _, err = served.end()
    assert "Engine: onnx-" in err
    assert "tokens/s for 2 callers and for one: onnx-" in err


def test_serve_refuses_engines_and_servers_that_cannot_be(talker: Path) -> None:
    ran = slmops("serve", talker, "--port", 0, "--engine", "fast")
    assert ran.returncode == 2
    assert "no engine named 'fast'" in ran.stderr
    ran = slmops("serve", talker, "--port", 0, "--engine", "llama.cpp")
    assert ran.returncode == 2
    assert "made for onnx-genai" in ran.stderr
    assert "--upstream" in slmops("serve", "openai:large", "--port", 0).stderr
    ran = slmops("serve", "openai:large", "--upstream", "https://models.example/v1", "--port", 0)
    assert ran.returncode == 1
    assert "another machine" in ran.stderr
    assert "--privacy remote" in ran.stderr
    ran = slmops("serve", talker, "--teacher", "openai:large", "--teacher-url", "https://models.example/v1")
    assert "another machine" in ran.stderr


def test_serve_in_front_of_another_server(talker: Path) -> None:
    with Served([talker, "--port", 0, "--json", "--engine", "onnx-batch"]) as below:
        url = json.loads(below.first_line)["url"]
        with Served(["openai:tiny-chat", "--upstream", f"{url}/v1", "--port", 0, "--json"]) as above:
            ready = json.loads(above.first_line)
            assert (ready["model"], ready["engine"]) == ("tiny-chat", "upstream")
            body = {"model": "tiny-chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
            both = [httpx.post(f"{one}/v1/chat/completions", json=body).json() for one in (url, ready["url"])]
        assert both[0]["choices"] == both[1]["choices"]


def test_serve_refuses_a_damaged_bundle_and_a_port_in_use(labels: Variant, damaged: Path) -> None:
    ran = slmops("serve", damaged, "--port", 0)
    assert ran.returncode == 1
    assert "tokenizer.json has changed" in ran.stderr
    with socket.create_server(("127.0.0.1", 0)) as other:
        ran = slmops("serve", labels.path, "--port", other.getsockname()[1])
    assert ran.returncode == 1
    assert "Address already in use" in ran.stderr
    assert "--port" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_serve_without_its_libraries_names_the_extra(labels: Variant) -> None:
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'fastapi' else real(name, *a)\n"
        "from slmops.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code, "serve", str(labels.path)], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "slmops[serve]" in ran.stderr


def test_chat_answers_a_prompt_and_a_pipe(labels: Variant, talker: Path) -> None:
    expected = open_classifier(labels.model_path).probabilities(["my card is lost"])[0]
    ran = slmops("chat", labels.path, "--prompt", "my card is lost", "--json")
    answer = json.loads(ran.stdout)
    assert answer["label"] == LABELS[int(expected.argmax())]
    assert answer["confidence"] == pytest.approx(float(expected.max()), abs=1e-6)
    bars = slmops("chat", labels.model_path, stdin="my card is lost\n").stdout.splitlines()
    assert len(bars) == 5
    assert bars[0].startswith(answer["label"])
    assert "█" in bars[0]
    told = json.loads(slmops("chat", talker, "--prompt", "hello", "--max-tokens", 5, "--json").stdout)
    assert told["completion_tokens"] <= 5
    assert slmops("chat", talker, "--prompt", "hello", "--max-tokens", 5).stdout == told["text"] + "\n"


def test_chat_refuses_nothing_and_damage(labels: Variant, damaged: Path) -> None:
    assert "empty" in slmops("chat", labels.path, stdin="").stderr
    assert slmops("chat", labels.path, "--prompt", " ").returncode == 2
    ran = slmops("chat", damaged, "--prompt", "x")
    assert ran.returncode == 1
    assert "has changed" in ran.stderr
    assert slmops("chat", damaged / "nowhere", "--prompt", "x").returncode == 1


def test_verify_says_yes_or_names_what_is_wrong(labels: Variant, damaged: Path) -> None:
    ran = slmops("verify", labels.path)
    assert ran.returncode == 0
    assert "is whole and its model answers" in ran.stdout
    assert json.loads(slmops("verify", labels.path, "--json").stdout)["ok"] is True
    ran = slmops("verify", damaged)
    assert ran.returncode == 1
    assert "tokenizer.json has changed" in ran.stderr
    ran = slmops("verify", damaged, "--json")
    assert ran.returncode == 1
    assert "tokenizer.json" in json.loads(ran.stdout)["problems"][0]
    assert slmops("verify", labels.model_path.parent.parent).returncode == 1
