"""From the bytes of a request and its response to the answers in them. Pure; called off the request's path.

It reads the wire and not the code behind it, so every path that speaks OpenAI's forms is understood alike, whole or
streamed. What cannot be read is left out, never guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from slmops.artifacts import ChatRole, Message
from slmops.artifacts.events import Answered

KINDS: Mapping[str, str] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    "/v1/responses": "response",
    "/v1/classify": "classify",
    "/v1/embeddings": "embedding",
}
"""Paths whose answers are told, and what they are called."""

SUBJECT_HEADER, SLICE_HEADER = b"x-slmops-subject", b"x-slmops-slice"
ROLES = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True)
class Seen:
    """One request with its response. ``notes``: what the service told beside them."""

    kind: str
    request_id: str
    at: float
    status: int
    latency_ms: float
    first_ms: float | None
    headers: tuple[tuple[bytes, bytes], ...]
    request: tuple[bytes, ...]
    response: tuple[bytes, ...]
    streamed: bool
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Choice:
    text: str = ""
    finish_reason: str | None = None
    label: str | None = None
    confidence: float | None = None


@dataclass(frozen=True)
class _Response:
    id: str = ""
    choices: tuple[_Choice, ...] = ()
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def answers_of(seen: Seen) -> list[Answered]:
    """The answers of one request; one without text where it failed."""
    body = _json_object(b"".join(seen.request))
    asked = conversations(seen.kind, body)
    response = _response(seen) if seen.status < 400 else _Response()
    choices = response.choices or (_Choice(),)
    name = response.id or seen.request_id
    model, _, adapter = str(body.get("model") or "").partition(":")
    confidences = seen.notes.get("confidences") or ()
    return [
        Answered(
            id=name if len(choices) == 1 else f"{name}-{index}",
            request_id=seen.request_id,
            at=seen.at,
            kind=seen.kind,
            model=model,
            status=seen.status,
            latency_ms=seen.latency_ms,
            version=str(seen.notes.get("version") or ""),
            adapter=str(seen.notes.get("adapter") or adapter),
            first_ms=seen.first_ms,
            prompt_tokens=_share(response.prompt_tokens, seen.notes.get("prompt_tokens"), len(choices), index),
            completion_tokens=_share(
                response.completion_tokens, seen.notes.get("completion_tokens"), len(choices), index
            ),
            label=choice.label or (choice.text if index < len(confidences) else None),
            confidence=confidences[index] if index < len(confidences) else choice.confidence,
            finish_reason=choice.finish_reason,
            wants_json=_wants_json(body),
            messages=asked[index] if index < len(asked) else asked[-1] if asked else (),
            output=choice.text,
            subject=_subject(body, seen.headers),
            slices=_slices(body, seen.headers),
        )
        for index, choice in enumerate(choices)
    ]


def conversations(kind: str, body: Mapping[str, Any]) -> list[tuple[Message, ...]]:
    """What was asked: one conversation a text, in the order of the answers."""
    match kind:
        case "chat":
            return [_messages(body.get("messages"))]
        case "response":
            given = body.get("input")
            own = _messages(given) if isinstance(given, list) else (Message("user", str(given or "")),)
            system = body.get("instructions")
            return [(Message("system", system), *own) if isinstance(system, str) else own]
    given = body.get("prompt" if kind == "completion" else "input")
    texts = given if isinstance(given, list) else [given]
    return [(Message("user", text),) for text in texts if isinstance(text, str)]


def _messages(raw: Any) -> tuple[Message, ...]:
    found = []
    for one in raw if isinstance(raw, list) else ():
        if isinstance(one, dict) and "role" in one:
            role = "system" if one["role"] == "developer" else one["role"]
            if role in ROLES:
                found.append(Message(cast("ChatRole", role), _text(one.get("content"))))
    return tuple(found)


def _text(content: Any) -> str:
    """A message's content: a text, or parts of which some are text."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part)


