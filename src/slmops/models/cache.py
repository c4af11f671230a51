"""The place on disk where fetched models are kept.

Guarantees: a folder under its final name is whole (written under a temporary name, flushed, renamed); one process at a
time writes it, others wait and then find it; a digest is computed again only when a file's size, inode or times have
changed. Digests of folders that belong to the user are kept here too: nothing is written beside a user's files.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slmops.artifacts import MANIFEST_NAME
from slmops.artifacts.base import is_storage_trouble, sync_directory, sync_tree
from slmops.errors import SlmopsError, StorageError
from slmops.trust import FileDigest, digest_bytes, digest_file

CACHE_VARIABLE = "SLMOPS_CACHE"
_MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model", ".tiktoken", ".gguf"})

logger = logging.getLogger(__name__)


def cache_root(cache: Path | None = None) -> Path:
    """``cache``, or ``$SLMOPS_CACHE``, or ``~/.cache/slmops`` (``$XDG_CACHE_HOME/slmops``)."""
    if cache is not None:
        return cache.expanduser().absolute()
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "slmops"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path``; wait for whoever has it. The system frees it when a process dies."""
    with storage_errors("write to", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("Waiting for another process that holds %s.", path)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def staged(destination: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``destination`` when the block ends well. Call it under a lock.

    What killed processes left behind for the same destination is removed first; an older ``destination`` is replaced.
    """
    prefix = f".{destination.name}."
    with storage_errors("write", destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        for leftover in destination.parent.iterdir():
            if leftover.name.startswith(prefix) and leftover.suffix == ".tmp":
                shutil.rmtree(leftover, ignore_errors=True)
        temporary = destination.with_name(f"{prefix}{os.getpid()}.{time.monotonic_ns()}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            sync_tree(temporary)
            if destination.exists():
                shutil.rmtree(destination)
            temporary.rename(destination)
            sync_directory(destination.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn a disk that is full, read-only or not ours into a :class:`StorageError`."""
    try:
        yield
    except SlmopsError:
        raise
    except Exception as error:
        # safetensors reports a full disk as an error of its own, with the system's words inside.
        full = "No space left on device" in str(error) or "os error 28" in str(error)
        in_the_way = isinstance(error, NotADirectoryError | FileExistsError)
        if not full and not in_the_way and not (isinstance(error, OSError) and is_storage_trouble(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "No space left on device"
        raise StorageError(
            f"Could not {doing} {path}: {reason}.",
            remedy=f"Free some space, or set {CACHE_VARIABLE} to a place that can be written to.",
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``, or None where there is none that can be read."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def model_files(folder: Path) -> dict[str, Path]:
    """The files of ``folder`` that make up a model, by name. Links are followed: a hub's cache is made of them."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.suffix in _MODEL_SUFFIXES and path.name != MANIFEST_NAME and path.is_file()
    }


def cached_digests(files: Mapping[str, Path], root: Path) -> dict[str, FileDigest]:
    """Digests of ``files``; what has not changed since the last call is not read again.

    A cache that cannot be written costs time, nothing else.
    """
    digests: dict[str, FileDigest] = {}
    for name, path in files.items():
        status = path.stat()
        signature = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        record_path = root / "digests" / f"{digest_bytes(str(path.resolve()).encode())[:32]}.json"
        record = read_json(record_path)
        if record and record.get("signature") == signature and isinstance(record.get("sha256"), str):
            digests[name] = FileDigest(record["sha256"], status.st_size)
            continue
        digests[name] = digest_file(path)
        try:
            write_json(record_path, {"path": str(path), "signature": signature, "sha256": digests[name].sha256})
        except OSError as error:
            logger.debug("The digest of %s is not kept: %s", path, error)
    return digests


def changed_file(folder: Path, expected: Mapping[str, str], root: Path) -> str | None:
    """The first of the ``expected`` files (name -> SHA-256) that is missing from ``folder`` or differs, or None."""
    present = {name: folder / name for name in expected if (folder / name).is_file()}
    actual = cached_digests(present, root)
    for name, sha256 in expected.items():
        if name not in actual or actual[name].sha256 != sha256:
            return name
    return None
