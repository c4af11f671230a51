"""The thread that steps a batch, and what it tells the event loops that wait for pieces.

Guarantees: everything that touches the model runs on this one thread, jobs between two steps; the pieces of one step
reach an event loop in one call; an idle loop uses no processor. A step that fails ends all answers at hand with
:class:`EngineDiedError`, and the model is opened anew before the next one; where that fails, the loop is dead.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, TypeVar

from slmops.errors import ServeError, SlmopsError
from slmops.runtime.base import Delta
from slmops.runtime.batch import BatchedStream, BatchGenerator

log = logging.getLogger(__name__)
T = TypeVar("T")
SWITCH_S = 0.0002
GATHER_S = 0.03
"""Pieces of several answers that come within this time travel together: every event costs processor time that the
model's steps are short of. An answer's first piece and its last never wait, nor does an answer that is alone."""
Loop = asyncio.AbstractEventLoop
Pieces = asyncio.Queue[Delta | BaseException | None]


class EngineDiedError(ServeError):
    """The engine failed while answers were written; they are lost."""

    def __init__(self) -> None:
        super().__init__("The engine failed while it wrote this answer.", remedy="Ask again.")


class BatchLoop:
    """See the module. ``reopen`` gives a fresh model after a failure; None: there is none."""

    def __init__(self, model: BatchGenerator, reopen: Callable[[], BatchGenerator] | None = None) -> None:
        # A step returns some fifty times a second and must not wait 5 ms, Python's default, for the event loop's turn.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        self.model = model
        self.restarts = 0
        self.dead: Exception | None = None
        self._reopen = reopen
        self._jobs: deque[Callable[[], None]] = deque()
        self._out: list[tuple[Loop, Pieces, Delta | Exception | None]] = []
        self._wake = threading.Event()
        self._closing = False
        self._delivered_s = 0.0
        self._urgent = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        model.driven = self._wake.set
        self._thread.start()

    def follow(self, stream: BatchedStream, loop: Loop, pieces: Pieces) -> None:
        """Put all that ``stream`` brings into ``pieces``, on ``loop``'s thread; None behind the last."""

        first = True

        def listener(piece: Delta | Exception) -> None:
            nonlocal first
            last = isinstance(piece, Exception) or piece.finish_reason is not None
            self._urgent = self._urgent or first or last
            first = False
            self._out.append((loop, pieces, self._told(piece) if isinstance(piece, Exception) else piece))
            if last:
                self._out.append((loop, pieces, None))

        self.submit(lambda: stream.listen(listener))  # on the thread that steps, as every later piece

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run ``work`` on the model's thread, between two steps."""
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 (raised again on the caller's side)
                future.set_exception(error)

        if self._closing:
            future.set_exception(ServeError("The server is closing."))
            return future
        self._jobs.append(job)
        self._wake.set()
        return future

    def close(self) -> None:
        """End after the step at hand; answers that are not whole end with an error."""
        self._closing = True
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._wake.clear()
            while self._jobs:
                self._jobs.popleft()()
            if self.dead is None and self.model.busy:
                try:
                    self.model.step()
                except Exception as error:  # noqa: BLE001 (whatever an engine raises)
                    self._revive(error)
                self._wake.set()
            elif self.dead is not None:
                self.model.fail_all(self.dead)
            self._deliver()
            self._wake.wait()
        self.model.close()
        self._deliver()

    def _revive(self, error: Exception) -> None:
        log.error("the engine failed (%s) and is opened anew", type(error).__name__)
        try:
            if self._reopen is None:
                raise ServeError("The engine failed, and cannot be opened again.", remedy="Start the server again.")
            self.model.close()
            fresh = self._reopen()
        except Exception as again:  # noqa: BLE001 (told to whoever asks from now on)
            self.dead = again
            return
        fresh.driven = self._wake.set
        self.model = fresh
        self.restarts += 1

    def _told(self, error: Exception) -> Exception:
        """What a caller is told: of his own mistake all, of the engine's no more than that."""
        if isinstance(error, SlmopsError | ValueError):
            return error
        return EngineDiedError()

    def _deliver(self) -> None:
        now = time.monotonic()
        if not self._urgent and self.model.running > 1 and now - self._delivered_s < GATHER_S:
            return
        self._delivered_s, self._urgent = now, False
        out, self._out = gathered(self._out), []
        loops: dict[Loop, list[tuple[Pieces, Any]]] = {}
        for loop, pieces, piece in out:
            loops.setdefault(loop, []).append((pieces, piece))
        for loop, those in loops.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put, those)


def gathered(out: list[tuple[Loop, Pieces, Delta | Exception | None]]) -> list[tuple[Loop, Pieces, Any]]:
    """The same in order, the texts of one answer that follow one another made one piece."""
    texts: dict[int, int] = {}  # an answer's queue to the place of its open piece
    made: list[tuple[Loop, Pieces, Any]] = []
    for loop, pieces, piece in out:
        place = texts.get(id(pieces))
        if place is not None and isinstance(piece, Delta):
            made[place] = (loop, pieces, joined(made[place][2], piece))
        else:
            texts[id(pieces)] = len(made)
            made.append((loop, pieces, piece))
    return made


def joined(one: Delta, other: Delta) -> Delta:
    """One piece out of two that follow one another."""
    return replace(other, text=one.text + other.text)


def _put(those: list[tuple[Pieces, Any]]) -> None:
    for pieces, piece in those:
        pieces.put_nowait(piece)
