"""Confidence routing: what the model is unsure of goes to its teacher, and how often that happened, at what cost.

A classifier's confidence is the probability of its label. A generator's is the geometric mean of its tokens'
probabilities, ``exp(mean log-probability)``; its answer is therefore written whole before the caller gets any of it.

Guarantees: :func:`goes_up` decides, and nothing else; a teacher that fails costs no answer, the model's own is given
and the failure counted. Whether the teacher may be asked at all was decided when it was opened
(:func:`slmops.runtime.upstream.check_allowed`).
Not covered: whether the teacher is right; answers under a constraint, and continuations of plain text, stay here.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slmops.artifacts import Message
from slmops.errors import SlmopsError
from slmops.runtime.base import Delta, GenerationRequest, Generator
from slmops.runtime.careful import needs_care

log = logging.getLogger(__name__)
LABEL_TOKENS = 32
LABEL_PROMPT = "Which of these labels fits the text? Answer with the label alone.\n\nLabels:\n{labels}\n\nText:\n{text}"


Outcome = Literal["own", "teacher", "teacher_failed"]
"""Whose answer the caller got; ``teacher_failed``: the model's own, after the teacher was asked in vain."""


@dataclass(frozen=True)
class Policy:
    """
    ``threshold``             answers less sure than this go to the teacher; 0 sends none, 1 nearly all
    ``own_cost_per_1000``     money for 1,000 answers of the model, whatever the currency
    ``teacher_cost_per_1000``  the same for the teacher
    """

    threshold: float
    own_cost_per_1000: float = 0.0
    teacher_cost_per_1000: float = 0.0


@dataclass(frozen=True)
class Tally:
    """``asked``: answers that were judged; ``sent``: those that the teacher gave; ``failed``: he was asked in vain."""

    asked: int = 0
    sent: int = 0
    failed: int = 0


def goes_up(confidence: float | None, threshold: float) -> bool:
    """Whether an answer that is so sure of itself goes to the teacher; one of which that is not known stays. Pure."""
    return confidence is not None and confidence < threshold


def confidence_of(delta: Delta) -> float | None:
    """Of a whole answer, by its last piece; None where the engine does not tell, or where it is empty."""
    if delta.logprob is None or delta.completion_tokens <= 0:
        return None
    return math.exp(delta.logprob / delta.completion_tokens)


def told(tally: Tally, policy: Policy) -> dict[str, Any]:
    """What ``GET /v1/routing`` says. A question that was sent up costs both: the model was asked first. Pure."""
    sent = tally.sent + tally.failed
    share = sent / tally.asked if tally.asked else 0.0
    return {
        "threshold": policy.threshold,
        "requests": tally.asked,
        "to_teacher": tally.sent,
        "teacher_failed": tally.failed,
        "share": share,
        "own_cost_per_1000": policy.own_cost_per_1000,
        "teacher_cost_per_1000": policy.teacher_cost_per_1000,
        "blended_cost_per_1000": policy.own_cost_per_1000 + share * policy.teacher_cost_per_1000,
    }


def label_in(answer: str, labels: Sequence[str]) -> str | None:
    """The label that the teacher named; None where it is none of them. Pure."""
    plain = answer.strip().strip("\"'`.").casefold()
    return next((label for label in labels if label.casefold() == plain), None)


class Router:
    """Counts and asks. May be used from several threads."""

    def __init__(self, teacher: Generator, policy: Policy) -> None:
        self.policy = policy
        self.on_answer: Callable[[Outcome], None] = lambda _: None
        """Told of every answer that was judged, on the thread that judged it."""
        self._teacher = teacher
        self._tally = Tally()
        self._lock = threading.Lock()

    def told(self) -> dict[str, Any]:
        """Shares and costs so far."""
        return told(self._tally, self.policy)

    def routed(self, own: Iterator[Delta], request: GenerationRequest) -> Iterator[Delta]:
        """``own``, or the teacher's answer in its place where the model was unsure."""
        pieces = list(own)
        if not goes_up(confidence_of(pieces[-1]), self.policy.threshold):
            self._count()
            yield from pieces
            return
        try:
            answer = list(self._teacher.stream(request))
        except SlmopsError as error:
            log.warning("the teacher failed: %s", type(error).__name__)
            self._count("teacher_failed")
            yield from pieces
            return
        self._count("teacher")
        yield from answer

    def label(self, text: str, labels: Sequence[str], confidence: float) -> str | None:
        """The teacher's label for a text that a classifier is so sure of; None where the classifier's own stays."""
        if not goes_up(confidence, self.policy.threshold):
            self._count()
            return None
        prompt = LABEL_PROMPT.format(labels="\n".join(labels), text=text)
        try:
            (answer,) = self._teacher.generate([GenerationRequest((Message("user", prompt),), max_tokens=LABEL_TOKENS)])
            label = label_in(answer.text, labels)
        except SlmopsError as error:
            log.warning("the teacher failed: %s", type(error).__name__)
            label = None
        self._count("teacher_failed" if label is None else "teacher")
        return label

    def close(self) -> None:
        self._teacher.close()

    def _count(self, outcome: Outcome = "own") -> None:
        with self._lock:
            tally = self._tally
            sent, failed = outcome == "teacher", outcome == "teacher_failed"
            self._tally = Tally(tally.asked + 1, tally.sent + sent, tally.failed + failed)
        self.on_answer(outcome)


class RoutedGenerator:
    """A generator whose unsure answers come from its teacher; all else is the generator's own."""

    def __init__(self, model: Generator, router: Router) -> None:
        self._model, self._router = model, router

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        """As the model's; whole before the first piece."""
        own = self._model.stream(request)
        return own if needs_care(request) else self._router.routed(own, request)
