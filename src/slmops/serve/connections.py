"""Connections that say nothing, or only heads: bounds on their number, their patience and their memory.

Guarantees: a connection that has not sent a whole head of a request within :data:`HEAD_LIMIT_S` is closed, however
slowly it dribbles; one whose head is longer than :data:`HEAD_LIMIT_BYTES` is told so and closed, for the parser would
keep all of it; when there are more than the limit, the one that has been silent longest makes room, and a
connection with a request at hand never does. So a thousand callers that send nothing cost the others nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT_S = 10.0
HEAD_LIMIT_BYTES = 64 * 1024
"""Of a request's line and headers, give or take what comes in one piece."""
MAX_CONNECTIONS = 4096
SPARE_FILES = 256
"""Open files that are kept for everything else: models, logs, stores."""
_CLOSING = b"connection: close\r\ncontent-length: 0\r\n\r\n"
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\n" + _CLOSING
_TOO_LONG = b"HTTP/1.1 431 Request Header Fields Too Large\r\n" + _CLOSING


def raise_file_limit(wanted: int = MAX_CONNECTIONS + SPARE_FILES) -> int:
    """Let this process open as many files as it may, up to ``wanted``; how many connections that is good for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then there are fewer connections
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return wanted - SPARE_FILES if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft) - SPARE_FILES)


class Guarded(HttpToolsProtocol):
    """uvicorn's protocol with the bounds of this module."""

    max_connections = MAX_CONNECTIONS
    head_limit_s = HEAD_LIMIT_S

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._silent_since_s: float | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes: int | None = None  # of a head that has begun and not ended

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        begun = self._head_bytes is not None
        super().data_received(data)
        if begun and self._head_bytes is not None:  # what came before its beginning is not known, and one piece at most
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT_BYTES:
                self._refuse_head()
                return
        if self._answering:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._answering:
            self._silent_since_s = time.monotonic()  # uvicorn's own timer ends it, unless it begins to send

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        self._silent_since_s = time.monotonic()  # a loop's own clock may stand still for a millisecond
        self._head_timer = self.loop.call_later(self.head_limit_s, self._close)

    def _stop_waiting(self) -> None:
        self._silent_since_s = None
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        if not self._answering and not self.transport.is_closing():
            self.transport.abort()

    def _refuse_head(self) -> None:
        if self._answering:  # an answer cannot be broken into: the next request's head came before its end
            self.transport.abort()
            return
        self.transport.write(_TOO_LONG)
        self.transport.close()

    def _make_room(self) -> None:
        silent = [one for one in self.connections if isinstance(one, Guarded) and one._silent_since_s is not None]
        oldest = min(silent, key=lambda one: one._silent_since_s or 0.0)
        if oldest is self:  # all others are being answered
            self.transport.write(_FULL)
            self.transport.close()
        else:
            self.connections.discard(oldest)  # it is lost only at the loop's next turn
            oldest.transport.abort()
