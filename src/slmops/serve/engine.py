"""One model, many callers: a queue with a bound in front of a single worker thread.

Guarantees: the event loop never waits for the model; calls run one at a time, first come first served; with more than
``max_waiting`` calls at hand the next one is refused at once, so that latency stays bounded; a caller that goes away
stops its generation after the token at hand, and a call still waiting is dropped unrun.
Not covered: continuous batching of generations.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar, cast, runtime_checkable

from slmops.artifacts import Message
from slmops.chat import Tools
from slmops.errors import ServeError
from slmops.runtime import open_classifier, open_generator
from slmops.runtime.base import Classifier, Delta, GenerationRequest, Generator, Probabilities
from slmops.runtime.calibration import calibrated
from slmops.runtime.description import ModelDescription
from slmops.serve.watch import watching

T = TypeVar("T")
MAX_WAITING = 64
"""Calls running or waiting; the next one is told to come again."""


@runtime_checkable
class KnowsContext(Protocol):
    """A generator that can say beforehand whether a conversation fits."""

    @property
    def context_tokens(self) -> int: ...

    def count_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> int: ...


@runtime_checkable
class ContinuesText(Protocol):
    """A generator that can go on from plain text, without a chat template."""

    def encode_text(self, text: str) -> list[int]: ...

    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]: ...


@runtime_checkable
class CountsTokens(Protocol):
    """A classifier that can say how many tokens of a text it reads."""

    def count_tokens(self, text: str) -> int: ...


class BusyError(ServeError):
    """The queue is full. ``retry_after_s``: about when there will be room."""

    def __init__(self, waiting: int, retry_after_s: int) -> None:
        super().__init__(f"{waiting} requests are waiting already.", remedy=f"Try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class Engine:
    """See the module. ``model`` and ``description`` must fit together."""

    def __init__(
        self, model: Classifier | Generator, description: ModelDescription, *, max_waiting: int = MAX_WAITING
    ) -> None:
        self.model = model
        self.description = description
        self.max_waiting = max_waiting
        self.closed = False
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._at_hand = 0  # touched by the event loop's thread alone
        self._call_s = 0.0  # moving average

    @classmethod
    def open(cls, folder: Path, *, threads: int | None = None, max_waiting: int = MAX_WAITING) -> Engine:
        """Load the model folder; errors as :func:`slmops.runtime.open_generator`."""
        description = ModelDescription.read(folder)
        opener = open_classifier if description.form == "classifier" else open_generator
        return cls(opener(folder, threads=threads), description, max_waiting=max_waiting)

    @property
    def is_classifier(self) -> bool:
        return self.description.form == "classifier"

    @property
    def classifier(self) -> Classifier:
        return cast("Classifier", self.model)

    @property
    def generator(self) -> Generator:
        return cast("Generator", self.model)

    @property
    def at_hand(self) -> int:
        """Calls running or waiting."""
        return self._at_hand

    async def classify(self, texts: Sequence[str]) -> tuple[Probabilities, int]:
        """Calibrated probabilities ``[len(texts), labels]`` and the tokens read.

        Raises:
            BusyError: the queue is full.
        """

        def work() -> tuple[Probabilities, int]:
            model = self.classifier
            tokens = sum(model.count_tokens(text) for text in texts) if isinstance(model, CountsTokens) else 0
            return calibrated(model.probabilities(texts), self.description.temperature), tokens

        probabilities, tokens = await self.call(work)
        watching().prompt_tokens += tokens
        return probabilities, tokens

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the model's thread. When the caller is cancelled, work that still waits is dropped.

        Raises:
            BusyError: the queue is full.
        """
        self._enter()
        started = time.perf_counter()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, watching().begun(work))
        finally:
            self._leave(started)

    async def stream(self, start: Callable[[], Iterator[Delta]]) -> AsyncGenerator[Delta, None]:
        """The pieces of one answer. ``start`` and every step of its iterator run on the model's thread.

        Raises:
            BusyError: the queue is full.
        """
        self._enter()
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Delta | BaseException | None] = asyncio.Queue()
        gone = threading.Event()

        def put(piece: Delta | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                if not gone.is_set():
                    for piece in start():
                        put(piece)
                        if gone.is_set():
                            break
            except BaseException as error:  # noqa: BLE001 (raised again on the caller's side)
                put(error)
            finally:
                put(None)

        watch = watching()
        future = loop.run_in_executor(self._worker, watch.begun(work))
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                watch.piece(piece)
                yield piece
        finally:
            gone.set()
            future.cancel()
            self._leave(started)

    def close(self) -> None:
        """End after the call at hand; calls that wait are dropped."""
        self.closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.model.close()

    def _enter(self) -> None:
        if self._at_hand >= self.max_waiting:
            raise BusyError(self._at_hand, max(1, round(self._call_s * self._at_hand)))
        self._at_hand += 1

    def _leave(self, started: float) -> None:
        self._at_hand -= 1
        # What a caller waited, divided by those who waited with it: about the time of one call.
        share_s = (time.perf_counter() - started) / (self._at_hand + 1)
        self._call_s = 0.8 * self._call_s + 0.2 * share_s
