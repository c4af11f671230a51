"""What is seen of a model's logits while it writes one answer: which tokens may come next, and how likely they were.

The engine shows each position's logits before a token is chosen, and tells the token afterwards. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.chat import ChatTokenizer
from slmops.runtime.base import GenerationRequest, TokenLogprob
from slmops.runtime.constraint import FORBIDDEN, Masks, TokenMask
from slmops.runtime.sampling import log_softmax


class Guide:
    """One answer's. ``masks``: the model's vocabulary for constraints, made when it is needed first."""

    def __init__(self, request: GenerationRequest, chat: ChatTokenizer, masks: Callable[[int], Masks]) -> None:
        self._constraint, self._top = request.constraint, request.top_logprobs
        self._chat, self._masks = chat, masks
        self._mask: TokenMask | None = None
        self._logprobs: NDArray[np.float32] | None = None
        self._tokens: list[TokenLogprob] = []

    @property
    def finished(self) -> bool:
        """The constraint lets nothing more follow."""
        return self._mask is not None and self._mask.finished

    def see(self, logits: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Take the logits ``[vocabulary]`` of the position; which tokens may come, or None where all may.

        Raises:
            ConstraintError: the constraint cannot be kept to.
        """
        if self._top is not None:
            self._logprobs = log_softmax(logits)
        if self._constraint is None:
            return None
        if self._mask is None:
            self._mask = self._masks(logits.size).start(self._constraint)
        return self._mask.allowed()

    def took(self, token: int, *, ends: bool) -> None:
        """The token that was chosen at the position seen last; ``ends``: it closes the answer and is no text."""
        if ends:
            return
        if self._mask is not None:
            self._mask.push(token)
        if self._logprobs is not None and self._top is not None:
            likeliest = top_tokens(self._logprobs, self._top)
            told = tuple(self._told(one, float(self._logprobs[one])) for one in likeliest)
            self._tokens.append(self._told(token, float(self._logprobs[token]), told))

    def flush(self) -> tuple[TokenLogprob, ...]:
        """The tokens since the last call."""
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def _told(self, token: int, logprob: float, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        data = self._chat.bytes_of(token)
        return TokenLogprob(data.decode("utf-8", "replace"), data, logprob, top)


def top_tokens(logprobs: NDArray[np.float32], count: int) -> list[int]:
    """The ``count`` likeliest tokens, best first."""
    if count <= 0:
        return []
    count = min(count, logprobs.size)
    some = np.argpartition(-logprobs, count - 1)[:count]
    return [int(token) for token in some[np.argsort(-logprobs[some], kind="stable")]]


def masked(logits: NDArray[Any], allowed: NDArray[np.bool_]) -> NDArray[Any]:
    """The logits with those that may not come out of reach."""
    return np.where(allowed, logits, np.asarray(FORBIDDEN, logits.dtype))
