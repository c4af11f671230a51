"""llama.cpp's own server with the bundle's GGUF file, through xllamacpp."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from slmops.errors import MissingExtraError, ModelError, ServeError
from slmops.runtime.description import ModelDescription

NAME = "llama.cpp"
GGUF_NAME = "model.gguf"
CHILD = "slmops.package.deploy.llamacpp_child"
START_LIMIT_S = 120.0
AT_ONCE = 4
NOTES = (
    "It listens on loopback and asks for no key: whoever is on this machine can ask it.",
    "Conversations are rendered by the template in the file; slmops serve renders them by ours.",
)
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class LlamacppTarget:
    """A :class:`~slmops.package.deploy.target.Target`."""

    url: str
    version: str
    model_id: str
    pid: int
    name: str = NAME
    notes: Sequence[str] = NOTES

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"

    @property
    def models(self) -> Sequence[str]:
        with _NO_PROXY.open(f"{self.base_url}/models", timeout=10) as reply:
            return [one["id"] for one in json.load(reply)["data"]]


def gguf_of(folder: Path) -> Path:
    """The GGUF file of a model folder.

    Raises:
        ModelNotFoundError: not a model folder.
        ModelError: it is in another format.
    """
    description = ModelDescription.read(folder)
    if description.runtime != "llama.cpp":
        raise ModelError(
            f"{folder} holds a {description.form} for {description.runtime}, and this needs a GGUF file.",
            remedy="Make one: compress.formats: [{format: gguf}] in the recipe, then slmops run.",
        )
    return folder / GGUF_NAME


@contextmanager
def llamacpp(
    folder: Path, *, name: str | None = None, port: int = 0, threads: int | None = None, at_once: int = AT_ONCE
) -> Iterator[LlamacppTarget]:
    """llama.cpp's server in a child process while the block runs.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        ModelError: no GGUF in the folder, or one that llama.cpp cannot open.
        ServeError: the server did not start in time.
    """
    file = gguf_of(folder)
    if find_spec("xllamacpp") is None:
        raise MissingExtraError("slmops deploy llamacpp", "llamacpp")
    description = ModelDescription.read(folder)
    alias = name or description.name or folder.name
    asked = {
        "model": str(file.resolve()),
        "alias": alias,
        "port": port,
        "threads": threads,
        "context_tokens": description.max_tokens,
        "at_once": at_once,
    }
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        try:
            told = _started(process, json.dumps(asked))
            if "error" in told:
                raise ModelError(f"llama.cpp cannot serve {file}: {told['error']}")
            yield LlamacppTarget(told["url"].rstrip("/"), told["version"], alias, process.pid)
        finally:
            _end(process)


def _started(process: subprocess.Popen[str], asked: str) -> dict[str, str]:
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(START_LIMIT_S, process.kill)
    timer.start()
    try:
        process.stdin.write(asked + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except OSError:
        line = ""
    finally:
        timer.cancel()
    if not line:
        raise ServeError(f"llama.cpp's server ended with exit code {process.wait()} before it was ready.")
    told: dict[str, str] = json.loads(line)
    return told


def _end(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
