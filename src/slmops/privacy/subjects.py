"""Whose request it was, without keeping who that is: HMAC-SHA-256 under a key that stays on this machine.

Guarantees: the same subject gives the same 32 hex digits under the same key, so that all of a person's rows can be
found and deleted; without the key nobody can tell a subject from its hash, not even by trying all telephone numbers.
Servers that write to one database need the same key file. Not covered: a lost key; the rows written under it are only
found by their age then.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from slmops.errors import StorageError, UsageError

KEY_BYTES = 32
HASH_DIGITS = 32


@dataclass(frozen=True)
class SubjectKey:
    """``secret`` is never shown, logged or exported."""

    secret: bytes

    def __repr__(self) -> str:
        return "SubjectKey(…)"

    def hash(self, subject: str) -> str:
        """32 hex digits."""
        return hmac.new(self.secret, subject.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:HASH_DIGITS]

    @classmethod
    def at(cls, path: Path) -> SubjectKey:
        """The key in the file at ``path``, which is made at the first call, readable by its owner alone.

        Raises:
            UsageError: the file holds no key.
            StorageError: it can be neither read nor written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                    file.write(secrets.token_hex(KEY_BYTES))
            except FileExistsError:
                pass
            text = path.read_text("ascii").strip()
            secret = bytes.fromhex(text)
        except OSError as error:
            raise StorageError.from_os_error(error, "keep the key of subjects at", path) from None
        except ValueError:
            secret = b""
        if len(secret) != KEY_BYTES:
            raise UsageError(
                f"{path} holds no key of {KEY_BYTES} bytes in hex digits.",
                remedy="Put the right key back; with another one, earlier subjects cannot be found.",
            )
        return cls(secret)
