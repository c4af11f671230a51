"""What is known of one request while it is answered: times, counts, version, never a text.

:class:`Limits` makes a :class:`Watch` for every request and hands it to its observers (log, metrics, traces) when the
request has ended. Whoever learns something on the way notes it on :func:`watching`: the gate the key, the switch the
version, the service the adapter, the engine when its work began and each piece of text. Outside of a request, notes go
nowhere.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from slmops.runtime.base import Delta

T = TypeVar("T")
WATCH = "slmops.watch"
"""Where a scope carries its :class:`Watch`."""
SHADOW = "slmops.shadow"
"""In the scope of a request that nobody made: it is answered to compare, and neither counted nor recorded."""
LABEL_DIGITS = 12


@dataclass(slots=True)
class Watch:
    """
    ``path``        one of the known paths, or ``(another path)``: an unknown one may hold anything
    ``version``     short name of the version that answers; ``digest``: of its artifact, whole
    ``status``      499 where the caller went away before there was one
    ``queued_s``    from the first call of the engine until it began; None where no model was asked
    ``first_s``     from the request's arrival to the first piece of text
    ``last_s``      the same for the last piece
    ``key``         id of the caller's key
    """

    method: str = ""
    path: str = ""
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started_s: float = field(default_factory=time.perf_counter)
    started_ns: int = field(default_factory=time.time_ns)
    traceparent: str = ""
    status: int = 0
    spent_s: float = 0.0
    version: str = ""
    digest: str = ""
    adapter: str = ""
    key: str = ""
    queued_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def begun(self, work: Callable[[], T]) -> Callable[[], T]:
        """``work``, noting how long it waited from now until it runs. For the engine; any thread may run it."""
        asked_s = time.perf_counter()

        def timed() -> T:
            if self.queued_s is None:
                self.queued_s = time.perf_counter() - asked_s
            return work()

        return timed

    def piece(self, delta: Delta) -> None:
        """A piece of the answer has come."""
        now_s = time.perf_counter() - self.started_s
        if self.first_s is None:
            self.first_s = now_s
        self.last_s = now_s
        self.prompt_tokens += delta.prompt_tokens
        self.completion_tokens += delta.completion_tokens

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after the first; None below two tokens."""
        if self.first_s is None or self.last_s is None or self.completion_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.completion_tokens - 1)


class Observer(Protocol):
    """Told of every request once it has ended. Must be quick, and must not raise."""

    def __call__(self, watch: Watch) -> None: ...


_current: ContextVar[Watch | None] = ContextVar("watch", default=None)


def short(digest: str) -> str:
    """A version's name in metrics, logs and headers."""
    return digest.removeprefix("sha256:")[:LABEL_DIGITS] or "unversioned"


def watching() -> Watch:
    """The watch of the request at hand; one that nobody reads where there is none."""
    return _current.get() or Watch()


def watch_this(watch: Watch) -> None:
    """Make ``watch`` that of the running task, and of the tasks that it starts."""
    _current.set(watch)
