"""The index is a cache: lost or broken, it is made anew from what is on disk."""

from __future__ import annotations

import logging
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import postgres
from skipping import skip_or_fail
from slmops.artifacts import MANIFEST_NAME, Dataset, Draft, Report
from slmops.errors import ArtifactError, StorageError, UsageError
from slmops.store import Run, Store
from slmops.store.index import HEAD, Index
from slmops.store.schema import metadata


def write(text: str) -> Callable[[Draft], None]:
    return lambda draft: (draft.path / "x").write_text(text) and None


@pytest.fixture
def filled(store: Store) -> Store:
    data = store.stage("data", Dataset, inputs={"train": "5" * 64}, config={}, code_version="1", build=write("d"))
    inputs = {"data": data.artifact}
    made = store.stage("report", Report, inputs=inputs, config={}, code_version="1", build=write("r"))
    store.record_run("first", started_at="2025-01-01T00:00:00Z", outcome="failed")
    store.record_run("second", made.artifact.digest)
    return store


def snapshot(store: Store) -> tuple[object, ...]:
    report = store.find(next((store.root / "artifacts" / "report").iterdir()))
    return store.trace(report).to_json(), store.runs(), store.find(report.digest[:8])


def lose(database: Path) -> None:
    for path in database.parent.glob("store.db*"):
        path.unlink()


def overwrite(database: Path) -> None:
    lose(database)
    database.write_bytes(b"this is not a database" * 500)


def empty(database: Path) -> None:
    lose(database)
    database.write_bytes(b"")


def damage_a_page(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(database.read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    database.write_bytes(data)


def drop_a_table(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE inputs")
    connection.close()


def half_migrated(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("DROP TABLE alembic_version")
    connection.close()


@pytest.mark.parametrize("damage", [lose, overwrite, empty, damage_a_page, drop_a_table, half_migrated])
def test_a_lost_or_broken_index_is_made_anew(filled: Store, damage: Callable[[Path], None]) -> None:
    before = snapshot(filled)
    filled.close()
    damage(filled.root / "store.db")
    with Store.open(filled.root) as later:
        assert snapshot(later) == before


def test_rebuilding_gives_the_same(filled: Store) -> None:
    before = snapshot(filled)
    filled.rebuild_index()
    assert snapshot(filled) == before


def test_an_index_behind_the_directories_catches_up(filled: Store) -> None:
    before = snapshot(filled)
    with sqlite3.connect(filled.root / "store.db") as connection:
        connection.execute("DELETE FROM inputs")
        connection.execute("DELETE FROM artifacts")
        connection.execute("DELETE FROM runs")
    connection.close()
    with Store.open(filled.root) as later:
        assert snapshot(later) == before


def test_a_damaged_artifact_is_left_out_and_told_of(filled: Store, caplog: pytest.LogCaptureFixture) -> None:
    report = next((filled.root / "artifacts" / "report").iterdir())
    (report / MANIFEST_NAME).write_text("{")
    lose(filled.root / "store.db")
    with caplog.at_level(logging.WARNING), Store.open(filled.root) as later:
        assert str(report) in caplog.text
        with pytest.raises(ArtifactError, match="no artifact"):
            later.find(report.name)


def test_the_index_of_a_newer_slmops_is_left_alone(filled: Store) -> None:
    with sqlite3.connect(filled.root / "store.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ArtifactError, match=f"version 9999; this slmops knows {HEAD}") as caught:
        Store.open(filled.root)
    assert "Update slmops" in str(caught.value.remedy)


def test_sqlite_runs_in_wal_mode(filled: Store) -> None:
    with sqlite3.connect(filled.root / "store.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()


def test_the_migrations_make_exactly_the_tables_of_the_schema(tmp_path: Path) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.config import Config
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import create_engine

    import slmops.store.migrations as migrations

    Index.at_file(tmp_path / "store.db").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'store.db'}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    config = Config()
    config.set_main_option("script_location", str(Path(str(migrations.__file__)).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_runs_are_told_newest_first(store: Store) -> None:
    assert store.runs() == []
    first = store.record_run("a", started_at="2025-01-01T00:00:00Z", finished_at="2025-01-01T00:01:00Z")
    second = store.record_run("b", "d" * 64, outcome="failed")
    assert first == Run("a", "2025-01-01T00:00:00Z", "2025-01-01T00:01:00Z", "done", None)
    assert store.runs() == [second, first]


def test_a_run_noted_halfway_is_passed_over(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    first = store.record_run("a")
    with (store.root / "runs.jsonl").open("a") as journal:
        journal.write('{"name": "cut o')
    second = store.record_run("b")
    lose(store.root / "store.db")
    with Store.open(store.root) as later:
        assert later.runs() == [second, first]
    assert "cannot be read" in caplog.text


# --- another database -------------------------------------------------------------------------------------------


def test_another_database_by_url(filled: Store, tmp_path: Path) -> None:
    before = snapshot(filled)
    with Store.open(filled.root, url=f"sqlite:///{tmp_path / 'elsewhere.db'}") as other:
        assert snapshot(other) == before
    assert (tmp_path / "elsewhere.db").exists()


@pytest.fixture
def postgres_url() -> Iterator[str]:
    bin_folder = postgres.programs()
    if bin_folder is None:
        skip_or_fail("PostgreSQL (initdb and pg_ctl)")
    # Not below pytest's folders: those are closed to the user that the server runs as.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with postgres.postgres_server(Path(folder) / "server", bin_folder) as url:
            yield url


def test_a_server_holds_the_index_as_well(filled: Store, postgres_url: str) -> None:
    before = snapshot(filled)
    for _ in range(2):
        with Store.open(filled.root, url=postgres_url) as other:
            assert snapshot(other) == before
            other.rebuild_index()
            assert snapshot(other) == before


@pytest.mark.parametrize("url", ["nonsense", "cobol://host/db", "postgresql+nodriver://host/db"])
def test_a_url_that_cannot_be_used(tmp_path: Path, url: str) -> None:
    with pytest.raises(UsageError, match="database URL cannot be used"):
        Store.open(tmp_path, url=url)


def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="unable to open database file"):
        Store.open(tmp_path, url=f"sqlite:///{tmp_path}/no/such/folder/store.db")


def test_a_missing_driver_is_named_without_the_password(tmp_path: Path) -> None:
    try:
        import MySQLdb  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(UsageError, match="MySQLdb") as caught:
            Store.open(tmp_path, url="mysql+mysqldb://user:secret@host/db")
        assert "secret" not in str(caught.value)
    else:
        pytest.skip("the driver is installed here")


def test_a_store_without_the_database_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    from slmops.errors import MissingExtraError

    monkeypatch.delitem(sys.modules, "slmops.store.index")
    monkeypatch.setitem(sys.modules, "sqlalchemy", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'slmops\[train\]'"):
        Store.open(tmp_path)
