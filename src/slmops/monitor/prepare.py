"""From an answer to the row that is kept of it. Pure: what is not in the row was never written.

Guarantees: texts are redacted, subjects hashed, slices limited to the keys that the policy names, and redacted too.
Where the policy keeps no texts, none is in the row; figures are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.artifacts.events import Answered, Feedback
from slmops.monitor.policy import MonitorPolicy
from slmops.monitor.sketch import F16, sketch
from slmops.privacy import Recognizer, SubjectKey, redact

FormatCheck = Callable[[str], bool]
SLICE_CHARACTERS = 64
ID_CHARACTERS = 200


@dataclass(frozen=True)
class Preparation:
    """
    ``model``      what callers name it: what they wrote is not kept, for it may be anything
    ``format_ok``  whether an answer has the form that the task asks for; None where it asks for none
    ``surprisal``  of the training texts' features (:mod:`slmops.monitor.sketch`); None where they are not known
    """

    policy: MonitorPolicy
    key: SubjectKey
    recognizers: Sequence[Recognizer] = ()
    model: str = ""
    version: str = ""
    format_ok: FormatCheck | None = None
    surprisal: F16 | None = None

    def event(self, answered: Answered, *, sketched: bool) -> dict[str, Any]:
        """The row of an answer. ``sketched``: its text may become numbers."""
        kept = self.policy.content != "off" and keeps(self.policy, answered.id)
        asked = self.redact(answered.input) if (sketched or kept) and answered.messages else ""
        numbers = sketch(asked, self.surprisal) if sketched and asked else None
        row = {
            "id": answered.id[:ID_CHARACTERS],
            "request_id": answered.request_id[:ID_CHARACTERS],
            "at": answered.at,
            "kind": answered.kind,
            "model": self.model,
            "version": answered.version or self.version,
            "adapter": answered.adapter[:ID_CHARACTERS] if answered.status < 400 else "",
            "status": answered.status,
            "latency_ms": answered.latency_ms,
            "first_ms": answered.first_ms,
            "prompt_tokens": answered.prompt_tokens,
            "completion_tokens": answered.completion_tokens,
            "label": answered.label,
            "confidence": answered.confidence,
            "finish_reason": answered.finish_reason,
            "format_ok": self._format_ok(answered),
            "input_chars": len(answered.input) if answered.messages else None,
            "output_chars": len(answered.output) if answered.status < 400 else None,
            "subject": self.subject(answered.subject),
            "slices": to_text(self.slices(answered.slices)) if answered.slices else "{}",
            "messages": self._messages(answered, asked) if kept else None,
            "output": self.redact(answered.output) if kept and answered.status < 400 else None,
            "sketch": None if numbers is None else numbers.numbers,
            "novelty": None if numbers is None else numbers.novelty,
        }
        return {name: plain(value) for name, value in row.items()}

    def feedback(self, given: Feedback, event_id: str) -> dict[str, Any]:
        """The row of what was said of the event ``event_id``. A subject has one say an answer."""
        subject = self.subject(given.subject)
        row = {
            "event": event_id,
            "subject": subject or "",
            "at": given.at,
            "score": given.score,
            "correction": self.redact(given.correction),
            "comment": self.redact(given.comment),
        }
        return {name: plain(value) for name, value in row.items()}

    def subject(self, subject: str | None) -> str | None:
        return self.key.hash(subject) if subject else None

    def slices(self, told: Mapping[str, str]) -> dict[str, str]:
        return {key: self.redact(told[key])[:SLICE_CHARACTERS] for key in self.policy.slices if told.get(key)}

    def redact(self, text: Any) -> Any:
        return redact(text, self.recognizers) if isinstance(text, str) else None

    def _messages(self, answered: Answered, asked: str) -> str:
        """Redacted turns as JSON; the last one is redacted already."""
        turns = [{"role": one.role, "content": self.redact(one.content)} for one in answered.messages[:-1]]
        last = [{"role": answered.messages[-1].role, "content": asked}] if answered.messages else []
        return to_text([*turns, *last])

    def _format_ok(self, answered: Answered) -> bool | None:
        if answered.status >= 400 or not (answered.output or answered.messages):
            return None
        if answered.wants_json:
            return is_json(answered.output)
        return None if self.format_ok is None else self.format_ok(answered.output)


to_text = json.JSONEncoder(ensure_ascii=False, sort_keys=True).encode
"""JSON as it is kept; ``json.dumps`` would make a new encoder each time."""


def plain(value: Any) -> Any:
    """A text as every database takes it: without NUL and half characters."""
    if not isinstance(value, str) or (value.isascii() and "\0" not in value):
        return value
    return value.replace("\0", "").encode("utf-8", "replace").decode()


def keeps(policy: MonitorPolicy, answer_id: str) -> bool:
    """Whether the texts of this answer are kept: the same for the same answer, whenever it is asked."""
    if policy.content != "sampled":
        return policy.content == "full"
    drawn = int.from_bytes(hashlib.blake2b(answer_id.encode("utf-8", "replace"), digest_size=8).digest(), "big")
    return drawn < policy.sample * 2**64


def format_check(task: str, labels: Sequence[str] = ()) -> FormatCheck | None:
    """What an answer of this task must look like, as far as its text alone can tell."""
    known = frozenset(labels)
    if known:
        return lambda text: text in known
    match task:
        case "extraction":
            return is_json
        case "math":
            return lambda text: any(character.isdigit() for character in text)
        case _:
            return lambda text: bool(text.strip())


def is_json(text: str) -> bool:
    """One JSON value and nothing around it."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
