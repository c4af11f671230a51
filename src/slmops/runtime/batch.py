"""Many answers in one batch that is never closed: a request joins between two steps of the model, and leaves alone.

Guarantees: :meth:`BatchGenerator.stream_ids` may be called from any thread, and closing a stream too; all else happens
in :meth:`BatchGenerator.step`, which belongs to one thread at a time. A request that cannot be taken ends its own
stream and no other; a step that fails ends all that run, and is raised. A stream that is closed costs its neighbours
no more than the step at hand. Where nobody drives the batch (:attr:`BatchGenerator.driven`), whoever waits for a piece
steps it.
Not covered: which request goes first when the engine has no room (engines take them as they came).
"""

from __future__ import annotations

import queue
import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import ContextLengthError, ServeError
from slmops.runtime.answer import Answer
from slmops.runtime.base import Delta, Generation, GenerationRequest, Generator, TextScore
from slmops.runtime.careful import Careful, needs_care
from slmops.runtime.description import ModelDescription
from slmops.runtime.prompted import Prompted

Piece = Delta | Exception
Listener = Callable[[Piece], None]


class BatchedStream(Iterator[Delta]):
    """One answer of a batch. ``logprob``: sum over its tokens so far (nats), where the engine tells it."""

    def __init__(self, batch: BatchGenerator, request: GenerationRequest, answer: Answer) -> None:
        self.request = request
        self.answer = answer
        self.logprob = 0.0
        self.gone = False
        self.ended = False
        self._batch = batch
        self._pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        self._listener: Listener | None = None
        self._lock = threading.Lock()

    def __next__(self) -> Delta:
        if self.gone or (self.ended and self._pieces.empty()):
            raise StopIteration
        piece = self._batch.wait_for(self)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def close(self) -> None:
        """Nobody wants the rest: the answer leaves the batch at the next step."""
        self.gone = True
        self._batch.woken()

    def listen(self, listener: Listener) -> None:
        """Hand every piece to ``listener``, those that are here already first. It runs on the thread that steps."""
        with self._lock:
            while not self._pieces.empty():
                listener(self._pieces.get())
            self._listener = listener

    def put(self, piece: Piece, *, last: bool = False) -> None:
        """The batch's side."""
        with self._lock:
            self.ended = self.ended or last
            if self._listener is not None:
                self._listener(piece)
            else:
                self._pieces.put(piece)

    def ready(self) -> bool:
        return not self._pieces.empty()

    def take(self) -> Piece:
        """The next piece; waits until another thread has put it."""
        return self._pieces.get()


