"""What a batch does not do, done by the same model's engine for one answer at a time.

Guarantees: it is opened when it is needed first (which holds the weights a second time from then on), and used by one
thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from slmops.runtime.base import Delta, GenerationRequest, Generator

T = TypeVar("T")


def needs_care(request: GenerationRequest) -> bool:
    """Whether a batch cannot write this answer as it was asked for: each token's logits have to be looked at."""
    return request.constraint is not None or request.top_logprobs is not None


class Careful:
    """See the module. ``opener`` opens a generator with ``stream_ids``."""

    def __init__(self, opener: Callable[[], Generator]) -> None:
        self._opener = opener
        self._model: Any = None
        self._lock = threading.Lock()

    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]:
        """One answer; whoever asks meanwhile waits for its end."""
        with self._lock:
            yield from self._opened().stream_ids(prompt, request)

    def use(self, work: Callable[[Any], T]) -> T:
        """Run ``work`` with the generator."""
        with self._lock:
            return work(self._opened())

    def embed(self, texts: Sequence[str]) -> Any:
        """As the engine does. Raises :class:`NotImplementedError` where it shows no states."""

        def ask(model: Any) -> Any:
            if not hasattr(model, "embed"):
                raise NotImplementedError(f"{type(model).__name__} does not show its states.")
            return model.embed(texts)

        return self.use(ask)

    def close(self) -> None:
        with self._lock:
            if self._model is not None:
                self._model.close()
            self._model = None

    def _opened(self) -> Any:
        if self._model is None:
            self._model = self._opener()
        return self._model
