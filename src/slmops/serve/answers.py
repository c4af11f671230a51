"""The bodies that go back, in OpenAI's shapes. Pure: text and counts in, plain JSON out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from fastapi.responses import JSONResponse

from slmops.artifacts import ToolCall
from slmops.runtime import TokenLogprob
from slmops.serve.pieces import Choice, Piece

Kind = Literal["chat", "text"]
_PREFIX: dict[Kind, str] = {"chat": "chatcmpl", "text": "cmpl"}


class PlainJSON(JSONResponse):
    """JSON of any text: half an emoji, out of broken input, becomes a question mark instead of an error."""

    def render(self, content: Any) -> bytes:
        return encoded(content)


def encoded(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def usage_of(choices: Sequence[Choice], each: int = 1) -> dict[str, int]:
    """The counts of all choices together. A prompt counts once, however many choices (``each``) it had."""
    return usage(sum(one.prompt_tokens for one in choices[::each]), sum(one.completion_tokens for one in choices))


class Envelope:
    """What all bodies of one answer share: id, time, model. ``logprobs``: the caller asked for them."""

    def __init__(self, kind: Kind, model: str, *, unique: str, created: int, logprobs: bool = False) -> None:
        self.kind = kind
        self._logprobs = logprobs
        self._head: dict[str, Any] = {"id": f"{_PREFIX[kind]}-{unique}", "created": created, "model": model}

    def whole(self, choices: Sequence[Choice], counts: dict[str, int]) -> dict[str, Any]:
        """The answer at once."""
        told = [
            {
                "index": index,
                **self._content(choice),
                "logprobs": self._told(choice.tokens, 0),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(choices)
        ]
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": told, "usage": counts}

    def piece(self, index: int, piece: Piece, before: Choice, *, first: bool = False) -> dict[str, Any]:
        """A chunk of a streamed answer; ``before``: the choice so far. The first one of a chat names the role."""
        about = {"logprobs": self._told(piece.tokens, len(before.text)), "finish_reason": piece.finish_reason}
        if self.kind == "chat":
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            if piece.text or (first and not piece.calls):
                delta["content"] = piece.text
            if piece.calls:
                start = len(before.calls)
                delta["tool_calls"] = [{"index": start + at, **call_body(one)} for at, one in enumerate(piece.calls)]
            choice = {"index": index, "delta": delta, **about}
            return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        choice = {"index": index, "text": piece.text, **about}
        return {**self._head, "object": "text_completion", "choices": [choice]}

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The chunk behind the last one, for those who asked for usage."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return {**self._head, "object": name, "choices": [], "usage": counts}

    def _content(self, choice: Choice) -> dict[str, Any]:
        if self.kind == "text":
            return {"text": choice.text}
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        if choice.calls:
            message |= {
                "content": choice.text or None,
                "tool_calls": [call_body(call) for call in choice.calls],
            }
        return {"message": message}

    def _told(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return _chat_logprobs(tokens) if self.kind == "chat" else _text_logprobs(tokens, offset)


def call_body(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def token_body(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.data)}


def token_bodies(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [{**token_body(token), "top_logprobs": [token_body(one) for one in token.top]} for token in tokens]


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    return {"content": token_bodies(tokens), "refusal": None}


def _text_logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The older form; ``offset``: characters of the answer before the first of ``tokens``."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{one.text: one.logprob for one in token.top} for token in tokens],
        "text_offset": offsets,
    }


def event(body: dict[str, Any] | str, *, name: str | None = None) -> bytes:
    """One server-sent event."""
    data = body.encode() if isinstance(body, str) else encoded(body)
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"
