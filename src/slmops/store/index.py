"""The index: what is in the store, in a database that can be lost.

Guarantees: every fact in it comes from a manifest or from the run journal, so a lost or damaged SQLite file is made
anew (:class:`slmops.store.store.Store` fills it). Tables are brought up to date when the index is opened. Plain
SQLAlchemy: SQLite in WAL mode by default, PostgreSQL by URL. Not covered: two processes that write at once; the
store's lock is for that.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, OperationalError, SQLAlchemyError
from sqlalchemy.pool import StaticPool

from slmops.errors import StorageError
from slmops.store.database import engine_at, migrate, place_of, sqlite_engine
from slmops.store.records import Entry, Input, Run
from slmops.store.schema import artifacts, inputs, metadata, runs

logger = logging.getLogger(__name__)

HEAD = "0001"
"""The newest migration. Known here, so that opening an index that is up to date need not load alembic."""

_BROKEN = {"SQLITE_CORRUPT", "SQLITE_NOTADB", "SQLITE_ERROR", "SQLITE_CONSTRAINT", "SQLITE_SCHEMA"}


class Index:
    """Artifacts, their inputs, and runs, in one database."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def in_memory(cls) -> Index:
        """An index that ends with the process, for a store that cannot be written to."""
        engine = sa.create_engine("sqlite://", poolclass=StaticPool, connect_args={"check_same_thread": False})
        metadata.create_all(engine)
        return cls(engine)

    @classmethod
    def at_file(cls, path: Path) -> Index:
        """The SQLite index at ``path``. A damaged one is replaced by an empty one, with a warning.

        Raises:
            StorageError: the place cannot be written to.
            ArtifactError: a newer slmops wrote it.
        """
        try:
            return cls._open_file(path)
        except DatabaseError as error:
            if not _is_broken(error):
                raise _storage_error(error, str(path)) from error
            logger.warning("The index %s is damaged (%s); it is built anew.", path, error.orig)
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm"):
            path.with_name(name).unlink(missing_ok=True)
        try:
            return cls._open_file(path)
        except DatabaseError as error:
            raise _storage_error(error, str(path)) from error

    @classmethod
    def _open_file(cls, path: Path) -> Index:
        index = cls(sqlite_engine(path))
        index._check_pages()
        index._migrate()
        index._check_tables()
        return index

    @classmethod
    def at_url(cls, url: str) -> Index:
        """The index in the database at ``url``.

        Raises:
            UsageError: not a database URL, or its driver is not installed.
            StorageError: the database does not answer.
        """
        index = cls(engine_at(url))
        try:
            index._migrate()
        except DatabaseError as error:
            raise _storage_error(error, index._place) from error
        return index

    def close(self) -> None:
        self._engine.dispose()

    # --- artifacts --------------------------------------------------------------------------------------------

    def put(self, entry: Entry) -> None:
        """Add an artifact, or replace what is known of its path."""
        with self._writing() as connection:
            _forget(connection, [entry.path])
            row = {name: value for name, value in vars(entry).items() if name != "inputs"}
            connection.execute(artifacts.insert(), row)
            rows = [{"path": entry.path, "role": i.role, "digest": i.digest, "key": i.key} for i in entry.inputs]
            if rows:
                connection.execute(inputs.insert(), rows)

    def forget(self, paths: Iterable[str]) -> None:
        with self._writing() as connection:
            _forget(connection, list(paths))

    def clear(self) -> None:
        with self._writing() as connection:
            for table in (inputs, artifacts, runs):
                connection.execute(table.delete())

    def paths(self) -> set[str]:
        with self._reading() as connection:
            return set(connection.scalars(sa.select(artifacts.c.path)))

    def by_prefix(self, prefix: str) -> list[Entry]:
        """Artifacts whose digest or key starts with ``prefix``, newest first."""
        return self._entries(
            artifacts.c.digest.startswith(prefix, autoescape=True) | artifacts.c.key.startswith(prefix, autoescape=True)
        )

    def by_digest(self, digest: str) -> list[Entry]:
        """Artifacts with exactly these contents, newest first."""
        return self._entries(artifacts.c.digest == digest)

    def made_from(self, digest: str) -> list[Entry]:
        """Artifacts that read these contents, newest first."""
        return self._entries(artifacts.c.path.in_(sa.select(inputs.c.path).where(inputs.c.digest == digest)))

    def newest(self, count: int) -> list[Entry]:
        return self._entries(sa.true(), count)

    def _entries(self, condition: sa.ColumnElement[bool], limit: int | None = None) -> list[Entry]:
        query = sa.select(artifacts).where(condition).order_by(artifacts.c.created_at.desc(), artifacts.c.path)
        with self._reading() as connection:
            rows = connection.execute(query.limit(limit)).mappings().all()
            return [Entry(**row, inputs=_inputs(connection, row["path"])) for row in rows]

    # --- runs -------------------------------------------------------------------------------------------------

    def add_runs(self, new: Iterable[Run]) -> None:
        rows = [run.to_json() for run in new]
        if rows:
            with self._writing() as connection:
                connection.execute(runs.insert(), rows)

    def replace_runs(self, new: Iterable[Run]) -> None:
        with self._writing() as connection:
            connection.execute(runs.delete())
        self.add_runs(new)

    def runs(self) -> list[Run]:
        """Newest first."""
        columns = [column for column in runs.c if column.name != "id"]
        with self._reading() as connection:
            rows = connection.execute(sa.select(*columns).order_by(runs.c.id.desc())).mappings()
            return [Run(**row) for row in rows]

    # --- connections ------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except DatabaseError as error:
            raise _storage_error(error, self._place) from error

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except DatabaseError as error:
            raise _storage_error(error, self._place) from error

    @property
    def _place(self) -> str:
        return place_of(self._engine)

    def _check_pages(self) -> None:
        with self._engine.connect() as connection:
            verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if verdict != "ok":
            damage = sqlite3.DatabaseError(str(verdict))
            damage.sqlite_errorname = "SQLITE_CORRUPT"
            raise DatabaseError("PRAGMA quick_check", None, damage)

    def _check_tables(self) -> None:
        """Touch every table, so that a lost one is noticed now, when the index can still be built anew."""
        with self._engine.connect() as connection:
            for table in metadata.sorted_tables:
                connection.execute(sa.select(table).limit(0))

    def _migrate(self) -> None:
        migrate(self._engine, Path(__file__).parent / "migrations", HEAD, what="The store's index")


def _forget(connection: sa.Connection, paths: list[str]) -> None:
    for table in (inputs, artifacts):
        connection.execute(table.delete().where(table.c.path.in_(paths)))


def _inputs(connection: sa.Connection, path: str) -> tuple[Input, ...]:
    query = sa.select(inputs.c.role, inputs.c.digest, inputs.c.key).where(inputs.c.path == path)
    return tuple(Input(*row) for row in connection.execute(query.order_by(inputs.c.role)))


def _is_broken(error: DatabaseError) -> bool:
    """Whether the file itself is at fault, not the disk, the rights or a lock."""
    name = getattr(error.orig, "sqlite_errorname", "")
    return any(str(name).startswith(broken) for broken in _BROKEN)


def _storage_error(error: SQLAlchemyError, place: str) -> StorageError:
    cause = getattr(error, "orig", None) or error
    if isinstance(error, DatabaseError) and _is_broken(error):
        remedy = "Run again: a damaged index is built anew when the store is opened."
    elif isinstance(error, OperationalError) and "full" in str(cause):
        remedy = "Free some space or choose another --store."
    else:
        remedy = "Free some space or choose a writable --store, or see that the database answers."
    return StorageError(f"The store's index {place} cannot be used: {cause}.", remedy=remedy)
