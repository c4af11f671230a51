"""One row of data, the same for every task.

A row is a conversation that ends with a user's turn, and the answer that is wanted: a label for classification and
NLI, text for the open tasks. It knows no model and no template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

ChatRole = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A function that an assistant's turn calls. ``arguments``: JSON text."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """As chat templates read it: with the arguments as an object, where they are one."""
        try:
            arguments = json.loads(self.arguments)
        except ValueError:
            arguments = self.arguments
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}


@dataclass(frozen=True)
class Message:
    """
    ``tool_calls``    of an assistant: the functions that it called
    ``tool_call_id``  of a tool's result: the call that it answers
    ``name``          of a tool's result: the function's
    """

    role: ChatRole
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def to_json(self) -> dict[str, Any]:
        raw: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            raw["tool_calls"] = [call.to_json() for call in self.tool_calls]
        return raw | {
            key: value for key, value in (("tool_call_id", self.tool_call_id), ("name", self.name)) if value is not None
        }


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
