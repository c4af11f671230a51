"""What a server tells of its answers, and what people say of them.

These hold text as it came: whoever writes them down redacts first. They are told from the server to a recorder, so both
know them from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slmops.artifacts.rows import Message


@dataclass(frozen=True)
class Answered:
    """One answer as it left the server.

    ``id``           what feedback names it by: the answer's own id, or the request's
    ``request_id``   the ``X-Request-Id`` of the response; several answers may share it
    ``at``           when the request came, in seconds since 1970
    ``kind``         ``chat``, ``completion``, ``response``, ``classify``, ``embedding``
    ``version``      digest of what answered; ``adapter``: of a model with several
    ``first_ms``     until the first piece of a stream
    ``label``        of a classifier, with its ``confidence``
    ``wants_json``   the request asked for JSON
    ``subject``      whose request it was, as the caller names them
    ``slices``       what the caller says of the request, for figures by group
    """

    id: str
    request_id: str
    at: float
    kind: str
    model: str
    status: int
    latency_ms: float
    version: str = ""
    adapter: str = ""
    first_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    label: str | None = None
    confidence: float | None = None
    finish_reason: str | None = None
    wants_json: bool = False
    messages: tuple[Message, ...] = ()
    output: str = ""
    subject: str | None = None
    slices: Mapping[str, str] = field(default_factory=dict)

    @property
    def input(self) -> str:
        """What the model was asked last."""
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True)
class Feedback:
    """What a person says of an answer.

    ``answer_id``   an answer's id, or that of the request where there was one answer
    ``score``       from 0 (bad) to 1 (good)
    ``correction``  what the answer should have been
    """

    answer_id: str
    at: float
    score: float | None = None
    correction: str | None = None
    comment: str | None = None
    subject: str | None = None
