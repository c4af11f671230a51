"""Answers told to a recorder, beside the request's path: what goes in and out is kept by reference and read later.

Guarantees: a recorder never delays or fails a request: nothing is parsed, copied or written here, and what it raises is
logged and no more. It hears of an answer before the last byte of it is sent, so that feedback always finds its answer.
Every response gets an ``X-Request-Id``, so that feedback can name an answer whose body has no id.
Not covered: what the recorder keeps of it; that is its policy.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmops.artifacts.events import Answered, Feedback
from slmops.serve.errors import ApiError
from slmops.serve.seen import KINDS, Seen, answers_of
from slmops.serve.watch import SHADOW, WATCH, Watch

log = logging.getLogger(__name__)
REQUEST_ID = b"x-request-id"
GONE = 499


class Recorder(Protocol):
    """Takes what the server tells. All methods may be called from any thread."""

    def observe(self, read: Callable[[], Sequence[Answered]]) -> None:
        """Take note of a request. ``read`` gives its answers; it is called later, elsewhere. Returns at once."""
        ...

    def feedback(self, given: Feedback) -> bool:
        """Keep what was said of an answer; False where there is no such answer. Waits for the disk.

        Raises:
            SlmopsError: it cannot be kept now.
        """
        ...

    def state(self) -> Mapping[str, Any]:
        """``written``, ``waiting``, ``lost``, ``unreadable``, ``failure`` (None, or why nothing can be written)."""
        ...

    def close(self) -> None:
        """Write what waits, and end."""
        ...


_notes: ContextVar[dict[str, Any] | None] = ContextVar("notes", default=None)


def note(**facts: Any) -> None:
    """Tell what the request and its response do not show: ``version``, ``adapter``, ``prompt_tokens``,
    ``completion_tokens``, ``confidences`` (one an answer). Does nothing where nobody records."""
    notes = _notes.get()
    if notes is not None:
        notes.update(facts)


@dataclass
class _Exchange:
    """A request and its response as they pass by."""

    request: list[bytes] = field(default_factory=list)
    response: list[bytes] = field(default_factory=list)
    status: int = GONE
    content_type: str = ""
    first_ms: float | None = None
    request_id: str = ""
    whole: bool = False
    told: bool = False
    watch: Watch | None = None


class Recording:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, *, recorder: Recorder) -> None:
        self.app = app
        self.recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in KINDS or SHADOW in scope:
            await self.app(scope, receive, send)
            return
        at, started = time.time(), time.perf_counter()
        passing = _Exchange(watch=scope.get(WATCH))
        notes: dict[str, Any] = {}
        token = _notes.set(notes)

        async def keep_request() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                passing.request.append(message.get("body", b""))
            return message

        def tell() -> None:
            if not passing.told:
                passing.told = True
                seen = _seen(scope, passing, notes, at, 1e3 * (time.perf_counter() - started))
                self._tell(lambda: answers_of(seen))

        async def keep_response(message: Message) -> None:
            if message["type"] == "http.response.start":
                _take_head(passing, message)
            elif message["type"] == "http.response.body":
                _take_body(passing, message, started)
                if passing.whole:
                    tell()
            await send(message)

        try:
            await self.app(scope, keep_request, keep_response)
        except ApiError as error:
            passing.status, passing.whole = error.status, True
            raise
        except (OSError, ClientDisconnect):
            raise  # nobody reads the answer: GONE, as it stands
        except Exception:
            passing.status, passing.whole = 500, True
            raise
        finally:
            _notes.reset(token)
            tell()

    def _tell(self, read: Callable[[], Sequence[Answered]]) -> None:
        try:
            self.recorder.observe(read)
        except Exception as error:  # noqa: BLE001 (an answer is worth more than its record)
            log.error("%s while a request was recorded", type(error).__name__)


def _take_head(passing: _Exchange, message: Message) -> None:
    passing.status = message["status"]
    headers = dict(message["headers"])
    passing.content_type = headers.get(b"content-type", b"").decode("latin-1")
    if passing.watch is not None:
        passing.request_id = passing.watch.id
        return
    given = headers.get(REQUEST_ID)
    passing.request_id = given.decode("latin-1") if given else f"req-{uuid.uuid4().hex}"
    if not given:
        message["headers"] = [*message["headers"], (REQUEST_ID, passing.request_id.encode())]


def _take_body(passing: _Exchange, message: Message, started: float) -> None:
    body = message.get("body", b"")
    if body:
        if passing.first_ms is None:
            passing.first_ms = 1e3 * (time.perf_counter() - started)
        passing.response.append(body)
    passing.whole = not message.get("more_body", False)


def _seen(scope: Scope, passing: _Exchange, notes: Mapping[str, Any], at: float, latency_ms: float) -> Seen:
    watch = passing.watch
    if watch is not None:
        known = {"version": watch.digest, "adapter": watch.adapter, "prompt_tokens": watch.prompt_tokens}
        known["completion_tokens"] = watch.completion_tokens
        notes = {**{name: value for name, value in known.items() if value}, **notes}
    streamed = passing.content_type.startswith("text/event-stream")
    return Seen(
        kind=KINDS[scope["path"]],
        request_id=passing.request_id or f"req-{uuid.uuid4().hex}",
        at=at,
        status=passing.status if passing.whole else GONE,
        latency_ms=latency_ms,
        first_ms=passing.first_ms if streamed else None,
        headers=tuple(scope["headers"]),
        request=tuple(passing.request),
        response=tuple(passing.response),
        streamed=streamed,
        notes=notes,
    )
