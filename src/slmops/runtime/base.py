"""One way to run a model, whatever engine is underneath.

A model answers in one of two forms. A :class:`Classifier` gives a distribution over a closed label set in one forward
pass. A :class:`Generator` writes text token by token, and can say how likely a given text was.
Engines are chosen by :func:`slmops.runtime.open_generator` and :func:`slmops.runtime.open_classifier`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message

FinishReason = Literal["stop", "length"]
Probabilities = NDArray[np.float32]
States = NDArray[np.float32]


Ability = Literal["json_schema", "grammar", "logprobs", "tools"]
"""What an engine may be able to do beside writing text: keep to a JSON schema, keep to a grammar, tell how likely its
tokens were, tell the model of functions."""


@dataclass(frozen=True)
class Constraint:
    """What an answer has to keep to while it is written, token by token.

    ``kind``    ``json_schema``, or ``grammar``: Lark as llguidance reads it, with rules ``%json {...}``
    ``source``  the schema as JSON text, or the grammar
    ``tags``    of a grammar: texts that it calls ``tag0``, ``tag1``, ...; each is a token of its own where the
                tokenizer has one. ``until0`` is any text up to the first ``tag0``, and ``TEXT`` any text
    """

    kind: Literal["json_schema", "grammar"]
    source: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """
    ``max_tokens``    new tokens at most
    ``temperature``   0 is greedy
    ``seed``          makes sampling repeatable on the same machine
    ``stop``          texts that end the answer; they are not part of it
    ``adapter``       of a model with several: its name; ``""`` is the base alone, None what the model is set to
    ``tools``         functions that the model is told of, in the form of OpenAI's chat completions
    ``constraint``    what the answer has to keep to
    ``top_logprobs``  tell how likely each token was, and so many of the likeliest beside it; None tells nothing

    The last three are for engines that say so in their ``abilities``; see :func:`abilities_of`.
    """

    messages: tuple[Message, ...]
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    adapter: str | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    constraint: Constraint | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """One token of an answer. ``data``: its bytes, of which ``text`` is the readable form. ``logprob``: in nats, under
    the model's own distribution: before temperature, ``top_p`` and constraint. ``top``: the likeliest tokens there."""

    text: str
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A whole answer. ``logprob`` is the sum over the answer's tokens where the engine tells it (nats)."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprob: float | None = None


@dataclass(frozen=True)
class Delta:
    """A piece of a streamed answer. The last one has a ``finish_reason`` and counts, and the answer's ``logprob`` as
    :class:`Generation` has it. ``tokens``: those since the piece before, where the request asked for
    ``top_logprobs``."""

    text: str
    finish_reason: FinishReason | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: tuple[TokenLogprob, ...] = ()
    logprob: float | None = None


@dataclass(frozen=True)
class TextScore:
    """``logprob``: sum over the target's tokens (nats), end-of-turn included. ``tokens``: how many. ``bytes``: UTF-8
    length of the target, so that models with unlike tokenizers compare (bits per byte)."""

    logprob: float
    tokens: int
    bytes: int


class Classifier(Protocol):
    """Distribution over ``labels`` in one forward pass."""

    @property
    def labels(self) -> tuple[str, ...]: ...

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """``[len(texts), len(labels)]`` float32; each row sums to 1. Rows come back in the order given."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class StatefulClassifier(Classifier, Protocol):
    """A classifier that also shows what it decides from."""

    def states_and_probabilities(self, texts: Sequence[str]) -> tuple[States, Probabilities]:
        """The mean hidden state over each text's tokens, ``[len(texts), hidden]`` float32, and the distribution."""
        ...


class Generator(Protocol):
    """Text out of messages."""

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of the requests; the engine batches as it likes."""
        ...

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """One answer, piece by piece. Closing the iterator stops the work."""
        ...

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """How likely each target is after its messages.

        Raises:
            NotImplementedError: this engine does not give log-probabilities of given text.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class LogitGenerator(Generator, Protocol):
    """A generator that shows its distribution over a given text."""

    def target_logits(self, messages: tuple[Message, ...], target: str) -> NDArray[np.float32]:
        """Logits that predict each token of ``target`` after ``messages``, the end of the turn included:
        ``[tokens, vocabulary]`` float32.

        Raises:
            ContextLengthError: both do not fit in the context.
            NotImplementedError: the graph gives the logits of the last position alone.
        """
        ...


@runtime_checkable
class OwnTokenizer(Protocol):
    """An engine with a tokenizer of its own, which programs other than slmops would use with the same files."""

    def engine_tokens(self, text: str) -> list[int]:
        """Ids of plain text, as the engine makes them."""
        ...


@runtime_checkable
class Embeds(Protocol):
    """A model that shows what it makes of a text."""

    def embed(self, texts: Sequence[str]) -> tuple[States, int]:
        """The mean of the last hidden state over each text's tokens, ``[len(texts), width]`` float32, and the tokens
        read.

        Raises:
            ContextLengthError: a text is longer than the model can read.
            NotImplementedError: the graph does not give its states.
        """
        ...


def abilities_of(model: object) -> frozenset[Ability]:
    """What ``model`` says it can do beside writing text; an engine that says nothing can do no more."""
    return frozenset(getattr(model, "abilities", ()))
