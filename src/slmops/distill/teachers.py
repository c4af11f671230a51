"""What a teacher is to the rest: something that answers requests, in whatever order the answers come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from slmops.artifacts import Message
from slmops.distill.retry import FailureKind
from slmops.runtime import Generation, GenerationRequest, Generator

BATCH_REQUESTS = 32


@dataclass(frozen=True)
class TeacherFailure:
    """A request that got no answer in the end. ``kind`` "budget": it was not asked, the token budget was spent."""

    kind: FailureKind
    detail: str


class TextTeacher(Protocol):
    """Answers requests with text."""

    @property
    def identity(self) -> str:
        """Names the teacher so that its answers are never taken for another's: part of the journal's key."""
        ...

    def answer(
        self, requests: Sequence[GenerationRequest], *, budget_tokens: int | None = None
    ) -> Iterator[tuple[int, Generation | TeacherFailure]]:
        """``(index of the request, answer or failure)`` in the order of completion, each index once.

        ``budget_tokens`` bounds prompt plus completion tokens of this call; what no longer fits fails as "budget".
        Closing the iterator stops the work.

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
        self, requests: Sequence[GenerationRequest], *, budget_tokens: int | None = None
    ) -> Iterator[tuple[int, Generation | TeacherFailure]]:
        """As :meth:`TextTeacher.answer`; the budget is looked at between batches."""
        spent_tokens = 0
        for start in range(0, len(requests), self._batch_requests):
            batch = requests[start : start + self._batch_requests]
            if budget_tokens is not None and spent_tokens >= budget_tokens:
                for index in range(start, len(requests)):
                    yield index, TeacherFailure("budget", f"{spent_tokens:,} tokens were spent")
                return
            for offset, generation in enumerate(self._generator.generate(batch)):
                spent_tokens += generation.prompt_tokens + generation.completion_tokens
                yield start + offset, generation


def estimated_tokens(messages: Sequence[Message]) -> int:
    """A rough upper bound of prompt tokens where no tokenizer is at hand: a token for three bytes, and a few a turn."""
    return sum(len(message.content.encode()) // 3 + 8 for message in messages)
