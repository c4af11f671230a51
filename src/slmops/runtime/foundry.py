"""Microsoft's Foundry Local as a supervised child process, serving one model folder on the loopback interface.

Guarantees: the model is registered in Foundry Local's *local* catalog and loaded before :meth:`FoundryServer.start`
returns; a process that dies, or that no longer answers (``POST /shutdown`` hangs it), is replaced, on the same port
where that is still free, until it has failed :data:`MAX_RESTARTS` times within :data:`RESTART_WINDOW_S`; the child ends
when this process does, however that ends. Nothing is sent: see :data:`REMAINS`.
Not covered: authentication. Foundry Local's web service has none, so every program of this machine can ask it, and stop
it; it is bound to loopback, and belongs behind our own server.

The SDK demands one exact version of onnxruntime, which is seldom ours. It therefore runs under an interpreter of its
own (:func:`find_foundry`), with the script ``foundry_child.py``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from slmops.errors import ModelError, UsageError
from slmops.runtime.description import ModelDescription

log = logging.getLogger(__name__)

PYTHON_VARIABLE = "SLMOPS_FOUNDRY_PYTHON"
ENVIRONMENT = "foundry"
"""Folder of the environment below the one that slmops runs in."""
REQUIREMENT = "foundry-local-sdk==2.2.1"
"""What was tested."""
CHILD = Path(__file__).with_name("foundry_child.py")
LOCAL_CATALOG = "/catalogs/local/v1"
START_LIMIT_S = 120.0
STOP_LIMIT_S = 10.0
LOOK_EVERY_S = 0.1
PROBE_EVERY_S = 5.0
PROBE_LIMIT_S = 10.0
DEAF_PROBES = 3
"""So many probes without an answer, one after the other, and the process is taken for hung."""
MAX_RESTARTS, RESTART_WINDOW_S = 5, 60.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

REMAINS = (
    "Foundry Local's uploads are off: its own switch leaves one event with facts of this machine, so it is also told "
    "that it runs in CI, where it uploads nothing; its cloud catalog and every proxy lead nowhere.",
    "It still notes usage events, without texts, in its log folder on this machine when its log level is raised.",
    "Its web service asks for no key and takes POST /shutdown from anybody on this machine: keep it on loopback.",
)
"""What a person has to know of it."""


def environment_folder() -> Path:
    """Where ``slmops deploy foundry --install`` makes the environment."""
    return Path(sys.prefix) / ENVIRONMENT


def find_foundry() -> Path:
    """The interpreter that has ``foundry-local-sdk``: the one that ``SLMOPS_FOUNDRY_PYTHON`` names, this one, or that
    of :func:`environment_folder`.

    Raises:
        UsageError: there is none.
    """
    named = os.environ.get(PYTHON_VARIABLE)
    if named:
        if not Path(named).is_file():
            raise UsageError(f"{PYTHON_VARIABLE} is {named}, where no program is.", remedy="Name a Python interpreter.")
        return Path(named)
    if importlib.util.find_spec("foundry_local_sdk") is not None:
        return Path(sys.executable)
    own = environment_folder() / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if own.is_file():
        return own
    raise UsageError(
        "Foundry Local is not installed.",
        remedy="slmops deploy foundry --install makes an environment of its own for it; or name the interpreter that "
        f"has foundry-local-sdk in {PYTHON_VARIABLE}.",
    )


def foundry_version() -> str | None:
    """Of the SDK in :func:`find_foundry`'s interpreter; None where it is not installed."""
    asked = "from importlib.metadata import version; print(version('foundry-local-sdk'))"
    try:
        told = subprocess.run(
            [str(find_foundry()), "-I", "-c", asked], capture_output=True, text=True, timeout=START_LIMIT_S, check=True
        )
    except (UsageError, OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()


def quiet_environment(data: Path) -> dict[str, str]:
    """The child's whole environment: telemetry off by every switch there is, home within ``data``, nothing inherited
    that could carry a secret or a way out."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "SYSTEMROOT", "TMPDIR") if name in os.environ}
    nowhere = "http://127.0.0.1:9"
    return {
        **kept,
        "HOME": str(data),
        "CI": "true",
        "ORT_TELEMETRY_DISABLED": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"), nowhere),
        "no_proxy": "127.0.0.1,localhost",
    }


def model_id(name: str) -> str:
    """Foundry Local's form, ``name:version``, with what it takes in a name."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
    return f"{plain}:1"


class FoundryServer:
    """See the module. Use :meth:`start`, as a context manager or with :meth:`close`."""

    def __init__(self, python: Path, folder: Path, name: str, data: Path | None, port: int) -> None:
        self.folder, self.name = folder, name
        self._own_data = (
            None if data else tempfile.TemporaryDirectory(prefix="slmops-foundry-", ignore_cleanup_errors=True)
        )
        self.data = (data or Path(self._own_data.name if self._own_data else ".")).resolve()
        self.data.mkdir(parents=True, exist_ok=True)
        self.restarts = 0
        self._python, self._port = python, port
        self._lock = threading.Condition()
        self._process: subprocess.Popen[str] | None = None
        self._told: Mapping[str, Any] = {}
        self._failure: ModelError | None = None
        self._closing = threading.Event()
        self._deaths: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._watcher = threading.Thread(target=self._watch, name="foundry", daemon=True)

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        name: str | None = None,
        data: Path | None = None,
        port: int = 0,
        python: Path | None = None,
    ) -> Self:
        """Register and load the model folder (``onnx-genai``), and serve it.

        ``name``  what callers name the model, without Foundry's version
        ``data``  where Foundry Local keeps catalog, log and home; None: a folder that goes with this process

        Raises:
            UsageError: Foundry Local is not installed.
            ModelNotFoundError: not a model folder.
            ModelError: the folder holds another kind of model, or Foundry Local cannot serve it.
        """
        description = ModelDescription.read(folder)
        if (description.runtime, description.form) != ("onnx-genai", "generator"):
            raise ModelError(
                f"{folder} holds a {description.form} for {description.runtime}; Foundry Local runs generators for "
                "onnx-genai alone.",
                remedy="Name a bundle of an open task in the format onnx.",
            )
        interpreter = python or find_foundry()
        server = cls(interpreter, folder.resolve(), name or description.name or folder.name, data, port)
        try:
            server._begin()
        except BaseException:
            server.close()
            raise
        server._watcher.start()
        return server

    @property
    def base_url(self) -> str:
        """Where OpenAI's paths are, ``http://127.0.0.1:PORT/catalogs/local/v1``. Read it anew for each request: a
        restart may move it.

        Raises:
            ModelError: it died too often.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            return f"{self._told['url']}{LOCAL_CATALOG}"

    @property
    def model_id(self) -> str:
        """What Foundry Local names the model."""
        return model_id(self.name)

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the local catalog."""
        return tuple(self._told["models"])

    @property
    def version(self) -> str:
        return str(self._told["version"])

    @property
    def pid(self) -> int:
        """Of the process at work; 0 between two."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def wait_until_up(self, limit_s: float = START_LIMIT_S) -> None:
        """Wait for a restart to end.

        Raises:
            ModelError: it did not come back.
        """
        deadline = time.monotonic() + limit_s
        while self._failure is None and time.monotonic() < deadline:
            if self.pid and self._answers():
                return
            time.sleep(0.05)
        raise self._failure or ModelError(f"Foundry Local did not come back within {limit_s:.0f} s.")

    def close(self) -> None:
        """End the process, gently first."""
        self._closing.set()
        if self._watcher.is_alive() and self._watcher is not threading.current_thread():
            self._watcher.join(START_LIMIT_S + STOP_LIMIT_S)
        self._end()
        if self._own_data is not None:
            self._own_data.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self) -> None:
        said = (self.data / "foundry.stderr").open("wb")
        with said:
            process = subprocess.Popen(
                [str(self._python), "-I", str(CHILD)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=self.data,
                env=quiet_environment(self.data),
            )
        self._process = process
        asked = {
            "model": str(self.folder),
            "id": self.model_id,
            "name": self.name,
            "data": str(self.data),
            "port": self._port,
        }
        told = self._first_line(process, json.dumps(asked))
        if "error" in told:
            self._end()
            raise ModelError(
                f"Foundry Local cannot serve {self.folder}: {told['error']}", remedy=f"Its log is in {self.data}/logs."
            )
        with self._lock:
            self._told = told
        self._port = int(told["url"].rsplit(":", 1)[1])

    def _first_line(self, process: subprocess.Popen[str], asked: str) -> Mapping[str, Any]:
        """What the child tells; a silent one is killed in time."""
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
        if line:
            told: Mapping[str, Any] = json.loads(line)
            return told
        process.wait()
        lines = (self.data / "foundry.stderr").read_text("utf-8", "replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"its process ended with exit code {process.returncode}"}

    def _watch(self) -> None:
        deaf, probed_s = 0, time.monotonic()
        while self._failure is None and not self._closing.wait(LOOK_EVERY_S):
            process = self._process
            assert process is not None
            if process.poll() is None:
                if not deaf and time.monotonic() - probed_s < PROBE_EVERY_S:
                    continue
                deaf, probed_s = 0 if self._answers() else deaf + 1, time.monotonic()
                if deaf < DEAF_PROBES:
                    continue
                log.warning("Foundry Local does not answer: it is started again")
                process.kill()
                process.wait()
            deaf, probed_s = 0, time.monotonic()
            self._again(process.returncode)

    def _again(self, exit_code: int) -> None:
        now = time.monotonic()
        if len(self._deaths) == MAX_RESTARTS and now - self._deaths[0] < RESTART_WINDOW_S:
            self._fail(f"Foundry Local ended {MAX_RESTARTS + 1} times within {RESTART_WINDOW_S:.0f} s.")
            return
        self._deaths.append(now)
        log.warning("Foundry Local ended with exit code %d: it is started again", exit_code)
        try:
            self._begin()
        except ModelError as error:
            self._port = 0  # another program may have taken it
            log.warning("%s", error)
            try:
                self._begin()
            except ModelError as again:
                self._fail(again.message)
                return
        self.restarts += 1

    def _fail(self, why: str) -> None:
        log.error("%s", why)
        with self._lock:
            self._failure = ModelError(why, remedy=f"Its log is in {self.data}/logs.")

    def _answers(self) -> bool:
        """Whether the web service answers at all; it is asked for the local catalog alone, which needs no network."""
        try:
            with _NO_PROXY.open(f"{self._told['url']}{LOCAL_CATALOG}/models", timeout=PROBE_LIMIT_S) as reply:
                return bool(reply.status == 200)
        except (OSError, ValueError):
            return False

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
