"""Who may ask what: the gate in front of every path.

Guarantees: a key that stands in a URL is refused, whether keys are asked for or not, and never logged; with keys, every
path but the health checks needs one whose scope covers it; a key over its limits is told when to come again; without
keys the paths for administration are shut. A caller learns that a key is wrong, not why.
"""

from __future__ import annotations

import math
from urllib.parse import parse_qsl, unquote

from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.serve.errors import ApiError
from slmops.serve.keys import PREFIX, Key, KeyRing
from slmops.serve.keys import Scope as KeyScope
from slmops.serve.watch import Watch, watching

OPEN_PATHS = frozenset({"/health", "/health/live", "/health/ready"})
KEY_NAMES = frozenset(
    {"key", "api_key", "api-key", "apikey", "token", "access_token", "auth", "authorization", "bearer", "secret"}
)


class Access:
    """ASGI middleware; see the module."""

    def __init__(self, app: ASGIApp, keys: KeyRing | None) -> None:
        self.app = app
        self.keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.check(scope)
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """
        Raises:
            ApiError: the request may not go on.
        """
        path = scope["path"]
        if _names_a_key(path, scope["query_string"].decode("latin-1")):
            raise ApiError(
                400,
                "A key in a URL ends up in logs and histories: send it as 'Authorization: Bearer KEY'. Take this one "
                "for known to others, and have it revoked.",
                code="key_in_url",
            )
        if path in OPEN_PATHS:
            return
        needed = needed_scope(path)
        if self.keys is None:
            if needed == "admin":
                raise ApiError(
                    403, "Administration needs keys: start the server with --keys FILE.", code="keys_required"
                )
            return
        key = self._key(scope)
        watching().key = key.id
        if not key.allows(needed):
            raise ApiError(
                403, f"This key may not do that: it lacks the scope '{needed}'.", kind="permission_error",
                code="insufficient_scope",
            )  # fmt: skip
        self._count(key)

    def spent(self, watch: Watch) -> None:
        """An observer: the tokens of a request count against its key."""
        if self.keys is not None and watch.key:
            self.keys.spend(watch.key, watch.prompt_tokens + watch.completion_tokens)

    def _key(self, scope: Scope) -> Key:
        assert self.keys is not None
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        kind, _, text = given.partition(" ")
        key = self.keys.find(text.strip()) if kind.lower() == "bearer" else None
        if key is None:
            what = "No key was sent" if not given else "The key is not one of this server's"
            raise ApiError(
                401, f"{what}: send one as 'Authorization: Bearer KEY'.", kind="authentication_error",
                code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        return key

    def _count(self, key: Key) -> None:
        assert self.keys is not None
        wait_s = self.keys.wait_s(key)
        if wait_s:
            again_s = max(1, math.ceil(wait_s))
            raise ApiError(
                429, f"This key is over its limit. Try again in {again_s} s.", kind="rate_limit_error",
                code="rate_limit_exceeded", headers={"Retry-After": str(again_s)},
            )  # fmt: skip


def needed_scope(path: str) -> KeyScope:
    """What a key must be allowed for ``path``; an unknown path is not told from a known one without a key."""
    if path.startswith("/admin/"):
        return "admin"
    if path == "/metrics":
        return "metrics"
    return "feedback" if path == "/v1/feedback" else "infer"


def _names_a_key(path: str, query: str) -> bool:
    if PREFIX in path or PREFIX in unquote(query):
        return True
    return any(name.lower() in KEY_NAMES and value for name, value in parse_qsl(query, keep_blank_values=True))
