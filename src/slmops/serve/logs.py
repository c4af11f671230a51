"""Logs as JSON, one object a line, without what callers wrote.

A request's line has its id, path, status, times, counts, version, adapter and the id of its key. The text of an
exception may hold what somebody wrote to the model, so that its type and its place are logged, never its text.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any, TextIO

from slmops.serve.watch import Watch


class JsonFormatter(logging.Formatter):
    """One JSON object a record: ``time`` (UTC), ``level``, ``logger``, ``message``; and of a request its figures."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        watch = getattr(record, "watch", None)
        told |= request_fields(watch) if isinstance(watch, Watch) else {"message": record.getMessage()}
        if record.exc_info and record.exc_info[0]:
            told["error"] = record.exc_info[0].__name__
            told["where"] = "".join(traceback.format_tb(record.exc_info[2]))
        return json.dumps(told, ensure_ascii=False)


def request_fields(watch: Watch) -> dict[str, Any]:
    """A request's line; what is not known is left out."""
    told: dict[str, Any] = {
        "message": "request",
        "id": watch.id,
        "method": watch.method,
        "path": watch.path,
        "status": watch.status,
        "ms": _ms(watch.spent_s),
        "version": watch.version,
        "adapter": watch.adapter,
        "key": watch.key,
        "queue_ms": _ms(watch.queued_s),
        "first_token_ms": _ms(watch.first_s),
        "prompt_tokens": watch.prompt_tokens,
        "completion_tokens": watch.completion_tokens,
    }
    return {name: value for name, value in told.items() if value not in (None, "")}


def log_as_json(stream: TextIO | None = None, *, level: int = logging.INFO) -> None:
    """Send every log of this process to ``stream`` (standard error) as JSON."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger("uvicorn").propagate = True
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
