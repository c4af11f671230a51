"""Servers and bare engines as child processes, for benchmarks: started once, asked by turns, stopped."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.streaming import Load, load

ROOT = Path(__file__).resolve().parents[1]
CHAT = "/v1/chat/completions"


class Child(AbstractContextManager["Child"]):
    """A process that says one JSON object when it is ready, and then answers lines with lines."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, cwd=ROOT,
            env=None if environment is None else dict(environment),
        )  # fmt: skip
        self.told = self.read()

    def read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return told
        raise SystemExit(f"{' '.join(map(str, self._process.args))} ended; see {self._log.name}")  # type: ignore[arg-type]

    def ask(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def our_server(what: str, log: Path, *options: str) -> Child:
    """``slmops serve`` over ``what``."""
    return Child([sys.executable, "-m", "slmops", "serve", what, "--port", "0", "--json", *options], log)


def bare(kind: str, folder: Path, log: Path) -> Child:
    """One of the kinds of :mod:`benchmarks.bare_child`."""
    return Child([sys.executable, "-m", "benchmarks.bare_child", kind, str(folder)], log)


def ask_server(
    url: str, model: str, prompts: Sequence[Sequence[str]], tokens: int, *, path: str = CHAT, system: str | None = None
) -> Load:
    """As many callers as ``prompts`` has rows, streaming greedy answers."""
    before = [] if system is None else [{"role": "system", "content": system}]
    bodies = [
        [
            {
                "model": model,
                "messages": [*before, {"role": "user", "content": text}],
                "max_tokens": tokens,
                "temperature": 0,
            }
            for text in row
        ]
        for row in prompts
    ]
    return asyncio.run(load(url, path, bodies))
