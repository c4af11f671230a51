"""Logs as JSON, one object a line, without what callers wrote.

A request's line has its id, path, status, times, counts, version, adapter and the id of its key. The text of an
exception may hold what somebody wrote to the model, so that its type and its place are logged, never its text.

Lines of requests are written by a thread, some times a second: a request pays a few microseconds for its line, and a
process that is killed loses the lines of its last :data:`FLUSH_EVERY_S`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
import traceback
from typing import Any, TextIO

from slmops.serve.watch import Watch

FLUSH_EVERY_S = 0.2


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


class RequestLog:
    """An observer of requests that writes one line for each; see the module. Use as a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._waiting: list[tuple[float, Watch]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="request-log", daemon=True)

    def __call__(self, watch: Watch) -> None:
        self._waiting.append((time.time(), watch))

    def __enter__(self) -> RequestLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(FLUSH_EVERY_S):
            self._flush()
        self._flush()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        lines = "".join(f"{request_line(at_s, watch)}\n" for at_s, watch in waiting)
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed stream costs lines, no request
            self._stream.write(lines)
            self._stream.flush()


def request_line(at_s: float, watch: Watch) -> str:
    """The JSON of one request."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at_s))
    head = {"time": f"{moment}.{int(1e3 * (at_s % 1)):03d}Z", "level": "info", "logger": "slmops.serve"}
    return json.dumps({**head, **request_fields(watch)}, ensure_ascii=False)


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
