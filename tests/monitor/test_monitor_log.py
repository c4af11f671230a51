"""Events in SQLite and in a real PostgreSQL server: written once, read, forgotten to the last byte, exported."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from monitor_helpers import NOW, row, said, turns

from fakes.postgres import postgres_server, programs
from skipping import skip_or_fail
from slmops.errors import DataError, StorageError, UsageError
from slmops.monitor.export import export_parquet
from slmops.monitor.log import EventLog, Removed, Window


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    found = programs()
    if found is None:
        skip_or_fail("PostgreSQL is not installed")
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        with postgres_server(Path(place) / "pg", found) as url:
            yield url


@pytest.fixture(params=["sqlite", "postgres"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    place: Any = request.getfixturevalue("postgres") if request.param == "postgres" else tmp_path / "events.db"
    with EventLog.open(place) as opened:
        yield opened
        opened.prune(NOW + 1e9)
        for one in opened.sessions():
            opened.end_crashed(one["id"], at=NOW)


def test_events_are_written_once_and_read_in_order(log: EventLog) -> None:
    log.append([row(2), row(1), row(3)])
    log.append([row(2, latency_ms=99.0), row(4, sketch=b"\x00\x01", format_ok=False, messages=turns("naïve ☎"))])
    events = log.events()
    assert [one["id"] for one in events] == ["id-1", "id-2", "id-3", "id-4"]
    assert events[1] == row(2)
    assert events[3] == row(4, sketch=b"\x00\x01", format_ok=False, messages=turns("naïve ☎"))
    assert log.counts() == {"events": 4, "feedback": 0, "judgements": 0}
    assert [one["at"] for one in log.events(Window(newest=2), "at")] == [NOW + 3, NOW + 4]


def test_windows(log: EventLog) -> None:
    log.append(
        [
            row(1, version="a"),
            row(2, model="other"),
            row(3, adapter="x", slices='{"lang": "de", "tenant": "a_c"}'),
            row(4, slices='{"lang": "de", "tenant": "abc"}'),
        ]
    )

    def ids(**window: Any) -> list[str]:
        return [one["id"] for one in log.events(Window(**window), "id")]

    assert ids(since=NOW + 2, until=NOW + 4) == ["id-2", "id-3"]
    assert ids(version="a") == ["id-1"]
    assert ids(model="other") == ["id-2"]
    assert ids(adapter="x") == ["id-3"]
    assert ids(slice=("tenant", "a_c")) == ["id-3"]
    assert ids(slice=("lang", "de")) == ["id-3", "id-4"]
    assert [(one["model"], one["version"], one["events"]) for one in log.versions()] == [
        ("m", "a", 1), ("other", "v", 1), ("m", "v", 1), ("m", "v", 1),
    ]  # fmt: skip


def test_feedback_is_one_say_a_subject(log: EventLog) -> None:
    log.append([row(1), row(2)])
    log.give_feedback(said("id-1", subject="s", score=0.0))
    log.give_feedback(said("id-1", subject="s", score=0.0))
    log.give_feedback(said("id-1", subject="t", score=1.0, correction="fee"))
    assert len(log.feedback()) == 2
    log.give_feedback(said("id-1", subject="s", score=1.0, at=NOW + 9))
    assert {one["subject"]: one["score"] for one in log.feedback()} == {"s": 1.0, "t": 1.0}
    assert log.feedback(Window(since=NOW + 2)) == []
    with pytest.raises(StorageError):
        log.give_feedback(said("nobody"))


def test_an_answer_is_found_by_its_id_or_by_a_request_with_one(log: EventLog) -> None:
    log.append([row(1), row(2, request_id="both"), row(3, request_id="both")])
    assert log.find("id-1") == log.find("req-1") == "id-1"
    assert log.find("both") is None
    assert log.find("id-3") == "id-3"
    assert log.find("' OR 1=1 --") is None


def test_forgetting_takes_all_that_belongs_to_a_person(log: EventLog) -> None:
    log.append([row(1, subject="ann"), row(2, subject="ann"), row(3, subject="bob")])
    log.give_feedback(said("id-1", subject="bob", score=1.0))
    log.give_feedback(said("id-3", subject="ann", score=0.0))
    log.give_feedback(said("id-3", subject="bob", score=1.0))
    log.judge([{"event": one, "judge": "j", "at": NOW, "score": 4} for one in ("id-1", "id-3")])
    assert log.ids_of("ann") == ["id-1", "id-2"]
    assert [one["event"] for one in log.said_by("ann")] == ["id-3"]
    assert log.forget("ann") == Removed(events=2, feedback=2, judgements=1)
    assert [one["id"] for one in log.events()] == ["id-3"]
    assert [(one["event"], one["subject"]) for one in log.feedback()] == [("id-3", "bob")]
    assert log.forget("ann") == Removed(0, 0, 0)


def test_old_events_go_with_all_that_was_said_of_them(log: EventLog) -> None:
    log.append([row(number) for number in range(10)])
    log.give_feedback(said("id-1", score=1.0))
    log.give_feedback(said("id-8", score=1.0))
    assert log.prune(NOW + 5) == Removed(5, 1, 0)
    assert [one["id"] for one in log.events()] == [f"id-{number}" for number in range(5, 10)]
    assert log.prune(NOW + 5, compact=True) == Removed(0, 0, 0)


def test_judgements_are_replaced_by_the_same_judge(log: EventLog) -> None:
    log.append([row(1)])
    log.judge([])
    log.judge([{"event": "id-1", "judge": "a", "at": NOW, "score": 2}])
    log.judge(
        [{"event": "id-1", "judge": "a", "at": NOW, "score": 5}, {"event": "id-1", "judge": "b", "at": NOW, "score": 1}]
    )
    assert sorted((one["judge"], one["score"]) for one in log.judgements()) == [("a", 5), ("b", 1)]


def test_parquet_holds_everything_but_the_sketches(log: EventLog, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    log.append([row(1, sketch=b"x", subject="hash", messages=turns("hello")), row(2, label=None)])
    log.give_feedback(said("id-1", score=0.5))
    assert export_parquet(log, tmp_path / "out") == {"events": 2, "feedback": 1, "judgements": 0}
    events = pq.read_table(tmp_path / "out/events.parquet")
    assert "sketch" not in events.column_names
    assert events.to_pylist()[0] == {name: value for name, value in log.events()[0].items() if name != "sketch"}
    assert pq.read_table(tmp_path / "out/judgements.parquet").num_rows == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "events.parquet", "feedback.parquet", "judgements.parquet",
    ]  # fmt: skip


def test_a_session_that_did_not_close_leaves_a_gap(log: EventLog) -> None:
    log.begin("one", model="m", version="v", at=NOW)
    log.beat("one", at=NOW + 5, written=3, joules=1.5)
    assert log.end_crashed("one", at=NOW + 60) == NOW + 5
    assert log.end_crashed("one", at=NOW + 70) is None
    log.begin("two", model="m", version="v", at=NOW)
    log.beat("two", at=NOW + 6, written=3, joules=None, closed=True)
    assert log.end_crashed("two", at=NOW + 70) is None
    (gap,) = [one for one in log.gaps() if one["session"] == "one"]
    assert (gap["from_at"], gap["until_at"], gap["lost"]) == (NOW + 5, NOW + 60, None)


PERSONAL = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=12, max_size=30)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PERSONAL, st.integers(0, 30), st.integers(0, 30))
def test_nothing_of_a_forgotten_person_is_left_in_any_file(
    tmp_path_factory: pytest.TempPathFactory, secret: str, before: int, after: int
) -> None:
    folder = tmp_path_factory.mktemp("forget")
    text = f"@@{secret}@@"
    with EventLog.open(folder / "events.db") as log:
        log.append([row(number, messages=turns("x" * 300), subject="other") for number in range(before)])
        log.append([row(100, messages=turns(text), output=text, subject="who"), row(101, subject="who", label=text)])
        log.append([row(200 + number, messages=turns("y" * 300), subject="other") for number in range(after)])
        log.give_feedback(said("id-100", subject="other", comment=text, correction=text))
        assert any(text.encode() in path.read_bytes() for path in folder.iterdir())
        log.forget("who")
        assert not any(text.encode() in path.read_bytes() for path in folder.iterdir())
        assert log.counts()["events"] == before + after


def test_pruned_texts_are_out_of_the_file_too(tmp_path: Path) -> None:
    with EventLog.open(tmp_path / "events.db") as log:
        log.append([row(1, messages=turns("@@a secret of long ago@@")), row(50)])
        log.prune(NOW + 10)
        assert not any(b"@@a secret" in path.read_bytes() for path in tmp_path.iterdir())


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Nothing was recorded here"):
        EventLog.open(tmp_path / "nowhere.db", create=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        EventLog.open(tmp_path / "file" / "events.db")
    (tmp_path / "noise.db").write_bytes(b"no database at all, but long enough to be read as one" * 20)
    with pytest.raises(StorageError, match="Move the file away"):
        EventLog.open(tmp_path / "noise.db")
    with pytest.raises(UsageError, match="database URL cannot be used"):
        EventLog.open("nonsense://here")


def test_the_migrations_make_exactly_the_tables_of_the_schema(tmp_path: Path) -> None:
    import sqlalchemy as sa
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    import slmops.monitor.migrations as migrations
    from slmops.monitor.log import HEAD
    from slmops.monitor.schema import metadata

    EventLog.open(tmp_path / "events.db").close()
    with sa.create_engine(f"sqlite:///{tmp_path}/events.db").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    assert ScriptDirectory(str(Path(str(migrations.__file__)).parent)).get_current_head() == HEAD
