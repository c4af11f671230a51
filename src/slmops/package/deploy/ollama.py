"""Ollama with the bundle's GGUF file, by its own command line and its own server.

Where Ollama is not installed, a folder with all that ``ollama create`` needs is written all the same.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from slmops.errors import ModelError, PrivacyError, ServeError, StorageError
from slmops.package.deploy.llamacpp import gguf_of

NAME = "Ollama"
HOST_VARIABLE = "OLLAMA_HOST"
DEFAULT_HOST = "127.0.0.1:11434"
DEFAULT_PORT = 11434
COMMAND_LIMIT_S = 600.0
NEEDED = ("model.gguf", "Modelfile")
NOTES = ("Its server asks for no key: whoever reaches its address can ask it, and change its models.",)
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class OllamaTarget:
    """A :class:`~slmops.package.deploy.target.Target`. ``pid`` is 0: the server is not ours."""

    url: str
    version: str
    model_id: str
    models: Sequence[str]
    name: str = NAME
    pid: int = 0
    notes: Sequence[str] = NOTES

    @property
    def base_url(self) -> str:
        return f"{self.url}/v1"


def write_for_ollama(folder: Path, out: Path) -> Path:
    """Copy what ``ollama create`` needs to ``out`` (as hard links where the disk allows it); the Modelfile's path.

    Raises:
        ModelError: no GGUF in the model folder, or no Modelfile beside it.
        StorageError: the disk would not take it.
    """
    gguf_of(folder)
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {' and '.join(missing)}.", remedy="Export it again with the format gguf.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in NEEDED:
            (out / name).unlink(missing_ok=True)
        link_tree_of(folder, out, NEEDED)
    except OSError as error:
        raise StorageError.from_os_error(error, "write", out) from None
    return out / "Modelfile"


def link_tree_of(folder: Path, out: Path, names: Sequence[str]) -> None:
    """The named files of ``folder`` again in ``out``."""
    for name in names:
        try:
            os.link(folder / name, out / name)
        except OSError:
            shutil.copyfile(folder / name, out / name)


def find_ollama() -> Path | None:
    """Ollama's program, where it is installed."""
    found = shutil.which("ollama")
    return Path(found) if found else None


def create_in_ollama(
    modelfile: Path, name: str, *, program: Path, environment: Mapping[str, str] = os.environ
) -> OllamaTarget:
    """Register the Modelfile's model under ``name``, and look it up in Ollama's list.

    Raises:
        PrivacyError: Ollama's server is not on this machine: the bundle would leave it.
        ServeError: Ollama refuses, or its server is not running.
    """
    url = server_url(environment.get(HOST_VARIABLE) or DEFAULT_HOST)
    _run(program, ["create", name, "-f", str(modelfile)], environment, cwd=modelfile.parent)
    listed = _run(program, ["list"], environment, cwd=modelfile.parent)
    models = [line.split()[0] for line in listed.splitlines()[1:] if line.split()]
    model_id = name if ":" in name else f"{name}:latest"
    return OllamaTarget(url, _version(url), model_id, models)


def server_url(host: str) -> str:
    """Ollama's server, as ``OLLAMA_HOST`` names it.

    Raises:
        PrivacyError: it is on another machine.
    """
    parts = urlsplit(host if "://" in host else f"http://{host}")
    name = parts.hostname or "127.0.0.1"
    if name == "0.0.0.0":  # what a server binds to; a client finds it here
        name = "127.0.0.1"
    if name not in ("localhost", "::1") and not name.startswith("127."):
        raise PrivacyError(
            f"{HOST_VARIABLE} is {host}: the bundle would leave this machine.",
            remedy=f"Unset {HOST_VARIABLE}, or run slmops deploy ollama on that machine.",
        )
    shown = f"[{name}]" if ":" in name else name
    return f"{parts.scheme}://{shown}:{parts.port or DEFAULT_PORT}"


def _version(url: str) -> str:
    try:
        with _NO_PROXY.open(f"{url}/api/version", timeout=10) as reply:
            return str(json.load(reply)["version"])
    except (OSError, ValueError, KeyError) as error:
        raise ServeError(
            f"Ollama's server at {url} does not answer: {error}.", remedy="Start it: ollama serve."
        ) from None


def _run(program: Path, arguments: Sequence[str], environment: Mapping[str, str], *, cwd: Path) -> str:
    try:
        ran = subprocess.run(
            [str(program), *arguments],
            capture_output=True,
            text=True,
            timeout=COMMAND_LIMIT_S,
            env={**environment, "DO_NOT_TRACK": "1"},
            cwd=cwd,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ServeError(f"ollama {arguments[0]} did not end within {COMMAND_LIMIT_S:.0f} s.") from None
    if ran.returncode != 0:
        said = (ran.stderr.strip() or ran.stdout.strip() or "it said nothing").splitlines()[-1]
        raise ServeError(
            f"ollama {arguments[0]} ended with exit code {ran.returncode}: {said}",
            remedy="Its server must be running: ollama serve.",
        )
    return ran.stdout
