"""The bodies that go back, in OpenAI's shapes. Pure: text and counts in, plain JSON out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

Kind = Literal["chat", "text"]
_PREFIX: dict[Kind, str] = {"chat": "chatcmpl", "text": "cmpl"}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Envelope:
    """What all bodies of one answer share: id, time, model."""

    def __init__(self, kind: Kind, model: str, *, unique: str, created: int) -> None:
        self.kind = kind
        self._head: dict[str, Any] = {"id": f"{_PREFIX[kind]}-{unique}", "created": created, "model": model}

    def whole(self, texts: Sequence[tuple[str, str]], counts: dict[str, int]) -> dict[str, Any]:
        """The answer at once. ``texts``: text and finish reason of each choice."""
        choices = [
            {"index": index, **self._content(text), "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(texts)
        ]
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": counts}

    def piece(self, text: str, finish_reason: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """A chunk of a streamed answer. The first one of a chat names the role; the last one says why it ended."""
        if self.kind == "chat":
            delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
            return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "text_completion", "choices": [choice]}

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk behind the last one, for those who asked for usage."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": [], "usage": counts}

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}} if self.kind == "chat" else {"text": text}


def event(body: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    data = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data}\n\n".encode("utf-8", "replace")