def _response(seen: Seen) -> _Response:
    whole = b"".join(seen.response)
    if seen.streamed:
        return _from_events(list(_events(whole)))
    raw = _loads(whole)
    if seen.kind == "classify":
        rows = raw if isinstance(raw, list) else (raw.get("data") or raw.get("results")) if raw else None
        head = raw if isinstance(raw, dict) else {}
        return _Response(str(head.get("id") or ""), tuple(map(_labelled, rows or ())), *_usage(head))
    body = raw if isinstance(raw, dict) else {}
    return _Response(str(body.get("id") or ""), tuple(_choices(body)), *_usage(body))


def _labelled(row: Any) -> _Choice:
    raw = row if isinstance(row, dict) else {}
    label, confidence = raw.get("label"), raw.get("confidence")
    text = label if isinstance(label, str) else ""
    return _Choice(text, "stop", text or None, float(confidence) if isinstance(confidence, int | float) else None)


def _choices(body: Mapping[str, Any]) -> Iterator[_Choice]:
    for choice in body.get("choices") or ():
        message = choice.get("message") or {}
        yield _Choice(_text(message.get("content")) or str(choice.get("text") or ""), choice.get("finish_reason"))
    output = [item for item in body.get("output") or () if isinstance(item, dict) and item.get("type") == "message"]
    if output:
        reason = (body.get("incomplete_details") or {}).get("reason")
        text = "".join(_text(item.get("content")) for item in output)
        yield _Choice(text, "length" if reason == "max_output_tokens" else "stop")


def _events(whole: bytes) -> Iterator[Mapping[str, Any]]:
    for line in whole.splitlines():
        if line.startswith(b"data:"):
            raw = _loads(line[5:].strip())
            if isinstance(raw, dict):
                yield raw


def _from_events(events: Sequence[Mapping[str, Any]]) -> _Response:
    """The pieces of a stream, put together by choice."""
    texts: dict[int, str] = {}
    reasons: dict[int, str | None] = {}
    name = ""
    tokens: tuple[int | None, int | None] = (None, None)
    for event in events:
        if isinstance(done := event.get("response"), dict):  # the last event of a response holds all of it
            name, tokens = str(done.get("id") or name), _usage(done) if done.get("usage") else tokens
            for index, choice in enumerate(_choices(done)):
                texts[index], reasons[index] = choice.text, choice.finish_reason
            continue
        name, tokens = str(event.get("id") or name), _usage(event) if event.get("usage") else tokens
        for choice in event.get("choices") or ():
            index = int(choice.get("index") or 0)
            piece = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            texts[index] = texts.get(index, "") + piece
            reasons[index] = choice.get("finish_reason") or reasons.get(index)
    return _Response(name, tuple(_Choice(texts[index], reasons.get(index)) for index in sorted(texts)), *tokens)


def _usage(body: Mapping[str, Any]) -> tuple[int | None, int | None]:
    usage = body.get("usage") or {}
    prompt = usage.get("prompt_tokens", usage.get("input_tokens"))
    written = usage.get("completion_tokens", usage.get("output_tokens"))
    return prompt if isinstance(prompt, int) else None, written if isinstance(written, int) else None


def _share(told: int | None, noted: Any, among: int, index: int) -> int | None:
    """A request's tokens over its answers, so that they add up."""
    tokens = told if told is not None else noted if isinstance(noted, int) else None
    return None if tokens is None else tokens // among + (index < tokens % among)


def _wants_json(body: Mapping[str, Any]) -> bool:
    wanted = body.get("response_format")
    return isinstance(wanted, dict) and str(wanted.get("type", "")).startswith("json")


def _header(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> str | None:
    return next((value.decode("utf-8", "replace") for key, value in headers if key == name), None)


def _subject(body: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    named = _header(headers, SUBJECT_HEADER) or body.get("safety_identifier") or body.get("user")
    return named if isinstance(named, str) and named else None


def _slices(body: Mapping[str, Any], headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    found = body.get("metadata")
    slices = {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
    for pair in (_header(headers, SLICE_HEADER) or "").split(","):
        key, separator, value = pair.partition("=")
        if separator and key.strip():
            slices[key.strip()] = value.strip()
    return slices


def _loads(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _json_object(raw: bytes) -> Mapping[str, Any]:
    found = _loads(raw)
    return found if isinstance(found, dict) else {}
