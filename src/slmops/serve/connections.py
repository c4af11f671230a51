"""Connections that say nothing: a bound on their number and on their patience.

Guarantees: a connection that has not sent a whole head of a request within :data:`HEAD_LIMIT_S` is closed, however
slowly it dribbles; when there are more than the limit, the one that has been silent longest makes room, and a
connection with a request at hand never does. So a thousand callers that send nothing cost the others nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_LIMIT_S = 10.0
MAX_CONNECTIONS = 4096
SPARE_FILES = 256
"""Open files that are kept for everything else: models, logs, stores."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def raise_file_limit(wanted: int = MAX_CONNECTIONS + SPARE_FILES) -> int:
    """Let this process open as many files as it may, up to ``wanted``; how many connections that is good for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        more = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it: then there are fewer connections
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    return wanted - SPARE_FILES if soft == resource.RLIM_INFINITY else max(8, min(wanted, soft) - SPARE_FILES)


class Guarded(H11Protocol):
    """uvicorn's protocol with the two bounds of this module."""

    max_connections = MAX_CONNECTIONS
    head_limit_s = HEAD_LIMIT_S

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._silent_since_s: float | None = None
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_head()
        if len(self.connections) > self.max_connections:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._answering:
            self._stop_waiting()
        elif self._head_timer is None:
            self._wait_for_head()

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

    def _make_room(self) -> None:
        silent = [one for one in self.connections if isinstance(one, Guarded) and one._silent_since_s is not None]
        oldest = min(silent, key=lambda one: one._silent_since_s or 0.0)
        if oldest is self:  # all others are being answered
            self.transport.write(_FULL)
            self.transport.close()
        else:
            self.connections.discard(oldest)  # it is lost only at the loop's next turn
            oldest.transport.abort()
