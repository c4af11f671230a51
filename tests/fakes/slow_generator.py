"""A generator that counts slowly and says when it was stopped: for what is about time, not about text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from slmops.artifacts import Message
from slmops.runtime.base import Delta, Generation, GenerationRequest, TextScore


class SlowGenerator:
    """Writes ``1 2 3 ...``, one number every ``step_s``, and none while ``running`` is clear. ``written`` counts over
    all answers; ``stopped`` is set when an answer was given up before its end."""

    def __init__(self, step_s: float = 0.02) -> None:
        self.step_s = step_s
        self.written = 0
        self.stopped = threading.Event()
        self.running = threading.Event()
        self.running.set()
        self.fail_at: int | None = None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        raise NotImplementedError

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        whole = False
        try:
            for number in range(1, request.max_tokens + 1):
                if number == self.fail_at:
                    raise KeyError(request.messages[-1].content)
                time.sleep(self.step_s)
                self.running.wait()
                self.written += 1
                yield Delta(f"{number} ")
            whole = True
            yield Delta("", "length", 1, request.max_tokens)
        finally:
            if not whole:
                self.stopped.set()

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        raise NotImplementedError

    def close(self) -> None:
        pass
