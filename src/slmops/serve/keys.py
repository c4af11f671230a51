"""API keys: made here, kept as keyed hashes, scoped, limited, revoked at any time.

A key is ``slm_ID_SECRET``: the id finds it, the secret has 256 random bits. The file holds HMAC-SHA256 of each whole
key under a second secret, which lies in a file of its own beside it (``NAME.secret``): whoever gets the file of keys
alone can neither use nor test one. Guessing is hopeless by length, so the hash is a quick one and a request costs
microseconds. Both files are readable by their owner alone. A running server sees changes within a second.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from slmops.errors import CorruptArtifactError, ServeError, StorageError, UsageError

Scope = Literal["infer", "feedback", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "slm_"
KEY = re.compile(r"slm_([a-z0-9]{8})_([A-Za-z0-9_-]{43})")
RELOAD_EVERY_S = 1.0
SCHEMA = 1


@dataclass(frozen=True)
class Key:
    """
    ``hash``               HMAC-SHA256 of the whole key, hexadecimal
    ``per_minute``         requests at most, in bursts of as many; None: no limit
    ``tokens_per_minute``  tokens read and written at most; counted when an answer has ended
    ``expires``            Unix time; None: never
    """

    id: str
    name: str
    hash: str
    scopes: tuple[Scope, ...] = ("infer", "feedback")
    per_minute: int | None = None
    tokens_per_minute: int | None = None
    created: int = 0
    expires: int | None = None

    def allows(self, scope: Scope) -> bool:
        """``admin`` is allowed to read metrics too, and nothing else that it does not name."""
        return scope in self.scopes or (scope == "metrics" and "admin" in self.scopes)

    def told(self) -> dict[str, Any]:
        """For people: everything but the hash."""
        return {name: value for name, value in asdict(self).items() if name != "hash"}


@dataclass
class Bucket:
    """A token bucket. ``level`` may fall below zero: what was used is only known afterwards."""

    per_minute: int
    level: float = field(default=-1.0)
    at_s: float | None = None

    def refill(self, now_s: float) -> None:
        if self.at_s is None:
            self.level = float(self.per_minute)
        else:
            self.level = min(self.per_minute, self.level + (now_s - self.at_s) * self.per_minute / 60)
        self.at_s = now_s

    def wait_s(self, now_s: float, wanted: float = 1.0) -> float:
        """Seconds until ``wanted`` can be taken; 0 where it can be now."""
        self.refill(now_s)
        return max(0.0, (wanted - self.level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self.level -= amount


class KeyFile:
    """The keys at ``path``, for those who make and revoke them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.secret_path = path.with_name(path.name + ".secret")

    def read(self) -> tuple[Key, ...]:
        """
        Raises:
            ServeError: there is no such file.
            CorruptArtifactError: it cannot be read as keys.
        """
        try:
            raw = json.loads(self.path.read_text("utf-8"))
            return tuple(_key(one) for one in raw["keys"])
        except FileNotFoundError:
            raise ServeError(
                f"There is no file of keys at {self.path}.",
                remedy=f"Make one: slmops keys make NAME --keys {self.path}",
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtifactError(f"{self.path} holds no keys that can be read: {error}.") from None

    def make(
        self,
        name: str,
        scopes: Sequence[Scope],
        *,
        per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        days: int | None = None,
        now: Callable[[], float] = time.time,
    ) -> tuple[Key, str]:
        """A new key, added to the file; and its text, which is nowhere else from now on.

        Raises:
            UsageError: no scope, an unknown one, or a name that is taken.
            StorageError: the disk would not take it; the file is as it was.
        """
        unknown = [scope for scope in scopes if scope not in SCOPES]
        if unknown or not scopes:
            raise UsageError(
                f"{', '.join(unknown) or 'Nothing'} is no scope.", remedy=f"Choose among {', '.join(SCOPES)}."
            )
        with self._locked():
            keys = self.read() if self.path.exists() else ()
            if any(key.name == name for key in keys):
                raise UsageError(
                    f"There is a key named {name!r} already.", remedy="Choose another, or revoke it first."
                )
            key_id = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))
            text = f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
            created = int(now())
            expires = None if days is None else created + 86_400 * days
            hashed = keyed_hash(text, self.secret(make=True))
            made = Key(key_id, name, hashed, tuple(scopes), per_minute, tokens_per_minute, created, expires)
            self._write((*keys, made))
        return made, text

    def revoke(self, which: str) -> Key:
        """Take away the key of that id or name.

        Raises:
            UsageError: there is none.
        """
        with self._locked():
            keys = self.read()
            found = next((key for key in keys if which in (key.id, key.name)), None)
            if found is None:
                raise UsageError(f"There is no key {which!r}.", remedy="slmops keys list shows them.")
            self._write([key for key in keys if key is not found])
        return found

    def secret(self, *, make: bool = False) -> bytes:
        """What the hashes are keyed with.

        Raises:
            ServeError: it is missing: no key can be checked any more.
        """
        try:
            return bytes.fromhex(self.secret_path.read_text("ascii").strip())
        except FileNotFoundError:
            if not make or self.path.exists():
                raise ServeError(
                    f"{self.secret_path} is missing: without it no key of {self.path} can be checked.",
                    remedy="Bring it back, or remove the file of keys and make new ones.",
                ) from None
        except ValueError:
            raise CorruptArtifactError(f"{self.secret_path} is damaged.", remedy="Bring it back.") from None
        made = secrets.token_bytes(32)
        _write_private(self.secret_path, made.hex() + "\n")
        return made

    def _write(self, keys: Sequence[Key]) -> None:
        told = {"schema": SCHEMA, "keys": [asdict(key) for key in keys]}
        _write_private(self.path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")

    def _locked(self) -> Any:
        from filelock import FileLock

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError.from_os_error(error, "write", self.path) from None
        return FileLock(self.path.with_name(self.path.name + ".lock"))


class KeyRing:
    """The keys as a server uses them: looked up, counted against their limits, read again when the file changes.

    A file that is damaged while the server runs changes nothing: the keys stay as they were.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.file = KeyFile(path)
        self._clock = clock
        self._stamp = self._stamp_now()
        self._keys: Mapping[str, Key] = {key.id: key for key in self.file.read()}
        self._secret = self.file.secret()
        self._looked_s = clock()
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}

    def find(self, text: str) -> Key | None:
        """The key whose text this is, if it is one of ours and has not expired."""
        self._refresh()
        match = KEY.fullmatch(text)
        key = self._keys.get(match.group(1)) if match else None
        if key is None or not hmac.compare_digest(keyed_hash(text, self._secret), key.hash):
            return None
        return key if key.expires is None or key.expires > time.time() else None

    def wait_s(self, key: Key) -> float:
        """Take one request of ``key``; or the seconds after which it may come again."""
        now_s = self._clock()
        buckets = [
            self._bucket(self._requests, key.id, key.per_minute),
            self._bucket(self._tokens, key.id, key.tokens_per_minute),
        ]
        waits = [bucket.wait_s(now_s) for bucket in buckets if bucket is not None]
        if any(waits):
            return max(waits)
        if buckets[0] is not None:
            buckets[0].take(1)
        return 0.0

    def spend(self, key_id: str, tokens: int) -> None:
        """``tokens`` were read and written for this key."""
        bucket = self._tokens.get(key_id)
        if bucket is not None:
            bucket.take(tokens)

    @staticmethod
    def _bucket(buckets: dict[str, Bucket], key_id: str, per_minute: int | None) -> Bucket | None:
        if per_minute is None:
            buckets.pop(key_id, None)
            return None
        if key_id not in buckets or buckets[key_id].per_minute != per_minute:
            buckets[key_id] = Bucket(per_minute)
        return buckets[key_id]

    def _refresh(self) -> None:
        now_s = self._clock()
        if now_s - self._looked_s < RELOAD_EVERY_S:
            return
        self._looked_s = now_s
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return
        try:
            self._keys = {key.id: key for key in self.file.read()}
            self._secret = self.file.secret()
            self._stamp = stamp
        except (ServeError, CorruptArtifactError) as error:
            from logging import getLogger

            getLogger(__name__).error("%s The keys stay as they were.", error)

    def _stamp_now(self) -> tuple[int, int, int]:
        try:
            found = self.file.path.stat()
        except OSError:
            return (0, 0, 0)
        return (found.st_mtime_ns, found.st_size, found.st_ino)


def keyed_hash(text: str, secret: bytes) -> str:
    """HMAC-SHA256, hexadecimal."""
    return hmac.new(secret, text.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


def _key(raw: Mapping[str, Any]) -> Key:
    known = {name: raw[name] for name in Key.__dataclass_fields__ if name in raw}
    return replace(Key(**known), scopes=tuple(raw["scopes"]))


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, for its owner's eyes."""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageError.from_os_error(error, "write", path) from None
