"""Artifacts on disk: a directory with a manifest, written whole or not at all.

Guarantees: an artifact directory that exists under its final name is complete (it was written under a temporary name,
flushed to disk, then renamed); :meth:`Artifact.verify` finds any changed, missing or added file and names it.
Not covered: who wrote it. That is for signatures.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from slmops.artifacts.manifest import MANIFEST_NAME, Manifest
from slmops.artifacts.plain import plain_json
from slmops.errors import ArtifactError, CorruptArtifactError, SlmopsError, StorageError
from slmops.trust import digest_tree, tree_digest

MANIFEST_ONLY = frozenset({MANIFEST_NAME})


@dataclass(frozen=True)
class Artifact:
    """A directory with a manifest. Subclasses name the files inside and how to read them."""

    kind: ClassVar[str] = ""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Read the manifest at ``path``; contents are not checked (see :meth:`verify`).

        Raises:
            ArtifactError: not an artifact, or one of another kind.
        """
        directory = Path(path)
        manifest = Manifest.read(directory)
        if cls.kind and manifest.kind != cls.kind:
            raise ArtifactError(f"{directory} is a {manifest.kind}, not a {cls.kind}.")
        return cls(directory, manifest)

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def size_bytes(self) -> int:
        """Bytes of all files but the manifest."""
        return sum(file.size_bytes for file in self.manifest.files.values())

    def verify(self) -> None:
        """Compare every file with the manifest.

        Raises:
            CorruptArtifactError: names the first file that differs, is missing, or should not be there.
        """
        found = digest_tree(self.path, exclude=MANIFEST_ONLY)
        remedy = "Delete the artifact and run again, or fetch it anew."
        for name, expected in self.manifest.files.items():
            actual = found.pop(name, None)
            if actual is None:
                raise CorruptArtifactError(f"{self.path / name} is missing.", remedy=remedy)
            if actual != expected:
                raise CorruptArtifactError(
                    f"{self.path / name} has changed: SHA-256 {actual.sha256[:12]}… where the manifest says "
                    f"{expected.sha256[:12]}….",
                    remedy=remedy,
                )
        if found:
            raise CorruptArtifactError(f"{self.path / min(found)} is not in the manifest.", remedy=remedy)
        if tree_digest(self.manifest.files) != self.manifest.digest:
            raise CorruptArtifactError(f"{self.path / MANIFEST_NAME} does not agree with itself.", remedy=remedy)


@dataclass
class Draft:
    """An artifact being written.

    ``path``     a temporary directory: put the files here
    ``work``     a directory that outlives a killed run of the same key: checkpoints and journals go here
    ``metrics``  JSON that goes into the manifest; what is not finite is written as null
    ``extra``    further fields of the manifest, beside those that it knows
    """

    path: Path
    work: Path
    metrics: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@contextmanager
def drafting(
    kind: str,
    destination: Path,
    *,
    key: str = "",
    inputs: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    code_version: str = "",
    work: Path | None = None,
) -> Iterator[Draft]:
    """Write an artifact of ``kind`` to ``destination``, whole or not at all.

    The block fills ``draft.path``. On a clean exit files are digested and flushed, the manifest is added, and the
    directory is renamed to ``destination``; on any error the temporary directory is removed and ``work`` is kept.

    Raises:
        StorageError: the disk is full, read-only or not writable.
        ArtifactError: ``destination`` exists already and is not the same artifact.
    """
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    work_directory = work or destination.with_name(f".{destination.name}.work")
    try:
        temporary.mkdir(parents=True)
        work_directory.mkdir(parents=True, exist_ok=True)
        draft = Draft(temporary, work_directory)
        yield draft
        if (temporary / MANIFEST_NAME).exists():
            raise ValueError(f"{MANIFEST_NAME} at the top of an artifact is written by drafting() alone")
        files = digest_tree(temporary)
        manifest = Manifest(
            kind=kind,
            digest=tree_digest(files),
            key=key,
            files=files,
            inputs=dict(inputs or {}),
            config=plain_json(config or {}, "config", non_finite="refuse"),
            metrics=plain_json(draft.metrics, "metrics"),
            code_version=code_version,
            environment={"python": platform.python_version(), "machine": platform.machine()},
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            extra=plain_json(draft.extra, "extra"),
        )
        text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
        (temporary / MANIFEST_NAME).write_text(text + "\n", "utf-8")
        sync_tree(temporary)
        _rename_into_place(temporary, destination, manifest)
        sync_directory(destination.parent)
    except SlmopsError:
        raise
    except OSError as error:
        if is_storage_trouble(error, within=(temporary, work_directory, destination.parent)):
            raise StorageError.from_os_error(error, f"write the {kind} to", destination) from error
        raise
    except Exception as error:
        if _says_disk_full(error, destination.parent):
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise StorageError.from_os_error(full, f"write the {kind} to", destination) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(work_directory, ignore_errors=True)


_DISK_TROUBLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
_ACCESS_TROUBLE = frozenset({errno.EACCES, errno.EPERM, errno.EIO})
_NEARLY_FULL_BYTES = 64 << 10


def is_storage_trouble(error: OSError, *, within: Collection[Path] = ()) -> bool:
    """Whether the disk that is written to is at fault, and not the program or a file that was read.

    With ``within``, refused access counts only where the error names no file, or one in, or on the way to, these.
    """
    if error.errno in _DISK_TROUBLE:
        return True
    if error.errno not in _ACCESS_TROUBLE:
        return False
    if not within or not isinstance(error.filename, str | os.PathLike):
        return True
    place = Path(os.fspath(error.filename)).absolute()
    roots = [root.absolute() for root in within]
    return any(place.is_relative_to(root) or root.is_relative_to(place) for root in roots)


def _says_disk_full(error: Exception, place: Path) -> bool:
    """Native writers (safetensors, torch, SQLite) report a full disk as errors of their own."""
    text = str(error)
    if "No space left on device" in text or "os error 28" in text or "disk is full" in text:
        return True
    return place.is_dir() and shutil.disk_usage(place).free < _NEARLY_FULL_BYTES


def sync_tree(root: Path) -> None:
    """Flush every file and directory below ``root`` to disk."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        elif path.is_dir():
            sync_directory(path)
    sync_directory(root)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_into_place(temporary: Path, destination: Path, manifest: Manifest) -> None:
    try:
        temporary.rename(destination)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        # Somebody else finished the same work first. Theirs is as good as ours if the key says so.
        if not manifest.key or _key_at(destination) != manifest.key:
            raise ArtifactError(
                f"{destination} exists already.", remedy="Choose another place, or delete it."
            ) from None


def _key_at(directory: Path) -> str | None:
    try:
        return Manifest.read(directory).key
    except (ArtifactError, NotADirectoryError):
        return None
