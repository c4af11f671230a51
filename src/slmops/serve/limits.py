"""Around every request: a bound on its body, one line in the log, and an answer even for a bug.

The log has method, known path, status and time. It never has a body, a header, a query or the text of an exception:
any of them may hold what somebody wrote to the model.
"""

from __future__ import annotations

import json
import logging
import time
import traceback

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slmops.serve.errors import ApiError, from_error

log = logging.getLogger(__name__)
CALLER_GONE = 499  # as nginx logs it; nobody is left to see it
MAX_BODY_BYTES = 4 * 2**20
KNOWN_PATHS = frozenset(
    {"/health", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/classify", "/v1/feedback"}
)


class Limits:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int = MAX_BODY_BYTES) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status, read_bytes = time.perf_counter(), 0, 0

        async def watch_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def bounded_receive() -> Message:
            nonlocal read_bytes
            message = await receive()
            if message["type"] == "http.request":
                read_bytes += len(message.get("body", b""))
                if read_bytes > self.max_body_bytes:
                    raise self._too_large()
            return message

        try:
            if _content_length(scope) > self.max_body_bytes:
                raise self._too_large()
            await self.app(scope, bounded_receive, watch_send)
        except (OSError, ClientDisconnect):
            status = CALLER_GONE
        except Exception as error:  # noqa: BLE001 (the last resort: the caller gets an answer, the log the place)
            answer = from_error(error)
            if not isinstance(error, ApiError):
                where = "".join(traceback.format_tb(error.__traceback__))
                log.error("%s while answering %s\n%s", type(error).__name__, _known(scope["path"]), where)
            if not status:
                await respond(answer, watch_send)
        finally:
            spent_ms = 1e3 * (time.perf_counter() - started)
            log.info("%s %s %d %.1f ms", scope["method"], _known(scope["path"]), status, spent_ms)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body is larger than {self.max_body_bytes:,} bytes.", code="body_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip


async def respond(error: ApiError, send: Send) -> None:
    """Send an error as a whole response."""
    body = json.dumps(error.to_json(), ensure_ascii=False).encode("utf-8", "replace")
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(error.headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _known(path: str) -> str:
    return path if path in KNOWN_PATHS else "(another path)"
