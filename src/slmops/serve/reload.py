"""Another version without a failed request: the new one is loaded, warmed, and takes over between two requests.

Guarantees: a request is answered whole by the version that it met; the new version has been checked against its digests
and has answered once before anybody is sent to it; one that cannot be loaded, or that is another kind of model, is
refused, and the old one stays; the old one is closed when its last answer has ended. One reload at a time.
Not covered: memory. Both versions are held until the old one has drained.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.artifacts import Message
from slmops.errors import ServeError, SlmopsError
from slmops.runtime.base import GenerationRequest
from slmops.serve.engine import Engine
from slmops.serve.watch import short, watching

log = logging.getLogger(__name__)
PROBE = "Hello, can you help me?"

Result = Literal["switched", "refused"]


class ReloadBusyError(ServeError):
    """A reload is under way already."""

    def __init__(self) -> None:
        super().__init__("A reload is under way.", remedy="Wait until it has ended.")


class OnTrialError(ServeError):
    """A candidate is on trial, and another version would end it undecided."""

    def __init__(self) -> None:
        super().__init__("A candidate is on trial here.", remedy="Wait for its end, or start the server without it.")


@dataclass(frozen=True)
class Version:
    """
    ``source``  what a person named: a bundle's path, which may lead elsewhere by now
    ``digest``  of the artifact; empty for a bare model folder
    """

    source: str
    folder: Path
    digest: str = ""

    @property
    def label(self) -> str:
        """Short, for metrics and logs."""
        return short(self.digest)


@dataclass(eq=False)
class Generation:
    """A version that answers, with all that belongs to it."""

    version: Version
    app: ASGIApp
    engine: Engine
    at_hand: int = 0
    retired: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)


Loader = Callable[[str], tuple[Version, Engine]]
"""From what a person names to a checked, opened model. Runs in a thread of its own, for seconds."""


class Switch:
    """An ASGI application that is one of several, and changes between two requests.

    ``load``     opens what is named; raises :class:`SlmopsError` for what must not serve
    ``build``    the application over an engine
    ``on_reload``  told of each attempt
    ``held``       while it says so, nothing is reloaded
    """

    def __init__(
        self,
        source: str,
        load: Loader,
        build: Callable[[Version, Engine], FastAPI],
        *,
        first: tuple[Version, Engine] | None = None,
        on_reload: Callable[[Result, Version], None] = lambda *_: None,
        held: Callable[[], bool] = lambda: False,
    ) -> None:
        self._load, self._build, self._on_reload, self._held = load, build, on_reload, held
        self._source = source
        version, engine = first or load(source)
        self.current = Generation(version, build(version, engine), engine)
        self.draining: set[Generation] = set()
        self.closing = False
        self._reloading = False
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        generation = self.current
        watch = watching()
        watch.version, watch.digest = generation.version.label, generation.version.digest
        generation.at_hand += 1
        try:
            await generation.app(scope, receive, send)
        finally:
            generation.at_hand -= 1
            if generation.retired and not generation.at_hand:
                generation.idle.set()

    @property
    def at_hand(self) -> int:
        """Requests running or waiting, on all versions."""
        return self.current.at_hand + sum(one.at_hand for one in self.draining)

    def told(self) -> dict[str, Any]:
        """What answers, and what still drains."""
        version = self.current.version
        return {
            "source": version.source,
            "version": version.label,
            "digest": version.digest,
            "at_hand": self.at_hand,
            "draining": sorted(one.version.label for one in self.draining),
            "reloading": self._reloading,
        }

    async def reload(self, source: str | None = None) -> Version:
        """Go over to what ``source`` names; None: what was named last, read anew.

        Raises:
            ReloadBusyError: another reload is under way.
            OnTrialError: a candidate is on trial.
            SlmopsError: the new version is refused; the old one answers on.
        """
        if self._reloading or self.closing:
            raise ReloadBusyError
        if self._held():
            raise OnTrialError
        self._reloading = True
        wanted = source or self._source
        try:
            fresh = await self._open(wanted)
        except Exception as error:
            log.error("%s is refused (%s): %s answers on", wanted, error, self.current.version.label)
            self._on_reload("refused", self.current.version)
            raise
        finally:
            self._reloading = False
        self._source = wanted
        old, self.current = self.current, fresh
        self._retire(old)
        self._on_reload("switched", fresh.version)
        log.info("%s answers now; %s drains", fresh.version.label, old.version.label)
        return fresh.version

    def reload_soon(self) -> None:
        """Begin a reload and return; what goes wrong is logged. For a signal."""

        async def attempt() -> None:
            try:
                await self.reload()
            except SlmopsError as error:
                log.error("Nothing was changed: %s", error)
            except Exception:
                log.exception("Nothing was changed")

        self._spawn(attempt())

    async def _open(self, source: str) -> Generation:
        version, engine = await asyncio.to_thread(self._load, source)
        try:
            if engine.description.form != self.current.engine.description.form:
                raise ServeError(
                    f"{source} holds a {engine.description.form}, and a {self.current.engine.description.form} is "
                    "served here.",
                    remedy="Start another server for it.",
                )
            # In a context of its own: its tokens are not those of the request that asks for the reload.
            await asyncio.create_task(warm(engine), context=contextvars.Context())
            fresh = Generation(version, app := self._build(version, engine), engine)
            await fresh.stack.enter_async_context(app.router.lifespan_context(app))
        except BaseException:
            await asyncio.to_thread(engine.close)
            raise
        return fresh

    def _retire(self, old: Generation) -> None:
        old.retired = True
        if not old.at_hand:
            old.idle.set()
        self.draining.add(old)
        self._spawn(self._drain(old))

    async def _drain(self, old: Generation) -> None:
        await old.idle.wait()
        self.draining.discard(old)
        await old.stack.aclose()

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Starlette's own lifespan protocol: the versions' lifespans are entered and left as they come and go."""
        await receive()
        app: Any = self.current.app
        await self.current.stack.enter_async_context(app.router.lifespan_context(app))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.closing = True
        for one in (*self.draining, self.current):
            one.idle.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.current.stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})


async def warm(engine: Engine) -> None:
    """One answer that nobody waits for: pages are read, buffers are made, and a model that cannot answer is found.

    Raises:
        SlmopsError: it cannot.
    """
    if engine.is_classifier:
        await engine.classify([PROBE])
        return
    wanted = GenerationRequest(engine.description.conversation([Message("user", PROBE)]), max_tokens=2)
    async for _ in engine.stream(lambda: engine.generator.stream(wanted)):
        pass
