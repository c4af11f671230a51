"""A teacher behind HTTP that behaves as told: quick, slow, overloaded, broken, or gone.

It speaks enough of HTTP/1.1 and of OpenAI's chat completions for the official client, over asyncio streams in a
thread of its own, so that it can also do what no well-meaning server would: hang, cut the line, promise more bytes
than it sends. A script decides each reply from the prompt and from how often that prompt was asked before; the server
counts what was asked and what was answered.

``python -m fakes.teacher_server PORT DELAY_S`` runs one in a process of its own, to measure against; it prints its port
and remembers nothing of what it was asked but the counts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Reply:
    """
    ``raw``       body bytes instead of a completion
    ``hang``      never answer
    ``cut``       close the connection without an answer
    ``truncate``  send half of the promised body, then close
    ``usage``     False: leave token counts out
    """

    text: str | None = "ok"
    finish_reason: str = "stop"
    delay_s: float = 0.0
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    hang: bool = False
    cut: bool = False
    truncate: bool = False
    usage: bool = True
    prompt_tokens: int = 20
    completion_tokens: int = 5


Script = Callable[[str, int], Reply]
"""(the last user message, how often it was asked before) -> reply."""


def too_many(retry_after: str | None = None) -> Reply:
    headers = {} if retry_after is None else {"Retry-After": retry_after}
    return Reply(status=429, headers=headers, raw=b'{"error": {"message": "slow down", "code": "rate_limit_exceeded"}}')


def broken(status: int = 500) -> Reply:
    return Reply(status=status, raw=b'{"error": {"message": "oops"}}')


def first(replies: list[Reply], then: Reply) -> Script:
    """Each prompt gets ``replies`` in turn, and ``then`` from there on."""
    return lambda prompt, before: replies[before] if before < len(replies) else then


class TeacherServer:
    """A context manager; :meth:`stop` and :meth:`start` again on the same port are allowed."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        port: int = 0,
        remembers: bool = True,
        refuses_format: bool = False,
        capacity: int | None = None,
    ) -> None:
        """``refuses_format``: 400 for a request with ``response_format``. ``capacity``: 429 beyond so many at once."""
        self.script: Script = script or (lambda prompt, before: Reply())
        self.port = port
        self.refuses_format = refuses_format
        self.capacity = capacity
        self._remembers = remembers
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.asked_at_s: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._connections: set[asyncio.StreamWriter] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping: asyncio.Event | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> TeacherServer:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, t: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(ready)), daemon=True)
        self._thread.start()
        assert ready.wait(10), "the fake teacher did not start"

    def stop(self) -> None:
        if self._thread is not None and self._loop is not None and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(10)
        self._thread = None

    async def _serve(self, ready: threading.Event) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=2048)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stopping.wait()
        server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))))
        prompt = body["messages"][-1]["content"]
        before = self.asked[prompt]
        self.asked[prompt] += 1
        if self._remembers:
            self.asked_at_s.append(asyncio.get_running_loop().time())
            self.bodies.append(body)
            self.headers.append(headers)
        reply = self.script(prompt, before)
        if self.refuses_format and "response_format" in body:
            reply = Reply(status=400, raw=b'{"error": {"message": "response_format is not available"}}')
        if self.capacity is not None and self._at_once >= self.capacity:
            reply = too_many()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if reply.hang:
                await asyncio.sleep(3600)
            if reply.delay_s:
                await asyncio.sleep(reply.delay_s)
        finally:
            self._at_once -= 1
        if reply.cut:
            return False
        content = reply.raw if reply.raw is not None else _completion(body["model"], reply)
        lines = [f"HTTP/1.1 {reply.status} X", "content-type: application/json", f"content-length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        sent = content[: len(content) // 2] if reply.truncate else content
        writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + sent)
        await writer.drain()
        if reply.status == 200 and not reply.truncate:
            self.answered[prompt] += 1
        return not reply.truncate


def _completion(model: str, reply: Reply) -> bytes:
    message = {"role": "assistant", "content": reply.text}
    completion: dict[str, Any] = {
        "id": "fake",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": reply.finish_reason}],
    }
    if reply.usage:
        total = reply.prompt_tokens + reply.completion_tokens
        completion["usage"] = {
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "total_tokens": total,
        }
    return json.dumps(completion).encode()


if __name__ == "__main__":
    wait_s = float(sys.argv[2])
    fake = TeacherServer(lambda prompt, before: Reply(delay_s=wait_s), port=int(sys.argv[1]), remembers=False)
    fake.start()
    sys.stdout.write(f"{fake.port}\n")
    sys.stdout.flush()
    threading.Event().wait()
