"""Answers on disk, so that no answer is paid for twice.

One JSON line an answer, appended. Guarantees: an answer that :meth:`Journal.add` returned for survives a killed
process at once, and a power cut once the group was flushed (:data:`SYNC_EVERY` answers or :data:`SYNC_AFTER_S`
seconds, and on closing); a line torn by a kill is dropped when the journal is next opened; a damaged line costs that
one answer. Two processes do not write one journal at once: the second waits. In memory is where each answer stands, not
the answer: about 0.2 KB each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock

from slmops.artifacts import Message
from slmops.distill.teachers import TeacherRequest
from slmops.errors import CorruptArtifactError, StorageError
from slmops.runtime import Generation, GenerationRequest
from slmops.trust import digest_json

logger = logging.getLogger(__name__)

SYNC_EVERY = 32
SYNC_AFTER_S = 1.0


def request_digest(identity: str, request: GenerationRequest) -> str:
    """Digest of everything that the answer depends on: who is asked, what, and with which parameters."""
    asked = {
        "teacher": identity,
        "messages": _plain(request.messages),
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop),
    }
    if isinstance(request, TeacherRequest) and request.response_format is not None:
        asked["response_format"] = request.response_format
    return digest_json(asked)


def _plain(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [message.to_json() for message in messages]


class Journal:
    """Answers by request digest; a context manager.

    Raises:
        StorageError: the disk would not take it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(path.name + ".lock"))
        self._places: dict[bytes, tuple[int, int]] = {}
        self._size_bytes = 0
        self._descriptor = -1
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._load()
        except OSError as error:
            self._lock.release()
            raise StorageError.from_os_error(error, "keep the teacher's answers in", self.path) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
            self._lock.release()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and _short(digest) in self._places

    def get(self, digest: str) -> Generation | None:
        place = self._places.get(_short(digest))
        if place is None:
            return None
        try:
            entry = _read_line(os.pread(self._descriptor, place[1], place[0]))
        except OSError as error:
            raise StorageError.from_os_error(error, "read the teacher's answers in", self.path) from error
        if entry is None or entry[0] != digest:
            raise CorruptArtifactError(
                f"{self.path} changed while it was in use.", remedy="Leave it to one run at a time, and run again."
            )
        return entry[1]

    def add(self, digest: str, answer: Generation) -> None:
        """Write one answer down."""
        line = json.dumps(
            {
                "request": digest,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "completion_tokens": answer.completion_tokens,
            }
        )
        try:
            data = line.encode() + b"\n"
            _write_all(self._descriptor, data)
            self._unsynced += 1
            if self._unsynced >= SYNC_EVERY or time.monotonic() - self._synced_at >= SYNC_AFTER_S:
                os.fsync(self._descriptor)
                self._unsynced, self._synced_at = 0, time.monotonic()
        except OSError as error:
            raise StorageError.from_os_error(error, "keep the teacher's answers in", self.path) from error
        self._places[_short(digest)] = (self._size_bytes, len(data))
        self._size_bytes += len(data)

    def _load(self) -> None:
        whole_bytes = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                entry = _read_line(line)
                if entry is None:
                    logger.warning("%s, line %d is damaged; that answer is asked for again.", self.path, number)
                else:
                    self._places.setdefault(_short(entry[0]), (whole_bytes, len(line)))
                whole_bytes += len(line)
        os.ftruncate(self._descriptor, whole_bytes)
        self._size_bytes = whole_bytes


def _short(digest: str) -> bytes:
    """16 bytes that stand for the digest: no two of a million agree by chance."""
    return hashlib.blake2b(digest.encode(), digest_size=16).digest()


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_line(line: bytes) -> tuple[str, Generation] | None:
    try:
        raw = json.loads(line)
        finish = raw["finish_reason"]
        if not isinstance(raw["text"], str) or finish not in {"stop", "length"}:
            return None
        counts = int(raw["prompt_tokens"]), int(raw["completion_tokens"])
        return str(raw["request"]), Generation(raw["text"], finish, *counts)
    except (ValueError, KeyError, TypeError):
        return None
