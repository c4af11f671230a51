"""One answer on its way, for engines that give one token at a time: ids in, text out, and why it ended."""

from __future__ import annotations

from collections.abc import Sequence

from slmops.chat import ChatTokenizer
from slmops.runtime.base import FinishReason
from slmops.runtime.stops import StopScanner


class Answer:
    """Does no inference. The token that ends the turn is not counted and is not text."""

    def __init__(
        self, prompt: list[int], max_tokens: int, end_ids: frozenset[int], chat: ChatTokenizer, stop: Sequence[str]
    ) -> None:
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.tokens = 0
        self.finish_reason: FinishReason | None = None
        self._end_ids = end_ids
        self._decoder = chat.stream_decoder()
        self._scanner = StopScanner(tuple(stop))

    def push(self, token: int) -> str:
        """Text that this token makes certain. Tokens after the end are ignored."""
        if self.finish_reason:
            return ""
        if token in self._end_ids:
            self.finish_reason = "stop"
            return ""
        self.tokens += 1
        text = self._scanner.push(self._decoder.push(token))
        if self._scanner.stopped:
            self.finish_reason = "stop"
        elif self.tokens >= self.max_tokens:
            self.finish_reason = "length"
        return text

    def ends(self, token: int) -> bool:
        """Whether this token closes an answer, and is no text of it."""
        return token in self._end_ids

    def end(self) -> None:
        """Nothing more may follow: a constraint is fulfilled."""
        self.finish_reason = self.finish_reason or "stop"

    def finish(self) -> str:
        """Text that was held back: half a character, or what might have become a stop text."""
        text = self._scanner.push(self._decoder.flush()) + self._scanner.flush()
        if self._scanner.stopped:
            self.finish_reason = "stop"
        return text
