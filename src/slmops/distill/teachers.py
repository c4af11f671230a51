"""What a teacher is to the rest: something that answers requests, in whatever order the answers come."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from slmops.artifacts import Message
from slmops.distill.budget import UNLIMITED, Ledger, Limits
from slmops.distill.retry import FailureKind
from slmops.runtime import Generation, GenerationRequest, Generator

BATCH_REQUESTS = 32


@dataclass(frozen=True)
class TeacherRequest(GenerationRequest):
    """A request that may also say in which form of JSON it wants its answer.

    ``response_format``: as in OpenAI's API; a teacher that does not know it leaves it out.
    """

    response_format: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TeacherFailure:
    """A request that got no answer in the end. ``kind`` "budget" or "time_limit": it was not asked."""

    kind: FailureKind
    detail: str


class TextTeacher(Protocol):
    """Answers requests with text."""

    @property
    def identity(self) -> str:
        """Names the teacher so that its answers are never taken for another's: part of the journal's key."""
        ...

    def answer(
        self, requests: Sequence[GenerationRequest], *, limits: Limits = UNLIMITED
    ) -> Iterator[tuple[int, Generation | TeacherFailure]]:
        """``(index of the request, answer or failure)`` in the order of completion, each index once.

        ``limits`` bound this call; what no longer fits fails as "budget" or "time_limit". Closing the iterator stops
        the work.

        Raises:
            TeacherError: nobody is there, the key is wrong, or going on is otherwise pointless.
        """
        ...


class LocalTeacher:
    """A teacher in this process. ``identity``: the digest or name of the model behind ``generator``."""

    def __init__(self, generator: Generator, *, identity: str, batch_requests: int = BATCH_REQUESTS) -> None:
        self._generator = generator
        self._batch_requests = batch_requests
        self.identity = identity

    def answer(
        self, requests: Sequence[GenerationRequest], *, limits: Limits = UNLIMITED
    ) -> Iterator[tuple[int, Generation | TeacherFailure]]:
        """As :meth:`TextTeacher.answer`; the limits are looked at between batches. It costs no money."""
        spent_tokens, begun_s = 0, time.monotonic()
        for start in range(0, len(requests), self._batch_requests):
            batch = requests[start : start + self._batch_requests]
            failure = None
            if limits.tokens is not None and spent_tokens >= limits.tokens:
                failure = TeacherFailure("budget", Ledger(limits, spent_tokens=spent_tokens).told())
            elif limits.time_s is not None and time.monotonic() - begun_s >= limits.time_s:
                failure = TeacherFailure("time_limit", f"{limits.time_s:g} s were over")
            if failure is not None:
                for index in range(start, len(requests)):
                    yield index, failure
                return
            for offset, generation in enumerate(self._generator.generate(batch)):
                spent_tokens += generation.prompt_tokens + generation.completion_tokens
                yield start + offset, generation


def estimated_tokens(messages: Sequence[Message]) -> int:
    """Prompt tokens where no tokenizer is at hand: one for three bytes and a few a turn, rather too many than few."""
    return sum(len(message.content.encode()) // 3 + 8 for message in messages)
