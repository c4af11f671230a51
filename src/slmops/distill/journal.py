"""Answers on disk, so that no answer is paid for twice.

One JSON line an answer, appended. Guarantees: an answer that :meth:`Journal.add` returned for survives a killed
process at once, and a power cut once the group was flushed (:data:`SYNC_EVERY` answers or :data:`SYNC_AFTER_S`
seconds, and on closing); a line torn by a kill is dropped when the journal is next opened; a damaged line costs that
one answer. Two processes do not write one journal at once: the second waits.
"""

from __future__ import annotations

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
from slmops.errors import StorageError
from slmops.runtime import Generation, GenerationRequest
from slmops.trust import digest_json

logger = logging.getLogger(__name__)

SYNC_EVERY = 32
SYNC_AFTER_S = 1.0


def request_digest(identity: str, request: GenerationRequest) -> str:
    """Digest of everything that the answer depends on: who is asked, what, and with which parameters."""
    return digest_json(
        {
            "teacher": identity,
            "messages": _plain(request.messages),
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            "stop": list(request.stop),
        }
    )


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
        self._answers: dict[str, Generation] = {}
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
        return len(self._answers)

    def get(self, digest: str) -> Generation | None:
        return self._answers.get(digest)

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
            _write_all(self._descriptor, line.encode() + b"\n")
            self._unsynced += 1
            if self._unsynced >= SYNC_EVERY or time.monotonic() - self._synced_at >= SYNC_AFTER_S:
                os.fsync(self._descriptor)
                self._unsynced, self._synced_at = 0, time.monotonic()
        except OSError as error:
            raise StorageError.from_os_error(error, "keep the teacher's answers in", self.path) from error
        self._answers[digest] = answer

    def _load(self) -> None:
        whole_bytes = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                whole_bytes += len(line)
                entry = _read_line(line)
                if entry is None:
                    logger.warning("%s, line %d is damaged; that answer is asked for again.", self.path, number)
                else:
                    self._answers.setdefault(*entry)
        os.ftruncate(self._descriptor, whole_bytes)


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
