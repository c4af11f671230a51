"""One row of data, the same for every task.

A row is a conversation that ends with a user's turn, and the answer that is wanted: a label for classification and
NLI, text for the open tasks. It knows no model and no template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ChatRole = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    role: ChatRole
    content: str

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Row:
    """
    ``id``        unique within its data set
    ``messages``  the conversation so far; the last one is the user's
    ``target``    the wanted answer, or None where only the teacher can say
    ``meta``      columns that were kept as they came (for slices), never used for training
    """

    id: str
    messages: tuple[Message, ...]
    target: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What a classifier reads: the last user turn."""
        return self.messages[-1].content

    def to_json(self) -> dict[str, Any]:
        raw: dict[str, Any] = {"id": self.id, "messages": [m.to_json() for m in self.messages], "target": self.target}
        return {**raw, "meta": dict(self.meta)} if self.meta else raw

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Row:
        messages = tuple(Message(m["role"], m["content"]) for m in raw["messages"])
        return cls(str(raw["id"]), messages, raw.get("target"), raw.get("meta", {}))