class BatchGenerator(Prompted):
    """A generator whose answers share the model's steps; see the module. Engines fill in the last four methods."""

    def __init__(
        self,
        chat: ChatTokenizer,
        description: ModelDescription,
        context_tokens: int,
        end_ids: Iterable[int],
        careful: Careful,
    ) -> None:
        self._chat = chat
        self._careful = careful
        self.description = description
        self._context_tokens = context_tokens
        self._end_ids = frozenset(end_ids)
        self._arrived: deque[BatchedStream] = deque()
        self._running: list[BatchedStream] = []
        self._closed = False
        self.tells_logprobs = False
        """Whether answers tell how likely they were (``logprob``): costs some percent of the speed."""
        self.driven: Callable[[], None] | None = None
        """Who steps the batch sets this: called when there may be something to do."""

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        return self._context_tokens

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._arrived or self._running)

    @property
    def running(self) -> int:
        """Answers at hand."""
        return len(self._running)

    def embed(self, texts: Sequence[str]) -> Any:
        """As the engine for one answer at a time does: mean states ``[len(texts), width]``, and the tokens read."""
        return self._careful.embed(texts)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of ``requests``, all of them in the batch at once.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
        """
        streams = [self.stream(request) for request in requests]
        return [_whole(stream) for stream in streams]

    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]:
        """Like :meth:`stream`, for a prompt that is ids already; ``request.messages`` is not read."""
        if needs_care(request):
            return self._careful.stream_ids(prompt, request)
        if len(prompt) + 1 > self._context_tokens:
            raise ContextLengthError(len(prompt), self._context_tokens)
        self.description.adapter_of(request.adapter)
        room = min(request.max_tokens, self._context_tokens - len(prompt))
        stream = BatchedStream(self, request, Answer(prompt, room, self._end_ids, self._chat, request.stop))
        self._arrived.append(stream)
        if self._closed:
            self.fail_all(ServeError("The engine is closed.", remedy="Ask again."))
        self.woken()
        return stream

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """As the engine for one answer at a time does."""
        return self._careful.use(lambda model: cast("Generator", model).score(conversations))

    def woken(self) -> None:
        """Tell whoever drives the batch."""
        if self.driven is not None:
            self.driven()

    def wait_for(self, stream: BatchedStream) -> Piece:
        """The next piece of ``stream``; steps the batch where nobody else does."""
        while self.driven is None and not stream.ready():
            self.step()
        return stream.take()

    def step(self) -> None:
        """Let go what nobody waits for, take in what came, and write the next tokens of all.

        Raises:
            Exception: whatever the engine raised; every running stream has ended with it.
        """
        self._let_go()
        try:
            self._take_in()
            if self._running:
                for stream, token, logprob in self._advance():
                    self._push(stream, token, logprob)
        except Exception as error:
            self.fail_all(error)
            raise

    def fail_all(self, error: Exception) -> None:
        """End every answer that runs or waits with ``error``."""
        waiting = [*self._running, *self._arrived]
        self._running.clear()
        self._arrived.clear()
        for stream in waiting:
            stream.put(error, last=True)

    def close(self) -> None:
        """Free the model. The generator cannot be used afterwards."""
        self._closed = True
        self.fail_all(ServeError("The engine is closed.", remedy="Ask again."))
        self._free()
        self._careful.close()

    def _let_go(self) -> None:
        for stream in [one for one in self._running if one.gone]:
            self._running.remove(stream)
            self._drop(stream)

    def _take_in(self) -> None:
        while self._arrived and len(self._running) < self._most():
            stream = self._arrived.popleft()
            if stream.gone:
                continue
            try:
                self._admit(stream)
            except (ValueError, TypeError, KeyError) as error:  # this request, not the engine
                stream.put(error, last=True)
                continue
            self._running.append(stream)

    def _push(self, stream: BatchedStream, token: int, logprob: float) -> None:
        answer = stream.answer
        if stream.ended:
            return
        before = answer.tokens
        text = answer.push(token)
        if answer.tokens > before:
            stream.logprob += logprob
        if answer.finish_reason:
            self._finish(stream, text)
        elif text:
            stream.put(Delta(text))

    def _finish(self, stream: BatchedStream, text: str = "") -> None:
        """The last piece of an answer, which leaves the batch."""
        answer = stream.answer
        text += answer.finish()
        reason = answer.finish_reason or "length"
        logprob = stream.logprob if self.tells_logprobs else None
        stream.put(Delta(text, reason, len(answer.prompt), answer.tokens, logprob=logprob), last=True)
        self._running.remove(stream)
        self._drop(stream)

    def _most(self) -> int:
        """Answers that may run at once."""
        return 64

    @abstractmethod
    def _admit(self, stream: BatchedStream) -> None:
        """Take the request into the engine. :class:`ValueError`: it cannot be served, and nothing is wrong else."""

    @abstractmethod
    def _advance(self) -> Iterable[tuple[BatchedStream, int, float]]:
        """One step of the model: the new token of each running answer, and its log-probability (nats)."""

    @abstractmethod
    def _drop(self, stream: BatchedStream) -> None:
        """Free what the engine holds for an answer that has ended or was given up."""

    @abstractmethod
    def _free(self) -> None:
        """Free the model."""


def _whole(stream: Iterator[Delta]) -> Generation:
    pieces = list(stream)
    last = pieces[-1]
    text = "".join(piece.text for piece in pieces)
    return Generation(text, last.finish_reason or "stop", last.prompt_tokens, last.completion_tokens, last.logprob)
