"""What an exchange over HTTP says. Pure: bytes and headers in, plain values out; what cannot be read is None."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

ANSWER_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/classify", "/v1/responses"})
"""Paths whose answers are the model's."""
FEEDBACK_PATH = "/v1/feedback"
SUBJECT_HEADER, ID_HEADER, VERSION_HEADER = b"x-slmops-subject", b"x-request-id", b"x-slmops-version"

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Feedback:
    """``score`` from 0 to 1; ``correction``: the answer that would have been right."""

    id: str
    score: float | None
    correction: str | None


def header(headers: Headers, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in headers if key.lower() == name), None)


def subject_of(headers: Headers, body: bytes) -> str | None:
    """Who asks, as far as they say: the header, or ``user`` in the body. None: each request is a subject of its own."""
    if named := header(headers, SUBJECT_HEADER):
        return named
    raw = _object(body)
    user = raw.get("user") if raw else None
    return user if isinstance(user, str) and user else None


def answer_of(headers: Headers, body: bytes) -> tuple[str | None, str | None]:
    """Id and text of an answer, whole or streamed; of a classifier its labels, one a line."""
    named = header(headers, ID_HEADER)
    if (header(headers, b"content-type") or "").startswith("text/event-stream"):
        pieces = [piece for line in body.split(b"\n") if (piece := _object(line.removeprefix(b"data: ")))]
        texts = [text for piece in pieces if (text := _text(piece, "delta")) is not None]
        ids = [str(piece["id"]) for piece in pieces if "id" in piece]
        return (ids[0] if ids else named), "".join(texts)
    try:
        raw = json.loads(body)
    except ValueError:
        return named, None
    if isinstance(raw, list):
        return named, "\n".join(str(one.get("label")) for one in raw if isinstance(one, dict))
    if not isinstance(raw, dict):
        return named, None
    if isinstance(raw.get("results"), list):
        labels = "\n".join(str(one.get("label")) for one in raw["results"] if isinstance(one, dict))
        return str(raw["id"]) if "id" in raw else named, labels
    return str(raw["id"]) if "id" in raw else named, _text(raw, "message")


def feedback_of(body: bytes) -> Feedback | None:
    """What a caller thought of an answer; None where it says nothing that could be counted."""
    raw = _object(body)
    if not raw or not isinstance(raw.get("id"), str):
        return None
    score, correction = raw.get("score"), raw.get("correction")
    usable = isinstance(score, int | float) and 0 <= score <= 1
    value = float(score) if usable and score is not None else None
    told = correction if isinstance(correction, str) and correction else None
    return None if value is None and told is None else Feedback(raw["id"], value, told)


def _text(raw: dict[str, Any], part: str) -> str | None:
    try:
        choice = raw["choices"][0]
        text = choice["text"] if "text" in choice else choice[part].get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) else None


def _object(text: bytes) -> dict[str, Any] | None:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None
