"""What the monitor's tests share: rows and answers with few words."""

from __future__ import annotations

import json
from typing import Any

from slmops.artifacts import Message
from slmops.artifacts.events import Answered

NOW = 1_800_000_000.0


def row(number: int = 0, **changes: Any) -> dict[str, Any]:
    """An event as the log keeps it."""
    base: dict[str, Any] = {
        "id": f"id-{number}",
        "request_id": f"req-{number}",
        "at": NOW + number,
        "kind": "classify",
        "model": "m",
        "version": "v",
        "adapter": "",
        "status": 200,
        "latency_ms": 2.0,
        "first_ms": None,
        "prompt_tokens": 7,
        "completion_tokens": 1,
        "label": "refund",
        "confidence": 0.9,
        "finish_reason": "stop",
        "format_ok": True,
        "input_chars": 20,
        "output_chars": 6,
        "subject": None,
        "slices": "{}",
        "messages": None,
        "output": None,
        "sketch": None,
        "novelty": None,
    }
    return {**base, **changes}


def turns(text: str) -> str:
    return json.dumps([{"role": "user", "content": text}])


def said(event: str, **changes: Any) -> dict[str, Any]:
    """Feedback as the log keeps it."""
    base = {"event": event, "subject": "", "at": NOW, "score": None, "correction": None, "comment": None}
    return {**base, **changes}


def answered(number: int = 0, **changes: Any) -> Answered:
    base: dict[str, Any] = {
        "id": f"id-{number}",
        "request_id": f"req-{number}",
        "at": NOW + number,
        "kind": "chat",
        "model": "anything",
        "status": 200,
        "latency_ms": 2.0,
        "messages": (Message("user", "where is my card?"),),
        "output": "on its way",
    }
    return Answered(**{**base, **changes})
