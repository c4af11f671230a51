"""The store: every stage's result by key, done once.

Layout below the root::

    artifacts/<kind>/<key>/   whole artifacts; the first 16 digits of the key name the directory
    work/<key>/               what a killed run left for the next one
    locks/<key>.lock          who is at work
    runs.jsonl                one line a run
    store.db                  an index over all this, rebuilt when lost

Guarantees: the same inputs, configuration and code give the same key, and a key is built once, also by two processes at
once. A run killed at any moment leaves either the whole artifact or none, and its work directory. Inputs of a build
are compared with their manifests, every byte, once a process; an artifact that is merely found is checked for its
files and their sizes. Not covered: locks on a network file system without ``flock``, and SQLite there (give a URL).
One index belongs to one root.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from filelock import FileLock, Timeout

from slmops.artifacts import MANIFEST_NAME, Artifact, Draft, drafting, open_artifact
from slmops.artifacts.plain import plain_json
from slmops.errors import ArtifactError, CorruptArtifactError, MissingExtraError, StorageError
from slmops.store.lineage import Lineage, trace_lineage
from slmops.store.records import Entry, Run, entry_of, wall_seconds
from slmops.trust import digest_json

if TYPE_CHECKING:
    from slmops.store.index import Index

logger = logging.getLogger(__name__)

A = TypeVar("A", bound=Artifact)

DEFAULT_STORE = Path(".slmops")
STORE_VARIABLE = "SLMOPS_STORE"
MIN_PREFIX = 4

_verified: dict[Path, tuple[tuple[str, int, int], ...]] = {}
"""Artifacts that this process has compared with their manifests, with the files' sizes and times at that moment."""


@dataclass(frozen=True)
class StageResult(Generic[A]):
    """``reused``: nothing was done. ``wall_s``: what the artifact cost when it was built, in seconds."""

    artifact: A
    reused: bool
    wall_s: float


def stage_key(name: str, kind: str, inputs: Mapping[str, str], config: Mapping[str, Any], code_version: str) -> str:
    """Digest of all that a stage's result depends on. ``inputs``: role -> digest."""
    return digest_json(
        {"name": name, "kind": kind, "inputs": dict(inputs), "config": dict(config), "code_version": code_version}
    )


