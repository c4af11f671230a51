"""A bundle served for one question: ``slmops serve`` as a child process, asked over HTTP, stopped."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from slmops.errors import ServeError

START_LIMIT_S = 60.0


def ask_served(bundle: Path, question: str) -> dict[str, Any]:
    """Start ``slmops serve`` on a free loopback port, ask one question, stop it.

    Raises:
        ServeError: it did not start, or did not answer.
    """
    port = _free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "slmops", "serve", str(bundle), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        base = f"http://127.0.0.1:{port}"
        _wait_until_ready(f"{base}/health", server)
        body = {"model": "default", "messages": [{"role": "user", "content": question}]}
        body["model"] = json.loads(_get(f"{base}/v1/models"))["data"][0]["id"]
        request = Request(
            f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=60) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except OSError as error:  # no answer, half of one, or none in time
        raise ServeError(
            f"The server did not answer: {error}.", remedy=f"Try it alone: slmops serve {bundle}"
        ) from None
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait_until_ready(url: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            lines = (server.stderr.read() if server.stderr else "").strip().splitlines() or ["it said nothing."]
            said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
            raise ServeError(f"The server ended at once: {said}")
        try:
            _get(url)
        except (URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise ServeError(f"The server was not ready after {START_LIMIT_S:.0f} s.", remedy="Run slmops doctor.")


def _get(url: str) -> bytes:
    with urlopen(url, timeout=10) as response:
        content: bytes = response.read()
        return content


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
