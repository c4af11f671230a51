"""Two applications behind one address: the version in use, and a candidate.

While the candidate shadows, callers are answered by the version in use alone; their requests are answered a second time
when the server has nothing else to do, and dropped where too many wait. Then a share of the callers gets the candidate.
What it fails is answered by the version in use, as long as nothing of the answer was sent. When the rollout ends, the
version that goes finishes what it has at hand and is closed; the other one answers everything.

Everything but the model's answers (lists, health, feedback) goes to the version in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from slmops.rollout.tally import Version
from slmops.serve.candidate.reading import (
    ANSWER_PATHS,
    FEEDBACK_PATH,
    ID_HEADER,
    VERSION_HEADER,
    answer_of,
    feedback_of,
    subject_of,
)
from slmops.serve.candidate.rollout import Rollout, Seen
from slmops.serve.limits import MAX_BODY_BYTES
from slmops.serve.watch import SHADOW, WATCH, Watch, short, watching

log = logging.getLogger(__name__)
LOOK_S = 1.0
MOST_SHADOWS = 32
"""Requests that wait to be shadowed; more are dropped."""
OLDEST_SHADOW_S = 30.0
READ_BYTES = 1 << 20
"""Of an answer's body, to find its text and its id."""
SERVER_ERROR, TOO_MANY = 500, 429
STATUS_PATH = "/v1/rollout"


@dataclass
class _Side:
    """An application, the requests it has at hand, and what closes it."""

    app: FastAPI
    at_hand: int = 0
    life: AbstractAsyncContextManager[Any] | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    async def open(self) -> None:
        self.life = self.app.router.lifespan_context(self.app)
        await self.life.__aenter__()

    async def close(self) -> None:
        """After the last answer at hand."""
        while self.at_hand:
            self.idle.clear()
            await self.idle.wait()
        life, self.life = self.life, None
        if life is not None:
            await life.__aexit__(None, None, None)

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        self.at_hand += 1
        try:
            yield
        finally:
            self.at_hand -= 1
            if not self.at_hand:
                self.idle.set()


