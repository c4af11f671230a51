"""Around every request: bounds on its body and on its patience, and an answer even for a bug.

Guarantees: a body beyond the limit is refused as soon as it is known to be; a caller that sends its body too slowly is
told so, one that does not read its answer is cut off, and neither holds a model; observers hear of every request once,
with times and counts. Nothing that a caller wrote reaches them or the log: no body, no header, no query, no unknown
path, no text of an exception.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Mapping, Sequence

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmops.serve.errors import ApiError, from_error
from slmops.serve.watch import WATCH, Observer, Watch, watch_this

log = logging.getLogger(__name__)
CALLER_GONE = 499  # as nginx logs it; nobody is left to see it
MAX_BODY_BYTES = 4 * 2**20
BODY_LIMIT_S = 30.0
"""From a request's first byte until its body is whole."""
SEND_LIMIT_S = 60.0
"""A caller that reads nothing for so long has gone."""
ANOTHER_PATH = "(another path)"
KNOWN_PATHS = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/admin/reload",
        "/admin/status",
        "/v1/models",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/classify",
        "/v1/embeddings",
        "/v1/feedback",
        "/v1/responses",
        "/v1/rollout",
        "/v1/routing",
    }
)


class Limits:
    """ASGI middleware; see the module. ``observers`` are told of a request when it has ended. Inside of another one it
    only answers what goes wrong: an application alone and one among several are both whole."""

    def __init__(
        self, app: ASGIApp, *, max_body_bytes: int = MAX_BODY_BYTES, observers: Sequence[Observer] | None = None
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.observers: Sequence[Observer] = (log_line,) if observers is None else observers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif WATCH in scope:
            await self._guarded(scope, receive, send, scope[WATCH])
        else:
            await self._watched(scope, receive, send)

    async def _watched(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch = Watch(scope["method"], known_path(scope["path"]), traceparent=_header(scope, b"traceparent"))
        watch_this(watch)
        bounded = _patient(send, watch)
        try:
            if _content_length(scope) > self.max_body_bytes:
                await respond(self._too_large(), bounded)
                return
            await self._guarded({**scope, WATCH: watch}, self._bounded(receive), bounded, watch)
        except asyncio.CancelledError:
            watch.status = watch.status or CALLER_GONE
            raise
        finally:
            watch.spent_s = time.perf_counter() - watch.started_s
            for observer in self.observers:
                observer(watch)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, watch: Watch) -> None:
        try:
            await self.app(scope, receive, send)
        except (OSError, ClientDisconnect):
            watch.status = CALLER_GONE
        except Exception as error:  # noqa: BLE001 (the last resort: the caller gets an answer, the log the place)
            if not isinstance(error, ApiError):
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s while answering %s\n%s", type(error).__name__, watch.path, where)
            if not watch.status:
                await respond(from_error(error), send)

    def _bounded(self, receive: Receive) -> Receive:
        read_bytes, whole = 0, False
        deadline = time.monotonic() + BODY_LIMIT_S

        async def bounded() -> Message:
            nonlocal read_bytes, whole
            if whole:  # what is waited for now is the caller's going away
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise too_slow() from None
            if message["type"] == "http.request":
                read_bytes += len(message.get("body", b""))
                whole = not message.get("more_body", False)
                if read_bytes > self.max_body_bytes:
                    raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self.max_body_bytes:,} bytes.", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip


def log_line(watch: Watch) -> None:
    """One line a request; the fields again for those who log as JSON."""
    if log.isEnabledFor(logging.INFO):
        log.info(
            "%s %s %d %.1f ms", watch.method, watch.path, watch.status, 1e3 * watch.spent_s, extra={"watch": watch}
        )


async def respond(error: ApiError, send: Send) -> None:
    """Send an error as a whole response."""
    await respond_json(error.status, error.to_json(), send, headers=error.headers)


async def respond_json(status: int, body: object, send: Send, *, headers: Mapping[str, str] | None = None) -> None:
    """Send ``body`` as a whole response."""
    raw_body = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
    told = {"content-type": "application/json", "content-length": str(len(raw_body)), **(headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in told.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": raw_body})


def known_path(path: str) -> str:
    """``path`` where it is ours, for logs and labels."""
    return path if path in KNOWN_PATHS else ANOTHER_PATH


def _patient(send: Send, watch: Watch) -> Send:
    async def bounded(message: Message) -> None:
        if message["type"] == "http.response.start":
            watch.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", watch.id.encode())]}
        try:
            async with asyncio.timeout(SEND_LIMIT_S):
                await send(message)
        except TimeoutError:
            raise ConnectionResetError("the caller does not read") from None

    return bounded


def too_slow() -> ApiError:
    return ApiError(
        408,
        f"The body did not come within {BODY_LIMIT_S:.0f} s.",
        code="request_timeout",
        headers={"Connection": "close"},
    )


def _content_length(scope: Scope) -> int:
    value = _header(scope, b"content-length")
    return int(value) if value.isdigit() else 0


def _header(scope: Scope, name: bytes) -> str:
    return next((value.decode("latin-1") for header, value in scope["headers"] if header == name), "")
