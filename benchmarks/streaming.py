"""Callers that cost little, for benchmarks of servers: streamed completions over plain sockets, and when pieces came.

Load and server share the processors: a client that parses every event would measure itself. Here the bytes are counted
as they come; the usage is read out of the last event.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answered:
    """``first_s``: until the first piece of text; ``whole_s``: until the end; ``tokens``: new ones, as the server
    counts them, or the events with text where it tells no usage."""

    first_s: float
    whole_s: float
    tokens: int


@dataclass(frozen=True)
class Load:
    """What a number of callers got together."""

    tokens_per_s: float
    answers: tuple[Answered, ...]


async def ask(url: str, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> Answered:
    """One streamed answer on a connection of its own."""
    where = urlsplit(url)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = [f"POST {where.path}{path} HTTP/1.1", f"Host: {where.netloc}", "Content-Type: application/json"]
    head += [f"Content-Length: {len(content)}", "Connection: close", *(f"{name}: {of}" for name, of in headers.items())]
    started = time.perf_counter()
    writer.write("\r\n".join([*head, "", ""]).encode() + content)
    first_s, events, tail = 0.0, 0, b""
    status = await reader.readline()
    if b" 200 " not in status:
        raise RuntimeError(f"{url}{path}: {status.decode()} {(await reader.read()).decode()[:500]}")
    await reader.readuntil(b"\r\n\r\n")
    while piece := await reader.read(65536):
        now = piece.count(b'"content":"') + piece.count(b'"text":"') - piece.count(b'"content":""')
        if now and not first_s:
            first_s = time.perf_counter() - started
        events += now
        tail = (tail + piece)[-4096:]
    writer.close()
    return Answered(first_s, time.perf_counter() - started, _tokens(tail) or events)


def _tokens(tail: bytes) -> int:
    """``completion_tokens`` in the last events."""
    at = tail.rfind(b'"completion_tokens":')
    if at < 0:
        return 0
    return int(tail[at + 20 :].lstrip().split(b",")[0].split(b"}")[0])


async def load(
    url: str, path: str, bodies: Sequence[Sequence[Mapping[str, Any]]], headers: Mapping[str, str] | None = None
) -> Load:
    """As many callers as ``bodies`` has rows, each asking its row one after the other."""

    async def caller(row: Sequence[Mapping[str, Any]]) -> list[Answered]:
        return [await ask(url, path, body, headers or {}) for body in row]

    started = time.perf_counter()
    found = await asyncio.gather(*(caller(row) for row in bodies))
    spent_s = time.perf_counter() - started
    answers = tuple(one for row in found for one in row)
    return Load(sum(one.tokens for one in answers) / spent_s, answers)
