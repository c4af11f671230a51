"""Rows to the database, beside the requests: a bounded queue, and one thread that writes what is in it.

Guarantees: :meth:`EventRecorder.observe` neither waits nor raises; what it took is written within
:data:`FLUSH_S` as long as the database takes it. While it does not (locked, full disk, gone), rows wait up to the
queue's bound, further ones are counted, and both are told: in the log, in :meth:`EventRecorder.state`, and as a gap
among the events once they can be written again. A crash loses at most what was not yet flushed, and the next start says
so. Not covered: how many a crash lost; nobody knows.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slmops.artifacts.events import Answered, Feedback
from slmops.errors import SlmopsError, StorageError
from slmops.monitor.log import EventLog, days_ago
from slmops.monitor.prepare import Preparation

logger = logging.getLogger(__name__)
FLUSH_S = 0.5
BATCH = 512
BEAT_S = 30.0
SKETCH_BURST = 500
"""Texts that may be sketched at once before the policy's rate counts: enough for one check."""
PRUNE_S = 3600.0
Read = Callable[[], Sequence[Answered]]


class EventRecorder:
    """The server's recorder; see the module. Open with :meth:`open`.

    ``joules``: what was used since the start, where the machine tells it.
    """

    def __init__(
        self,
        log: EventLog,
        preparation: Preparation,
        *,
        folder: Path,
        joules: Callable[[], float | None] = lambda: None,
        flush_s: float = FLUSH_S,
    ) -> None:
        self._log, self._preparation, self._joules = log, preparation, joules
        self._flush_s = flush_s
        self._waiting: deque[Read] = deque()
        self._rows: list[dict[str, Any]] = []
        self._lost = self._lost_before = self._written = self._unreadable = 0
        self._failure: str | None = None
        self._lost_since = 0.0
        self._sketches: float = SKETCH_BURST
        self._sketched_at = time.monotonic()
        self._work = threading.Lock()
        self._wake, self._end = threading.Event(), threading.Event()
        self._session = uuid.uuid4().hex
        self._marker = _Marker(folder / "running", self._session)
        self._next_beat = self._next_prune = 0.0
        self._begun = False
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    @classmethod
    def open(cls, log: EventLog, preparation: Preparation, *, folder: Path, **options: Any) -> EventRecorder:
        """Begin: note what an earlier server left without closing, and start the thread. ``folder`` is this machine's.

        Raises:
            StorageError: the folder or the database cannot be written to.
        """
        recorder = cls(log, preparation, folder=folder, **options)
        for session in recorder._marker.left_behind():
            since = log.end_crashed(session, at=time.time())
            if since is not None:
                ended = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(since))
                logger.warning(
                    "The last server that recorded here ended without closing: events after %s may be missing "
                    "(at most one second of them).",
                    ended,
                )
        recorder._marker.take()
        log.begin(recorder._session, model=preparation.model, version=preparation.version, at=time.time())
        recorder._thread.start()
        return recorder

    # --- the server's side ------------------------------------------------------------------------------------

    def observe(self, read: Read) -> None:
        """See :class:`slmops.serve.recording.Recorder`."""
        if len(self._waiting) >= self._preparation.policy.max_waiting or self._end.is_set():
            self._lost_since = self._lost_since or time.time()
            self._lost += 1
            return
        self._waiting.append(read)
        if len(self._waiting) >= BATCH:
            self._wake.set()

    def feedback(self, given: Feedback) -> bool:
        """See :class:`slmops.serve.recording.Recorder`."""
        with self._work:
            event = self._log.find(given.answer_id)
            if event is None:  # it may still be in the queue
                self._take_all()
                self._write()
                event = self._log.find(given.answer_id)
            if event is None:
                if self._failure:
                    raise StorageError(f"The events cannot be written: {self._failure}")
                return False
            self._log.give_feedback(self._preparation.feedback(given, event))
        return True

    def state(self) -> Mapping[str, Any]:
        """See :class:`slmops.serve.recording.Recorder`."""
        return {
            "written": self._written,
            "waiting": len(self._waiting) + len(self._rows),
            "lost": self._lost,
            "unreadable": self._unreadable,
            "failure": self._failure,
        }

    def close(self) -> None:
        """Write what waits, and end. What cannot be written now is lost, and told."""
        if self._end.is_set():
            return
        self._end.set()
        self._wake.set()
        self._thread.join(timeout=30)
        with self._work:
            self._flush()
            left = len(self._rows) + len(self._waiting)
            if left:
                self._lost += left
                logger.error("%d events could not be written at the end: %s", left, self._failure)
            said = self._beat(closed=not left)
        self._log.close()
        self._marker.free(closed=said and not left)

    # --- the thread's side ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._end.is_set():
            self._wake.wait(self._flush_s)
            self._wake.clear()
            with self._work:
                self._flush()
                now = time.monotonic()
                if now >= self._next_beat:
                    self._next_beat = now + BEAT_S
                    self._beat()
                if now >= self._next_prune:
                    self._next_prune = now + PRUNE_S
                    self._prune()

    def _flush(self) -> None:
        self._take_all()
        self._write()

    def _take_all(self) -> None:
        """Everything that waits, to rows. A failing database leaves requests in the queue, which is bounded."""
        if self._failure and len(self._rows) >= BATCH:
            return
        for _ in range(len(self._waiting)):
            read = self._waiting.popleft()
            try:
                self._rows += [self._preparation.event(one, sketched=self._may_sketch()) for one in read()]
            except Exception as error:  # noqa: BLE001 (one request that nobody understands must not end the thread)
                self._unreadable += 1
                where = error.__traceback__
                while where is not None and where.tb_next is not None:
                    where = where.tb_next
                line = f" in {where.tb_frame.f_code.co_name}:{where.tb_lineno}" if where else ""
                logger.error("%s%s while a request was recorded", type(error).__name__, line)

    def _may_sketch(self) -> bool:
        """Tokens of a bucket that fills at the policy's rate."""
        rate = self._preparation.policy.sketches_per_s
        now = time.monotonic()
        self._sketches = min(SKETCH_BURST, self._sketches + rate * (now - self._sketched_at))
        self._sketched_at = now
        if not rate or self._sketches < 1:
            return False
        self._sketches -= 1
        return True

    def _write(self) -> None:
        lost = self._lost - self._lost_before
        if not self._rows and not lost:
            return
        try:
            self._log.append(self._rows, self._session)
            if lost:
                reason = self._failure or "more requests came than could be written"
                self._log.add_gap(self._session, self._lost_since, time.time(), lost, reason)
        except SlmopsError as error:
            if self._failure is None:
                logger.error("Events wait: %s Requests go on.", error)
            self._failure = error.message
            return
        if self._failure is not None or lost:
            logger.warning("Events are written again; %d were lost.", lost)
        self._failure, self._lost_since, self._lost_before = None, 0.0, self._lost
        self._written += len(self._rows)
        self._rows = []

    def _beat(self, *, closed: bool = False) -> bool:
        """Whether the database took it."""
        try:
            self._log.beat(self._session, at=time.time(), written=self._written, joules=self._joules(), closed=closed)
        except (SlmopsError, OSError) as error:
            logger.info("%s", error)
            return False
        return True

    def _prune(self) -> None:
        try:
            removed = self._log.prune(days_ago(self._preparation.policy.retention_days))
        except SlmopsError as error:
            logger.warning("Old events are still there: %s", error)
            return
        if removed.events:
            logger.info(
                "%d events older than %d days are gone", removed.events, self._preparation.policy.retention_days
            )


class _Marker:
    """A file that is locked as long as a session runs: the system frees the lock of a process that dies."""

    def __init__(self, folder: Path, session: str) -> None:
        self.folder, self.session = folder, session
        self._lock: FileLock | None = None

    def left_behind(self) -> list[str]:
        """Sessions of this machine that have ended without :meth:`free`; their markers are removed."""
        found = []
        for path in sorted(self.folder.glob("*.lock")):
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            path.unlink(missing_ok=True)
            lock.release()
            found.append(path.stem)
        return found

    def take(self) -> None:
        """Raises :class:`StorageError`."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / f"{self.session}.lock")
            self._lock.acquire(timeout=0)
        except OSError as error:
            raise StorageError.from_os_error(error, "begin recording in", self.folder) from None

    def free(self, *, closed: bool) -> None:
        """``closed``: the session could say in the database that it has ended."""
        if self._lock is None:
            return
        if closed:
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()
        if not closed:  # the next start finds it, and says so
            Path(self._lock.lock_file).touch()