class Store:
    """Open with :meth:`open`. Usable as a context manager."""

    def __init__(self, root: Path, index: Index, *, read_only: bool = False) -> None:
        self.root = root
        self.read_only = read_only
        self._index = index

    # --- opening ----------------------------------------------------------------------------------------------

    @classmethod
    def open(cls, root: Path | str, *, url: str | None = None, read_only: bool = False) -> Store:
        """Open the store at ``root``, which is made where it is missing. ``url`` names another database for the index.

        With ``read_only`` nothing is written: the index is made in memory, and only finished stages can be used.

        Raises:
            StorageError: the place cannot be written to, or the database does not answer.
            MissingExtraError: the database library is not installed.
        """
        place = Path(root).absolute()
        try:
            from slmops.store.index import Index
        except ModuleNotFoundError as error:
            raise MissingExtraError(f"The store (it needs {error.name})", "train") from None
        if read_only:
            store = cls(place, Index.in_memory(), read_only=True)
            store._refresh()
            return store
        with _storage_errors("open the store", place):
            for part in ("artifacts", "work", "locks"):
                (place / part).mkdir(parents=True, exist_ok=True)
            with _locked(place / "locks" / "index.lock"):
                store = cls(place, Index.at_url(url) if url else Index.at_file(place / "store.db"))
                store._refresh()
            store._sweep()
        return store

    def close(self) -> None:
        self._index.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- stages -----------------------------------------------------------------------------------------------

    def stage(
        self,
        name: str,
        kind: type[A],
        *,
        inputs: Mapping[str, Artifact | str],
        config: Mapping[str, Any],
        code_version: str,
        build: Callable[[Draft], None],
    ) -> StageResult[A]:
        """The artifact of this stage: found, or built by ``build``.

        ``inputs``: role -> artifact, or the digest of something raw. A second process that wants the same waits for
        the first. After a failure ``draft.work`` is kept for the next attempt; ``wall_s`` counts the last one.

        Raises:
            CorruptArtifactError: this artifact or an input is damaged; names the file.
            StorageError: the disk is full, read-only or not writable.
        """
        plain_config = plain_json(config, "config", non_finite="refuse")
        digests = {role: used.digest if isinstance(used, Artifact) else used for role, used in inputs.items()}
        key = stage_key(name, kind.kind, digests, plain_config, code_version)
        destination = self.root / "artifacts" / kind.kind / key[:16]
        if found := self._finished(kind, destination, key):
            return StageResult(found, reused=True, wall_s=wall_seconds(found))
        if self.read_only:
            raise StorageError(
                f"{name} is not done yet, and the store {self.root} was opened for reading.",
                remedy="Open it for writing, or choose another --store.",
            )
        with self._at_work(key, name):
            if found := self._finished(kind, destination, key):
                return StageResult(found, reused=True, wall_s=wall_seconds(found))
            for used in inputs.values():
                if isinstance(used, Artifact):
                    self.verify(used)
            self._remove_drafts(key[:16])
            started = time.monotonic()
            with drafting(
                kind.kind,
                destination,
                key=key,
                inputs=digests,
                config=plain_config,
                code_version=code_version,
                work=self.root / "work" / key[:16],
            ) as draft:
                build(draft)
                draft.extra |= {
                    "name": name,
                    "wall_s": round(time.monotonic() - started, 3),
                    "input_keys": {r: i.manifest.key for r, i in inputs.items() if isinstance(i, Artifact)},
                }
            artifact = kind.open(destination)
            _verified[destination] = _file_states(artifact)
            self._put(artifact)
            return StageResult(artifact, reused=False, wall_s=wall_seconds(artifact))

    def verify(self, artifact: Artifact) -> None:
        """Compare every byte of ``artifact`` with its manifest, once a process unless its files change.

        Raises:
            CorruptArtifactError: names the file.
        """
        place = artifact.path.absolute()
        try:
            states = _file_states(artifact)
        except FileNotFoundError:
            states = ()
        if not states or _verified.get(place) != states:
            artifact.verify()
            _verified[place] = states

    def _finished(self, kind: type[A], destination: Path, key: str) -> A | None:
        if not destination.exists():
            return None
        remedy = f"Delete {destination} and run again."
        if not (destination / MANIFEST_NAME).exists():
            raise CorruptArtifactError(f"{destination / MANIFEST_NAME} is missing.", remedy=remedy)
        artifact = kind.open(destination)
        if artifact.manifest.key != key:
            raise CorruptArtifactError(
                f"{destination / MANIFEST_NAME} has the key {artifact.manifest.key[:16]}… where {key[:16]}… belongs.",
                remedy=remedy,
            )
        for file_name, expected in artifact.manifest.files.items():
            path = destination / file_name
            if not path.is_file():
                raise CorruptArtifactError(f"{path} is missing.", remedy=remedy)
            if (size_bytes := path.stat().st_size) != expected.size_bytes:
                raise CorruptArtifactError(
                    f"{path} has {size_bytes:,} bytes where the manifest says {expected.size_bytes:,}.", remedy=remedy
                )
        return artifact

    # --- looking ----------------------------------------------------------------------------------------------

    def find(self, prefix_or_path: str | Path) -> Artifact:
        """The artifact at a path, or the one whose digest or key starts with these hexadecimal digits.

        Several artifacts with the same contents are one answer: the newest.

        Raises:
            ArtifactError: there is none, or more than one.
        """
        text = str(prefix_or_path)
        path = Path(text)
        if path.name == MANIFEST_NAME:
            path = path.parent
        if (path / MANIFEST_NAME).is_file():
            return open_artifact(path)
        prefix = text.lower()
        looks_right = len(prefix) >= MIN_PREFIX and set(prefix) <= set("0123456789abcdef")
        entries = self._by_prefix(prefix) if looks_right else []
        if not entries:
            raise ArtifactError(f"There is no artifact {text!r} in {self.root}.", remedy=self._suggestion())
        if len({entry.digest for entry in entries}) > 1:
            names = ", ".join(f"{entry.digest[:12]} ({entry.kind} {entry.name})" for entry in entries[:5])
            raise ArtifactError(
                f"{text!r} may mean {len(entries)} artifacts: {names}.", remedy="Give more digits, or the path."
            )
        return open_artifact(self.root / entries[0].path)

    def trace(self, artifact: Artifact) -> Lineage:
        """What ``artifact`` was made from, down to raw sources, and what was made of it."""
        return trace_lineage(
            entry_of(artifact, self._relative(artifact.path)),
            with_digest=self._index.by_digest,
            made_from=self._index.made_from,
            metrics_of=self._metrics_of,
        )

    def _by_prefix(self, prefix: str) -> list[Entry]:
        if not (entries := self._index.by_prefix(prefix)):
            self._refresh_locked()  # another process may have finished since this store was opened
            entries = self._index.by_prefix(prefix)
        return [entry for entry in entries if (self.root / entry.path / MANIFEST_NAME).is_file()]

    def _suggestion(self) -> str:
        newest = self._index.newest(5)
        if not newest:
            return "The store is empty: name a path, choose another --store, or start with: slmops run"
        return "Newest here: " + ", ".join(f"{entry.digest[:12]} ({entry.kind} {entry.name})" for entry in newest) + "."

    def _metrics_of(self, entry: Entry) -> Mapping[str, Any]:
        try:
            return open_artifact(self.root / entry.path).manifest.metrics
        except ArtifactError as error:
            logger.warning("%s", error)
            return {}

    # --- runs -------------------------------------------------------------------------------------------------

    def record_run(
        self,
        name: str,
        report_digest: str | None = None,
        *,
        started_at: str | None = None,
        finished_at: str | None = None,
        outcome: str = "done",
    ) -> Run:
        """Note that the recipe ``name`` was run. Times are UTC, ISO 8601; now where they are not given."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        run = Run(name, started_at or now, finished_at or now, outcome, report_digest)
        line = json.dumps(run.to_json(), ensure_ascii=False)
        with _storage_errors("note the run in", self._journal), self._index_lock():
            with self._journal.open("a+b") as journal:
                end = journal.seek(0, os.SEEK_END)
                torn = end > 0 and os.pread(journal.fileno(), 1, end - 1) != b"\n"
                journal.write((b"\n" if torn else b"") + line.encode() + b"\n")
                journal.flush()
                os.fsync(journal.fileno())
            self._index.add_runs([run])
        return run

    def runs(self) -> list[Run]:
        """All runs, newest first."""
        return self._index.runs()

    @property
    def _journal(self) -> Path:
        return self.root / "runs.jsonl"

    # --- the index --------------------------------------------------------------------------------------------

    def rebuild_index(self) -> None:
        """Make the index anew from the manifests and the run journal."""
        with self._index_lock():
            self._index.clear()
            self._refresh()

    def _refresh_locked(self) -> None:
        with self._index_lock():
            self._refresh()

    def _refresh(self) -> None:
        """Bring the index in line with the directories. Reads only manifests that it does not know."""
        there = {self._relative(path) for path in self._directories()}
        known = self._index.paths()
        if gone := known - there:
            self._index.forget(gone)
        for path in sorted(there - known):
            try:
                self._index.put(entry_of(open_artifact(self.root / path), path))
            except ArtifactError as error:
                if isinstance(error, StorageError):
                    raise
                logger.warning("Left out of the index: %s", error)
        runs = _read_journal(self._journal)
        if runs != self._index.runs()[::-1]:
            self._index.replace_runs(runs)

    def _directories(self) -> Iterable[Path]:
        return (path for path in (self.root / "artifacts").glob("*/*") if not path.name.startswith("."))

    def _put(self, artifact: Artifact) -> None:
        with self._index_lock():
            self._index.put(entry_of(artifact, self._relative(artifact.path)))

    def _relative(self, path: Path) -> str:
        absolute = path.absolute()
        inside = absolute.is_relative_to(self.root)
        return absolute.relative_to(self.root).as_posix() if inside else absolute.as_posix()

    @contextmanager
    def _index_lock(self) -> Iterator[None]:
        if self.read_only:
            yield
            return
        with _storage_errors("lock the store", self.root), _locked(self.root / "locks" / "index.lock"):
            yield

    # --- locks and leftovers ----------------------------------------------------------------------------------

    @contextmanager
    def _at_work(self, key: str, name: str) -> Iterator[None]:
        """Hold the key's lock; say so if somebody else has it."""
        path = self.root / "locks" / f"{key[:16]}.lock"
        lock = FileLock(path)
        with _storage_errors("lock the store", self.root):
            try:
                lock.acquire(blocking=False)
            except Timeout:
                logger.warning("%s (%s…) is being made by another run; waiting for it.", name, key[:16])
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _sweep(self) -> None:
        """Remove what killed runs left: half-written drafts, and work directories of artifacts that are whole.

        Whoever writes holds the key's lock, so a lock that can be had means that nobody does. (A process id would not
        do: another container's processes cannot be seen, and ids come again after a restart.)
        """
        keys = {_draft_key(path) for path in (self.root / "artifacts").glob("*/.*.tmp")}
        finished = {path.name for path in self._directories()}
        keys |= {path.name for path in (self.root / "work").iterdir() if path.name in finished}
        for key in keys:
            lock = FileLock(self.root / "locks" / f"{key}.lock")
            try:
                lock.acquire(blocking=False)
            except (Timeout, RuntimeError):  # RuntimeError: this very thread is at work on it
                continue
            try:
                self._remove_drafts(key)
                if key in finished:
                    shutil.rmtree(self.root / "work" / key, ignore_errors=True)
            finally:
                lock.release()

    def _remove_drafts(self, key: str) -> None:
        for path in (self.root / "artifacts").glob(f"*/.{key}.*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _draft_key(path: Path) -> str:
    return path.name[1:].partition(".")[0]


def _file_states(artifact: Artifact) -> tuple[tuple[str, int, int], ...]:
    states = []
    for name in (MANIFEST_NAME, *artifact.manifest.files):
        status = (artifact.path / name).stat()
        states.append((name, status.st_size, status.st_mtime_ns))
    return tuple(states)


def _read_journal(path: Path) -> list[Run]:
    """Runs, oldest first. A line cut short by a kill is passed over."""
    if not path.exists():
        return []
    found = []
    for line in path.read_bytes().splitlines():
        try:
            found.append(Run.from_json(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            if line:
                logger.warning("A line of %s cannot be read; left out.", path)
    return found


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with FileLock(path):
        yield


@contextmanager
def _storage_errors(doing: str, path: Path) -> Iterator[None]:
    """Whatever the system says against the store's own files is for the user to see in a sentence."""
    try:
        yield
    except OSError as error:
        raise StorageError.from_os_error(error, doing, path) from error
