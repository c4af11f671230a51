"""Events, feedback and judgements in a database: SQLite in WAL mode in the store, or PostgreSQL by URL.

Guarantees: an event is written once, whoever writes it again; what is forgotten or pruned is gone from the file too,
not only from the tables (``secure_delete``, ``VACUUM``, the journal truncated). Not covered: copies made before
(exports, backups, PostgreSQL's archived journals), and what a solid-state disk keeps by itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
from filelock import FileLock
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DatabaseError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from slmops.errors import DataError, StorageError
from slmops.monitor.schema import events, feedback, gaps, judgements, sessions
from slmops.store.database import engine_at, migrate, place_of, sqlite_engine

HEAD = "0001"
"""The newest migration."""
BUSY_TIMEOUT_MS = 5_000
ROWS_AT_ONCE = 1_000
TRIES = 50
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Window:
    """Which events: of a time (seconds since 1970, ``until`` not included), a model, a version, an adapter, a slice;
    of these the ``newest``."""

    since: float | None = None
    until: float | None = None
    model: str | None = None
    version: str | None = None
    adapter: str | None = None
    slice: tuple[str, str] | None = None
    newest: int | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        found: list[sa.ColumnElement[bool]] = []
        if self.since is not None:
            found.append(events.c.at >= self.since)
        if self.until is not None:
            found.append(events.c.at < self.until)
        for name in ("model", "version", "adapter"):
            if (value := getattr(self, name)) is not None:
                found.append(events.c[name] == value)
        if self.slice is not None:
            pair = json.dumps({self.slice[0]: self.slice[1]}, ensure_ascii=False)[1:-1]
            found.append(events.c.slices.contains(pair, autoescape=True))
        return found


@dataclass(frozen=True)
class Removed:
    """Rows that are gone, by table."""

    events: int
    feedback: int
    judgements: int

    def to_json(self) -> dict[str, int]:
        return dict(vars(self))


class EventLog:
    """Open with :meth:`open`. Usable as a context manager, and from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, place: Path | str, *, create: bool = True, busy_timeout_ms: int = BUSY_TIMEOUT_MS) -> EventLog:
        """The log in a file, or in the database at a URL. ``create``: a missing file is made; ``busy_timeout_ms``: how
        long to wait for others who write to the file.

        Raises:
            DataError: there is no such file.
            StorageError: it cannot be opened.
            UsageError: a URL that cannot be used.
        """
        try:
            if isinstance(place, str) and "://" in place:
                log = cls(engine_at(place, secure_delete="ON"))
                log._migrate()
                return log
            path = Path(place)
            if not create and not path.exists():
                raise DataError(
                    f"Nothing was recorded here: there is no {path}.",
                    remedy="Serve with --monitor, or name another --store or --database.",
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            log = cls(sqlite_engine(path, busy_timeout_ms=busy_timeout_ms, kept_open=True, secure_delete="ON"))
            with FileLock(f"{path}.lock", timeout=30):
                log._migrate()
        except OSError as error:
            raise StorageError.from_os_error(error, "open the events in", Path(place)) from None
        except DatabaseError as error:
            raise storage_error(error, str(place) if "://" not in str(place) else "") from error
        return log

    def _migrate(self) -> None:
        migrate(self._engine, Path(__file__).parent / "migrations", HEAD, what="The events in")

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        return self._engine.url.database or "" if self._is_sqlite else place_of(self._engine)

    # --- writing ----------------------------------------------------------------------------------------------

    def append(self, rows: Sequence[Row], session: str | None = None) -> None:
        """Write events as :meth:`slmops.monitor.prepare.Preparation.event` makes them, and that ``session`` did so now.

        Raises:
            StorageError: none of them was written.
        """
        with self._writing() as connection:
            if session is not None:
                connection.execute(sessions.update().where(sessions.c.id == session).values(flushed_at=time.time()))
            # Compiled once and handed to the driver as it is: SQLAlchemy's own way of many rows takes twice as long.
            insert = self._insert(events).on_conflict_do_nothing().compile(dialect=self._engine.dialect)
            names = insert.positiontup
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = rows[start : start + ROWS_AT_ONCE]
                values = [tuple(row[name] for name in names) for row in some] if names else list(map(dict, some))
                connection.exec_driver_sql(str(insert), values)

    def give_feedback(self, row: Row) -> None:
        """Write or replace what a subject said of an event. Raises :class:`StorageError`."""
        insert = self._insert(feedback)
        said = {name: insert.excluded[name] for name in ("at", "score", "correction", "comment")}
        with self._writing() as connection:
            connection.execute(insert.on_conflict_do_update(index_elements=["event", "subject"], set_=said), dict(row))

    def judge(self, rows: Sequence[Row]) -> None:
        """Write or replace scores: ``event``, ``judge``, ``at``, ``score``."""
        if not rows:
            return
        insert = self._insert(judgements)
        said = {name: insert.excluded[name] for name in ("at", "score")}
        with self._writing() as connection:
            connection.execute(
                insert.on_conflict_do_update(index_elements=["event", "judge"], set_=said), [dict(row) for row in rows]
            )

    def find(self, name: str) -> str | None:
        """The id of the event that ``name`` means: its own, or that of a request with one answer."""
        with self._reading() as connection:
            if connection.scalar(sa.select(events.c.id).where(events.c.id == name)):
                return name
            query = sa.select(events.c.id).where(events.c.request_id == name).limit(2)
            found = list(connection.scalars(query))
        return found[0] if len(found) == 1 else None

    # --- sessions of servers ----------------------------------------------------------------------------------

    def begin(self, session: str, *, model: str, version: str, at: float) -> None:
        row = {"id": session, "model": model, "version": version, "started_at": at, "flushed_at": at, "written": 0}
        with self._writing() as connection:
            connection.execute(sessions.insert(), row)

    def beat(self, session: str, *, at: float, written: int, joules: float | None, closed: bool = False) -> None:
        """What a session has done so far."""
        done = {"flushed_at": at, "written": written, "joules": joules, "closed_at": at if closed else None}
        with self._writing() as connection:
            connection.execute(sessions.update().where(sessions.c.id == session).values(**done))

    def add_gap(self, session: str, from_at: float, until_at: float, lost: int | None, reason: str) -> None:
        row = {"session": session, "from_at": from_at, "until_at": until_at, "lost": lost, "reason": reason}
        with self._writing() as connection:
            connection.execute(gaps.insert(), row)

    def end_crashed(self, session: str, *, at: float) -> float | None:
        """Note that a session ended without saying so: events from its last writing on may be missing; that time, or
        None where it had ended or never begun."""
        with self._reading() as connection:
            query = sa.select(sessions.c.flushed_at).where(sessions.c.id == session, sessions.c.closed_at.is_(None))
            flushed_at: float | None = connection.scalar(query)
        if flushed_at is None:
            return None
        self.add_gap(session, flushed_at, at, None, "the server ended without closing: at most its last second is lost")
        with self._writing() as connection:
            connection.execute(sessions.update().where(sessions.c.id == session).values(closed_at=flushed_at))
        return flushed_at

    # --- reading ----------------------------------------------------------------------------------------------

    def events(self, window: Window = Window(), *columns: str) -> list[dict[str, Any]]:
        """Events, oldest first; all columns, or those named."""
        chosen = [events.c[name] for name in columns] or list(events.c)
        query = sa.select(*chosen).where(*window.conditions()).order_by(events.c.at.desc(), events.c.id)
        with self._reading() as connection:
            rows = connection.execute(query.limit(window.newest)).mappings().all()
        return [dict(row) for row in reversed(rows)]

    def feedback(self, window: Window = Window()) -> list[dict[str, Any]]:
        """What was said of the events of the window, oldest first."""
        query = sa.select(feedback).where(feedback.c.event.in_(self._ids(window)))
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(query.order_by(feedback.c.at, feedback.c.event)).mappings()]

    def judgements(self, window: Window = Window()) -> list[dict[str, Any]]:
        query = sa.select(judgements).where(judgements.c.event.in_(self._ids(window)))
        with self._reading() as connection:
            rows = connection.execute(query.order_by(judgements.c.at, judgements.c.event)).mappings()
            return [dict(row) for row in rows]

    def sessions(self) -> list[dict[str, Any]]:
        """Oldest first."""
        with self._reading() as connection:
            return [
                dict(row) for row in connection.execute(sa.select(sessions).order_by(sessions.c.started_at)).mappings()
            ]

    def gaps(self, since: float = 0.0) -> list[dict[str, Any]]:
        query = sa.select(gaps).where(gaps.c.until_at >= since).order_by(gaps.c.from_at)
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def counts(self) -> dict[str, int]:
        """Rows by table."""
        with self._reading() as connection:
            return {
                table.name: connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for table in (events, feedback, judgements)
            }

    def versions(self) -> list[dict[str, Any]]:
        """Model, version and adapter, with events and times, the newest last."""
        names = [events.c.model, events.c.version, events.c.adapter]
        figures = [
            sa.func.count().label("events"),
            sa.func.min(events.c.at).label("first_at"),
            sa.func.max(events.c.at).label("last_at"),
        ]
        query = sa.select(*names, *figures).group_by(*names).order_by(sa.desc("last_at"))
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(query).mappings()][::-1]

    def _ids(self, window: Window) -> Any:
        query = sa.select(events.c.id).where(*window.conditions())
        return query if window.newest is None else query.order_by(events.c.at.desc()).limit(window.newest)

    # --- removing ---------------------------------------------------------------------------------------------

    def ids_of(self, subject: str) -> list[str]:
        """Events of a subject (its hash)."""
        with self._reading() as connection:
            return list(connection.scalars(sa.select(events.c.id).where(events.c.subject == subject)))

    def said_by(self, subject: str) -> list[dict[str, Any]]:
        """Feedback of a subject (its hash), on whosever answers."""
        with self._reading() as connection:
            rows = connection.execute(sa.select(feedback).where(feedback.c.subject == subject)).mappings()
            return [dict(row) for row in rows]

    def forget(self, subject: str) -> Removed:
        """Delete every row of a subject (its hash), and what the file still holds of them.

        Its events with all that was said of them, and its own feedback on events of others.

        Raises:
            StorageError: the database is held by others for too long. The rows are deleted; run this again to have
                them out of the file.
        """
        removed = self._remove(events.c.subject == subject, feedback.c.subject == subject)
        self.compact()
        return removed

    def prune(self, before: float, *, compact: bool = False) -> Removed:
        """Delete events from before a time with all that belongs to them. ``compact``: give their room back too.

        Raises:
            StorageError: nothing was deleted.
        """
        removed = self._remove(events.c.at < before, sa.false())
        if compact:
            self.compact()
        elif self._is_sqlite and any(vars(removed).values()):
            self._run_alone("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def _remove(self, of_events: sa.ColumnElement[bool], of_feedback: sa.ColumnElement[bool]) -> Removed:
        ids = sa.select(events.c.id).where(of_events)
        with self._writing() as connection:
            said = connection.execute(feedback.delete().where(of_feedback | feedback.c.event.in_(ids))).rowcount
            judged = connection.execute(judgements.delete().where(judgements.c.event.in_(ids))).rowcount
            gone = connection.execute(events.delete().where(of_events)).rowcount
        return Removed(gone, said, judged)

    def compact(self) -> None:
        """Write the file anew without what was deleted.

        Raises:
            StorageError: others hold the database for too long.
        """
        if not self._is_sqlite:
            for table in ("events", "feedback", "judgements"):
                self._run_alone(f"VACUUM FULL {table}")
            return
        self._run_alone("VACUUM")
        for _ in range(TRIES):
            busy = self._run_alone("PRAGMA wal_checkpoint(TRUNCATE)")
            if not busy:
                return
            time.sleep(0.1)
        raise StorageError(
            f"The journal of {self.place} is held by another program: it may still show what was deleted.",
            remedy="Run this again in a moment.",
        )

    def _run_alone(self, command: str) -> int:
        """Outside a transaction; the first number of what it answers, 0 where it answers nothing."""
        try:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                result = connection.exec_driver_sql(command)
                return int(result.fetchone()[0]) if result.returns_rows else 0  # type: ignore[index]
        except DatabaseError as error:
            raise storage_error(error, self.place) from error

    # --- connections ------------------------------------------------------------------------------------------

    @property
    def _is_sqlite(self) -> bool:
        return self._engine.dialect.name == "sqlite"

    def _insert(self, table: sa.Table) -> Any:
        return sqlite.insert(table) if self._is_sqlite else postgresql.insert(table)

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (DatabaseError, PoolTimeoutError) as error:
            raise storage_error(error, self.place) from error

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except (DatabaseError, PoolTimeoutError) as error:
            raise storage_error(error, self.place) from error


def storage_error(error: SQLAlchemyError, place: str) -> StorageError:
    """What the database said, with what to do."""
    cause = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    remedy = "See that the database answers."
    if "full" in cause:
        remedy = "Free some space."
    elif "locked" in cause:
        remedy = "Another program holds the database: end it, or try again."
    elif "malformed" in cause or "not a database" in cause:
        remedy = "Move the file away: a new one is begun."
    return StorageError(f"The events in {place or 'the database'} cannot be read or written: {cause}.", remedy=remedy)


def days_ago(days: float, now: float | None = None) -> float:
    """That time, in seconds since 1970."""
    return (time.time() if now is None else now) - 86_400 * days
