"""What all engines share that are asked in our own token ids: the template is rendered here, never by the engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer, Tools
from slmops.runtime.base import Ability, Delta, GenerationRequest
from slmops.runtime.constraint import Masks
from slmops.runtime.guide import Guide

ABILITIES: frozenset[Ability] = frozenset({"json_schema", "grammar", "logprobs", "tools"})
"""What an engine can do beside writing text where its logits are looked at before each token."""


class Prompted(ABC):
    """A subclass sets ``_chat``, and ``_end_ids``: the tokens that end an answer."""

    _chat: ChatTokenizer
    _end_ids: frozenset[int]
    _masks: Masks | None = None

    @property
    def chat(self) -> ChatTokenizer:
        """Tokenizer and template of the model."""
        return self._chat

    @property
    def abilities(self) -> frozenset[Ability]:
        """What it can do beside writing text."""
        return ABILITIES

    def count_tokens(self, messages: Sequence[Message], tools: Tools = ()) -> int:
        """Tokens of the prompt, template and functions included."""
        return len(self._chat.encode_prompt(messages, tools))

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text, for :meth:`stream_ids`: no template, only what the tokenizer itself adds."""
        return self._chat.encode(text)

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """One answer, piece by piece; the last piece has the finish reason and the counts. Closing the iterator ends
        the work after the token at hand.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
        """
        return self.stream_ids(self._chat.encode_prompt(request.messages, request.tools), request)

    @abstractmethod
    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]:
        """Like :meth:`stream`, for a prompt that is ids already; ``request.messages`` is not read."""

    def _guide_of(self, request: GenerationRequest) -> Guide | None:
        """Looks at the logits before each token, where the request needs that."""
        if request.constraint is None and request.top_logprobs is None:
            return None
        return Guide(request, self._chat, self._masks_of)

    def _masks_of(self, vocabulary: int) -> Masks:
        if self._masks is None:
            self._masks = Masks(self._chat, vocabulary, self._end_ids)
        return self._masks
