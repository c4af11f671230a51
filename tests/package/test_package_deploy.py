"""A bundle in other runtimes: Foundry Local and llama.cpp for real, Ollama's real command line against a named fake."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fakes.ollama import FakeOllama
from fakes.tiny_models import write_tiny_classifier, write_tiny_generator, write_tiny_llama
from skipping import skip_or_fail
from slmops.artifacts import Variant, drafting
from slmops.cli.app import app
from slmops.errors import ModelError, PrivacyError, ServeError, StorageError, UsageError
from slmops.package.deploy import ollama as ollama_module
from slmops.package.deploy import try_out
from slmops.package.deploy.foundry import install_foundry
from slmops.package.deploy.llamacpp import gguf_of, llamacpp
from slmops.package.deploy.ollama import create_in_ollama, server_url, write_for_ollama
from slmops.runtime.foundry import find_foundry

QUICK = ["--requests", "1", "--max-tokens", "4", "--json"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder)
    return folder


@pytest.fixture(scope="module")
def gguf(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    from slmops.compress.gguf_export import export_gguf

    path = tmp_path_factory.mktemp("gguf") / "variant"
    with drafting("variant", path) as draft:
        export_gguf(checkpoint, draft, quantization="q8_0", name="tiny")
    return Variant.open(path)


@pytest.fixture(scope="module")
def onnx(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Variant:
    path = tmp_path_factory.mktemp("onnx") / "variant"
    with drafting("variant", path) as draft:
        write_tiny_generator(draft.path / "model", checkpoint)
    return Variant.open(path)


@pytest.fixture
def fake_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOllama]:
    (tmp_path / "bin").mkdir()
    with FakeOllama(tmp_path / "bin") as fake:
        monkeypatch.setenv("PATH", f"{fake.folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("OLLAMA_HOST", fake.host)
        yield fake


def deployed(*arguments: object) -> dict[str, Any]:
    ran = CliRunner().invoke(app, ["deploy", *map(str, arguments)], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


# Foundry Local


def test_foundry_registers_lists_runs_and_measures(onnx: Variant, tmp_path: Path) -> None:
    try:
        find_foundry()
    except UsageError:
        skip_or_fail("foundry-local-sdk in an environment of its own (slmops deploy foundry --install)")
    found = deployed("foundry", onnx.path, "--data", tmp_path, "--name", "tiny", *QUICK)
    assert (found["target"], found["model"]) == ("Foundry Local", "tiny:1")
    assert found["models"] == ["tiny:1"]
    assert found["answer"]
    assert found["tokens_per_s"] > 0
    assert set(found["together_tokens_per_s"]) == {"1", "4"}
    assert found["memory_bytes_peak"] > 10e6
    assert any("uploads are off" in note for note in found["notes"])
    again = deployed("foundry", onnx.path, "--data", tmp_path, "--name", "other", *QUICK)
    assert again["models"] == ["other:1", "tiny:1"]  # registrations are kept
    assert deployed("foundry", onnx.path, "--data", tmp_path, "--name", "tiny", *QUICK)["model"] == "tiny:1"


def test_an_environment_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slmops.package.deploy.foundry.REQUIREMENT", "no such requirement !")
    with pytest.raises(ServeError, match="cannot be installed"):
        install_foundry(tmp_path / "environment")


def test_foundry_without_a_bundle_is_wrong_use() -> None:
    ran = CliRunner().invoke(app, ["deploy", "foundry"])
    assert isinstance(ran.exception, UsageError)


# llama.cpp


def test_llamacpp_runs_and_measures(gguf: Variant) -> None:
    found = deployed("llamacpp", gguf.path, "--threads", 1, *QUICK)
    assert (found["target"], found["model"], found["models"]) == ("llama.cpp", "tiny", ["tiny"])
    assert found["answer"]
    assert found["ttft_ms"]["p50"] <= found["latency_ms"]["p50"]
    assert found["memory_bytes_peak"] > 10e6


def test_keep_serves_until_it_is_told_to_end(gguf: Variant) -> None:
    slmops = [sys.executable, "-c", "from slmops.cli import main; main()"]
    command = [*slmops, "deploy", "llamacpp", str(gguf.path), "--threads", "1", "--keep", *QUICK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        assert process.stderr is not None
        while "serves tiny at" not in process.stderr.readline():
            pass
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{found['base_url']}/models", timeout=5)


def test_another_format_is_refused_with_the_remedy(onnx: Variant) -> None:
    with pytest.raises(ModelError, match=r"onnx-genai, and this needs a GGUF file.*compress\.formats"):
        gguf_of(onnx.model_path)


def test_a_damaged_gguf_is_refused(gguf: Variant, tmp_path: Path) -> None:
    shutil.copytree(gguf.model_path, tmp_path / "model")
    (tmp_path / "model/model.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises((ModelError, ServeError), match=r"cannot serve|ended"), llamacpp(tmp_path / "model", threads=1):
        pass


# Ollama


def test_ollama_creates_lists_runs_and_measures(gguf: Variant, fake_ollama: FakeOllama, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = deployed("ollama", gguf.path, "--out", out, "--name", "tiny", *QUICK)
    assert (found["model"], found["models"]) == ("tiny:latest", ["tiny:latest"])
    assert found["answer"] == "one two"
    assert found["version"] == "0.99.0-fake"
    assert fake_ollama.models == ["tiny:latest"]
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    assert "TEMPLATE" in text
    deployed("ollama", gguf.path, "--out", out, "--name", "tiny:v2", *QUICK)
    assert fake_ollama.models == ["tiny:latest", "tiny:v2"]


def test_without_ollama_the_folder_is_written_and_the_command_shown(
    gguf: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = deployed("ollama", gguf.path, "--out", tmp_path / "out", "--json")
    assert found["installed"] is False
    assert found["command"] == f"ollama create tiny -f {tmp_path / 'out/Modelfile'}"
    assert (tmp_path / "out/model.gguf").read_bytes()[:4] == b"GGUF"
    ran = CliRunner().invoke(app, ["deploy", "ollama", str(gguf.path), "--out", str(tmp_path / "out")])
    assert "Ollama is not on this machine" in ran.output


def test_an_ollama_that_refuses_is_quoted(
    gguf: Variant, fake_ollama: FakeOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modelfile = write_for_ollama(gguf.model_path, tmp_path / "out")
    monkeypatch.setenv("OLLAMA_FAKE", "down")
    with pytest.raises(ServeError, match="could not connect to ollama server"):
        create_in_ollama(modelfile, "tiny", program=fake_ollama.folder / "ollama")
    monkeypatch.delenv("OLLAMA_FAKE")
    (tmp_path / "out/model.gguf").unlink()
    with pytest.raises(ServeError, match="invalid model source"):
        create_in_ollama(modelfile, "tiny", program=fake_ollama.folder / "ollama")


def test_a_model_that_is_not_listed_is_an_error(gguf: Variant, fake_ollama: FakeOllama, tmp_path: Path) -> None:
    modelfile = write_for_ollama(gguf.model_path, tmp_path / "out")
    target = create_in_ollama(modelfile, "tiny", program=fake_ollama.folder / "ollama")
    fake_ollama.state.write_text("[]")
    with pytest.raises(ServeError, match="refused the question with 404"):
        try_out(target, requests=1, max_tokens=2)


@pytest.mark.parametrize("host", ["example.org", "http://10.0.0.7:11434", "ollama.internal:80"])
def test_a_bundle_does_not_leave_this_machine(host: str) -> None:
    with pytest.raises(PrivacyError, match="would leave this machine"):
        server_url(host)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1:11434", "http://127.0.0.1:11434"),
        ("localhost", "http://localhost:11434"),
        ("0.0.0.0:9", "http://127.0.0.1:9"),
        ("[::1]:8", "http://[::1]:8"),
    ],
)
def test_ollamas_address(host: str, url: str) -> None:
    assert server_url(host) == url


def test_a_full_disk_is_told(gguf: Variant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ollama_module, "link_tree_of", full)
    with pytest.raises(StorageError, match="No space left"):
        write_for_ollama(gguf.model_path, tmp_path / "out")


def test_a_classifier_has_no_place_in_any_of_them(tmp_path: Path) -> None:
    write_tiny_classifier(tmp_path)
    for verb in ("foundry", "llamacpp", "ollama"):
        ran = CliRunner().invoke(app, ["deploy", verb, str(tmp_path)])
        assert isinstance(ran.exception, ModelError)