@dataclass
class _Exchange:
    """What came back: for counting, and for finding out what was said."""

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytearray = field(default_factory=bytearray)
    whole: bool = False
    latency_ms: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether it says anything of the version: not where the caller was wrong, went away, or is asked to wait."""
        ended = self.whole or self.status >= SERVER_ERROR
        return ended and (self.status < 400 or self.status >= SERVER_ERROR)

    def seen(self) -> Seen:
        answered = self.status < 400
        named, answer = answer_of(self.headers, bytes(self.body)) if answered else (None, None)
        return Seen(named, answered, self.latency_ms, answer)


@dataclass(frozen=True)
class _Shadow:
    """A request to be answered a second time, and the first answer."""

    scope: Scope
    body: bytes
    old: Seen
    at_s: float


class Pair:
    """The ASGI application; see the module. ``on_end`` is told the outcome once it has taken effect."""

    def __init__(
        self,
        old: FastAPI,
        new: FastAPI,
        rollout: Rollout,
        *,
        look_s: float = LOOK_S,
        on_end: Callable[[str], None] | None = None,
    ) -> None:
        self.rollout = rollout
        self.look_s = look_s
        self.on_end = on_end
        self._sides: dict[Version, _Side] = {"old": _Side(old), "new": _Side(new)}
        self._shadows: asyncio.Queue[_Shadow] = asyncio.Queue(MOST_SHADOWS)
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = False
        for app in (old, new):
            app.add_api_route(STATUS_PATH, rollout.status, methods=["GET"], include_in_schema=False)

    @property
    def main(self) -> Version:
        """The version in use."""
        return "new" if self.rollout.state.outcome == "over" else "old"

    @property
    def running(self) -> bool:
        """Whether it is still open which version stays."""
        return not self._ended

    def hosted(self) -> FastAPI:
        """Both as one application, whose life is theirs."""
        host = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lambda _: self.living())
        host.mount("/", self)
        return host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in ANSWER_PATHS:
            await self._answer(scope, receive, send)
        elif scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == FEEDBACK_PATH:
            await self._take_feedback(scope, receive, send)
        else:
            side = self._sides[self.main]
            async with side.busy():
                await side.app(scope, receive, send)

    # --- requests ---------------------------------------------------------------------------------------------

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, whole = await _read_body(receive)
        subject = subject_of(scope["headers"], body) if whole else None
        version = self.main if self._ended else self.rollout.version_for(subject or uuid.uuid4().hex)
        exchange = await self._ask(version, scope, _replay(body, receive, whole=whole), send)
        if exchange is None:
            self.rollout.undone()
            await self._ask("old", scope, _replay(body, receive, whole=whole), send)
        elif exchange.counts:
            seen = exchange.seen()
            self.rollout.saw(version, seen)
            if self.rollout.shadowing and whole:
                self._shadow(_Shadow(scope, body, seen, time.monotonic()))

    async def _ask(self, version: Version, scope: Scope, receive: Receive, send: Send) -> _Exchange | None:
        """Let ``version`` answer. None: it is the candidate, it failed, and nothing was sent."""
        side, exchange = self._sides[version], _Exchange()
        may_hold = version == "new" and self.main == "old"
        digest = self.rollout.state.new if version == "new" else self.rollout.state.old
        known = watching()
        known.version, known.digest = short(digest), digest
        watched = _watch(exchange, send, digest, hold_failures=may_hold, request_id=_id_of(scope))
        async with side.busy():
            try:
                await side.app(_copy(scope), receive, watched)
            except Exception as error:
                if not may_hold or exchange.headers:
                    raise
                log.error("%s in the candidate", type(error).__name__)
                exchange.status = SERVER_ERROR
        held = may_hold and (exchange.status >= SERVER_ERROR or exchange.status == TOO_MANY)
        if held and exchange.status >= SERVER_ERROR:
            self.rollout.saw(version, Seen(None, False, exchange.latency_ms))
        return None if held else exchange

    async def _take_feedback(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, whole = await _read_body(receive)
        exchange, side = _Exchange(), self._sides[self.main]
        async with side.busy():
            watched = _watch(exchange, send, None, request_id=_id_of(scope))
            await side.app(scope, _replay(body, receive, whole=whole), watched)
        if whole and 200 <= exchange.status < 300 and (feedback := feedback_of(body)):
            self.rollout.heard(feedback)

    # --- the shadow -------------------------------------------------------------------------------------------

    def _shadow(self, shadow: _Shadow) -> None:
        try:
            self._shadows.put_nowait(shadow)
        except asyncio.QueueFull:
            self.rollout.dropped()

    async def _work_shadows(self) -> None:
        while True:
            shadow = await self._shadows.get()
            while self._sides["old"].at_hand:  # callers first
                await asyncio.sleep(0.002)
            if time.monotonic() - shadow.at_s > OLDEST_SHADOW_S:
                self.rollout.dropped()
            elif self.rollout.shadowing:
                await self._ask_in_shadow(shadow)

    async def _ask_in_shadow(self, shadow: _Shadow) -> None:
        exchange, side = _Exchange(), self._sides["new"]
        scope = {**_copy(shadow.scope), SHADOW: True}
        scope.pop(WATCH, None)  # it is the caller's, whose answer was sent
        async with side.busy():
            try:
                await side.app(scope, _replay(shadow.body, _never, whole=True), _watch(exchange, _nowhere, None))
            except Exception as error:  # noqa: BLE001 (a candidate that fails is what is looked for)
                log.error("%s in the candidate's shadow", type(error).__name__)
                exchange.status = SERVER_ERROR
        if exchange.status != TOO_MANY:
            self.rollout.saw_both(shadow.old, exchange.seen())

    # --- the life of both -------------------------------------------------------------------------------------

    @asynccontextmanager
    async def living(self) -> AsyncIterator[None]:
        """Both applications are open, and the rollout goes on."""
        for side in self._sides.values():
            await side.open()
        self._tasks = [asyncio.create_task(self._watch_over()), asyncio.create_task(self._work_shadows())]
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            await self.rollout.look()
            for side in self._sides.values():
                await side.close()

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.living():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _watch_over(self) -> None:
        while self.rollout.running:
            await asyncio.sleep(self.look_s)
            await self.rollout.look()
        self._ended = True
        goes: Version = "old" if self.main == "new" else "new"
        if self.on_end is not None:
            self.on_end(self.rollout.state.outcome)
        await self._sides[goes].close()


def _copy(scope: Scope) -> Scope:
    """An application writes into its scope: each gets its own."""
    copied = dict(scope)
    copied["headers"] = list(scope["headers"])
    copied.pop("state", None)
    copied["state"] = dict(scope.get("state") or {})
    return copied


async def _read_body(receive: Receive) -> tuple[bytes, bool]:
    """The body, and whether that is all of it: more than is let in is left to the application, which refuses it."""
    body = bytearray()
    while len(body) <= MAX_BODY_BYTES:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body), False
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body), True
    return bytes(body), False


def _replay(body: bytes, rest: Receive, *, whole: bool) -> Receive:
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": not whole}
        return await rest()

    return receive


def _id_of(scope: Scope) -> str | None:
    """The request's id, where a layer further out has given it one (and tells the caller)."""
    watch: Watch | None = scope.get(WATCH)
    return None if watch is None else watch.id


def _watch(
    exchange: _Exchange,
    send: Send,
    digest: str | None,
    *,
    hold_failures: bool = False,
    request_id: str | None = None,
) -> Send:
    """``send``, with what passes noted. ``hold_failures``: an answer that begins as a failure is not sent.
    ``request_id``: what the caller is told by a layer further out; None: an id is given here."""
    started = time.perf_counter()
    held = False

    async def watched(message: Message) -> None:
        nonlocal held
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            held = hold_failures and (exchange.status >= SERVER_ERROR or exchange.status == TOO_MANY)
            headers = list(message.get("headers", ()))
            if request_id is None and not any(name.lower() == ID_HEADER for name, _ in headers):
                headers.append((ID_HEADER, uuid.uuid4().hex.encode()))
            if digest is not None:
                headers.append((VERSION_HEADER, short(digest).encode()))
            told = headers if request_id is None else [*headers, (ID_HEADER, request_id.encode())]
            exchange.headers = [] if held else told
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body":
            room = READ_BYTES - len(exchange.body)
            exchange.body += message.get("body", b"")[:room]
            exchange.whole = not message.get("more_body", False)
            exchange.latency_ms = 1e3 * (time.perf_counter() - started)
        if not held:
            await send(message)

    return watched


async def _never() -> Message:
    """Nobody hangs up on a shadow."""
    await asyncio.Event().wait()
    raise AssertionError


async def _nowhere(_: Message) -> None:
    """Nobody reads a shadow's answer."""
