"""One model, many callers: a bound on how many, and one of three ways to run them.

============ ==========================================================================================================
one by one   any model: calls run on one thread, first come first served
side by side a model that says how many answers it writes at once (``at_once``): so many threads
in a batch   a :class:`~slmops.runtime.batch.BatchGenerator`: one thread steps, answers join and leave between steps
============ ==========================================================================================================

Guarantees: the event loop never waits for the model; with more than ``max_waiting`` calls at hand the next one is
refused at once, so that latency stays bounded; a caller that goes away stops its generation after the token at hand,
and a call still waiting is dropped unrun. A batch whose engine fails ends the answers at hand with an error, and is
opened anew; :attr:`Engine.restarts` counts.
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
from slmops.errors import ModelError, ServeError
from slmops.runtime import open_classifier
from slmops.runtime.base import Classifier, Delta, GenerationRequest, Generator, Probabilities
from slmops.runtime.batch import BatchedStream, BatchGenerator
from slmops.runtime.description import ModelDescription
from slmops.runtime.engines import engines_of, open_engine
from slmops.serve.batch_loop import BatchLoop, Pieces
from slmops.serve.routing import RoutedGenerator, Router

T = TypeVar("T")
MAX_WAITING = 64
"""Calls running or waiting; the next one is told to come again."""


@runtime_checkable
class KnowsContext(Protocol):
    """A generator that can say beforehand whether a conversation fits."""

    @property
    def context_tokens(self) -> int: ...

    def count_tokens(self, messages: Sequence[Message]) -> int: ...


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
    """See the module. ``model`` and ``description`` must fit together. ``name``: of the engine underneath, as
    ``--engine`` names it. ``reopen``: opens the model again after a failure of a batch. ``router``: takes what the
    model is unsure of to its teacher."""

    def __init__(
        self,
        model: Classifier | Generator,
        description: ModelDescription,
        *,
        max_waiting: int = MAX_WAITING,
        name: str = "",
        reopen: Callable[[], BatchGenerator] | None = None,
        router: Router | None = None,
    ) -> None:
        self._model = model
        self.router = router
        self.description = description
        self.max_waiting = max_waiting
        self.name = name
        self.closed = False
        self._batch = BatchLoop(model, reopen) if isinstance(model, BatchGenerator) else None
        batched = self._batch is not None
        at_once = 1 if batched else int(getattr(model, "at_once", 1))
        self._worker = ThreadPoolExecutor(max_workers=at_once, thread_name_prefix="model")
        # A thread for each: an answer that is wrapped (routing) holds its own until it ends.
        readers = ThreadPoolExecutor(max_workers=max_waiting, thread_name_prefix="read") if batched else None
        self._readers = readers or self._worker
        self._at_hand = 0  # touched by the event loop's thread alone
        self._call_s = 0.0  # moving average

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        threads: int | None = None,
        max_waiting: int = MAX_WAITING,
        engine: str | None = None,
        router: Router | None = None,
    ) -> Engine:
        """Load the model folder with the engine of that name; None: with the first of
        :func:`slmops.runtime.engines.engines_of` that takes it. Errors as there :func:`open_engine`."""
        description = ModelDescription.read(folder)
        if description.form == "classifier":
            classifier = open_classifier(folder, threads=threads)
            return cls(classifier, description, max_waiting=max_waiting, router=router)
        names = (engine,) if engine else engines_of(folder) or (description.runtime,)

        def opened(name: str) -> Generator:
            made = open_engine(name, folder, threads=threads)
            if isinstance(made, BatchGenerator):
                made.tells_logprobs = router is not None
            return made

        name, model = _first_that_opens(names, opened)

        def reopen() -> BatchGenerator:
            return cast("BatchGenerator", opened(name))

        return cls(model, description, max_waiting=max_waiting, name=name, reopen=reopen, router=router)

    @property
    def model(self) -> Classifier | Generator:
        return self._model if self._batch is None else self._batch.model

    @property
    def ready(self) -> bool:
        """Whether calls can be answered."""
        return not self.closed and (self._batch is None or self._batch.dead is None)

    @property
    def restarts(self) -> int:
        """How often the engine failed and was opened anew."""
        return 0 if self._batch is None else self._batch.restarts

    @property
    def is_classifier(self) -> bool:
        return self.description.form == "classifier"

    @property
    def classifier(self) -> Classifier:
        return cast("Classifier", self.model)

    @property
    def generator(self) -> Generator:
        model = cast("Generator", self.model)
        return model if self.router is None else cast("Generator", RoutedGenerator(model, self.router))

    @property
    def at_hand(self) -> int:
        """Calls running or waiting."""
        return self._at_hand

    async def classify(self, texts: Sequence[str]) -> tuple[Probabilities, int]:
        """Probabilities ``[len(texts), labels]`` and the tokens read.

        Raises:
            BusyError: the queue is full.
        """

        def work() -> tuple[Probabilities, int]:
            model = self.classifier
            tokens = sum(model.count_tokens(text) for text in texts) if isinstance(model, CountsTokens) else 0
            return model.probabilities(texts), tokens

        return await self.call(work)

    async def second_opinion(self, texts: Sequence[str], confidences: Sequence[float]) -> list[str | None]:
        """The teacher's label for each text whose label the classifier was unsure of; None where its own stays."""
        router = self.router
        if router is None:
            return [None] * len(texts)
        labels = self.classifier.labels
        loop = asyncio.get_running_loop()
        asked = [
            loop.run_in_executor(None, router.label, text, labels, confidence)
            for text, confidence in zip(texts, confidences, strict=True)
        ]
        return list(await asyncio.gather(*asked))

    async def call(self, work: Callable[[], T]) -> T:
        """Run ``work`` on the model's thread. When the caller is cancelled, work that still waits is dropped.

        Raises:
            BusyError: the queue is full.
        """
        self._enter()
        started = time.perf_counter()
        try:
            if self._batch is not None:
                return await asyncio.wrap_future(self._batch.submit(work))
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        finally:
            self._leave(started)

    async def stream(self, start: Callable[[], Iterator[Delta]]) -> AsyncGenerator[Delta, None]:
        """The pieces of one answer. ``start`` and every step of its iterator run on a thread of the model's. Where the
        model writes in a batch, ``start`` may run beside a step, and what it gives joins the batch; an iterator that
        ``start`` has wrapped is followed by a thread of its own.

        Raises:
            BusyError: the queue is full.
        """
        self._enter()
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        pieces: Pieces = asyncio.Queue()
        gone = threading.Event()
        joined: list[BatchedStream] = []

        def put(piece: Delta | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        def work() -> None:
            try:
                if gone.is_set():
                    return
                source = start()
                if self._batch is not None and isinstance(source, BatchedStream):
                    joined.append(source)
                    if gone.is_set():
                        source.close()
                    self._batch.follow(source, loop, pieces)  # which ends with the None
                    return
                for piece in source:
                    put(piece)
                    if gone.is_set():
                        break
                else:
                    put(None)
                    return
                _close(source)
            except BaseException as error:  # noqa: BLE001 (raised again on the caller's side)
                put(error)
            put(None)

        future = loop.run_in_executor(self._readers, work)
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            gone.set()
            for source in joined:
                source.close()
            future.cancel()
            self._leave(started)

    def close(self) -> None:
        """End after the call at hand; calls that wait are dropped."""
        self.closed = True
        if self._batch is not None:
            self._batch.close()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._readers.shutdown(wait=True, cancel_futures=True)
        if self._batch is None:
            self.model.close()
        if self.router is not None:
            self.router.close()

    def _enter(self) -> None:
        if self._at_hand >= self.max_waiting:
            raise BusyError(self._at_hand, max(1, round(self._call_s * self._at_hand)))
        self._at_hand += 1

    def _leave(self, started: float) -> None:
        self._at_hand -= 1
        # What a caller waited, divided by those who waited with it: about the time of one call.
        share_s = (time.perf_counter() - started) / (self._at_hand + 1)
        self._call_s = 0.8 * self._call_s + 0.2 * share_s


def _first_that_opens(names: Sequence[str], opened: Callable[[str], Generator]) -> tuple[str, Generator]:
    """The first engine that takes the model, and its name; raises what the last one says."""
    for name in names[:-1]:
        try:
            return name, opened(name)
        except ModelError:  # a graph that this engine cannot read
            continue
    return names[-1], opened(names[-1])


def _close(source: Iterator[Delta]) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()
