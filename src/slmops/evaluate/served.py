"""A server that is being judged: asked over HTTP as its callers ask it, and looked at from outside.

Every caller of :class:`Served` has connections of its own, kept open. An answer is told with its status and its time,
whatever it is; only a server that cannot be reached is an error.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from slmops.errors import ServeError

ASK_LIMIT_S = 120.0


@dataclass(frozen=True)
class Reply:
    """``body`` is None where it is not JSON. ``ms`` includes the way there and back."""

    status: int
    body: Any
    ms: float
    headers: dict[str, str]

    @property
    def error(self) -> dict[str, Any] | None:
        """The error in OpenAI's form, if it is one."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error if isinstance(error, dict) and {"message", "type", "param", "code"} <= set(error) else None


class Served:
    """``pid``: of the server's process, for its memory; 0 where it is not on this machine."""

    def __init__(self, url: str, *, pid: int = 0, key: str | None = None) -> None:
        parts = urlsplit(url)
        self.url, self.pid = url, pid
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._own = threading.local()

    def get(self, path: str) -> Reply:
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: Any) -> Reply:
        return self._ask("POST", path, json.dumps(body).encode("utf-8", "surrogatepass"), {})

    def post_raw(self, path: str, body: bytes, content_type: str = "application/json") -> Reply:
        """Bytes as they are, also such as are no JSON."""
        return self._ask("POST", path, body, {"Content-Type": content_type})

    def memory_bytes(self) -> int | None:
        """Pages of the server's process that no file backs, with what was swapped out."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return None
        found = [1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "VmSwap:"))]
        return sum(found) if found else None

    def _ask(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> Reply:
        for fresh in (False, True):
            connection = self._connection(fresh=fresh)
            started = time.perf_counter()
            try:
                connection.request(method, path, body, {"Content-Type": "application/json", **self._headers, **headers})
                response = connection.getresponse()
                raw = response.read()
            except (OSError, http.client.HTTPException) as error:
                if fresh:
                    raise ServeError(f"The server at {self.url} does not answer {path}: {error!r}.") from None
                continue  # a connection that was kept open may have been closed meanwhile
            ms = 1e3 * (time.perf_counter() - started)
            return Reply(response.status, _json(raw), ms, {k.lower(): v for k, v in response.getheaders()})
        raise AssertionError

    def _connection(self, *, fresh: bool) -> http.client.HTTPConnection:
        kept: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if kept is None or fresh:
            if kept is not None:
                kept.close()
            kept = self._own.connection = http.client.HTTPConnection(self._host, self._port, timeout=ASK_LIMIT_S)
        return kept


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return None
