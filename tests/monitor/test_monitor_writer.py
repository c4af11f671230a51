"""The recorder: never in the way of a request, and honest about what was lost."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from monitor_helpers import answered

from slmops.artifacts import Message
from slmops.artifacts.events import Answered, Feedback
from slmops.errors import StorageError
from slmops.monitor.log import EventLog
from slmops.monitor.policy import MonitorPolicy
from slmops.monitor.prepare import Preparation
from slmops.monitor.writer import BATCH, SKETCH_BURST, EventRecorder
from slmops.privacy import SubjectKey

LATE_S = 5.0
"""Half a second on a machine with nothing else to do; tests share theirs."""
Open = Callable[..., EventRecorder]


def preparation(**policy: Any) -> Preparation:
    return Preparation(MonitorPolicy.model_validate(policy), SubjectKey(b"k" * 32), model="m", version="v")


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Open]:
    opened: list[EventRecorder] = []

    def make(place: Path = tmp_path, busy_timeout_ms: int = 50, **policy: Any) -> EventRecorder:
        log = EventLog.open(place / "events.db", busy_timeout_ms=busy_timeout_ms)
        one = EventRecorder.open(log, preparation(**policy), folder=tmp_path, flush_s=0.05)
        opened.append(one)
        return one

    yield make
    for one in opened:
        one.close()


def until(holds: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


def tell(one: EventRecorder, *numbers: int, **changes: Any) -> None:
    for number in numbers:
        told = [answered(number, **changes)]
        one.observe(lambda told=told: told)  # type: ignore[misc]


def read(place: Path) -> list[dict[str, Any]]:
    with EventLog.open(place / "events.db") as log:
        return log.events()


def test_what_is_told_is_in_the_database_within_a_second(recorder: Open, tmp_path: Path) -> None:
    one = recorder()
    started = time.monotonic()
    tell(one, *range(5))
    until(lambda: len(read(tmp_path)) == 5)
    assert time.monotonic() - started < LATE_S
    state = one.state()
    assert (state["written"], state["waiting"], state["lost"], state["failure"]) == (5, 0, 0, None)


def test_closing_writes_what_waits_and_says_so(recorder: Open, tmp_path: Path) -> None:
    one = recorder()
    tell(one, *range(2000))
    one.close()
    one.close()
    assert len(read(tmp_path)) == 2000
    with EventLog.open(tmp_path / "events.db") as log:
        (session,) = log.sessions()
        assert (session["written"], session["model"]) == (2000, "m")
        assert session["closed_at"] is not None
        assert log.gaps() == []
    assert list((tmp_path / "running").iterdir()) == []
    tell(one, 1)
    assert one.state()["lost"] == 1


def test_a_locked_database_delays_nobody_and_loses_nothing(
    recorder: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = recorder()
    other = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started = time.perf_counter()
    tell(one, *range(100))
    assert time.perf_counter() - started < 0.5
    until(lambda: one.state()["failure"] is not None)
    assert "locked" in str(one.state()["failure"])
    tell(one, *range(100, 200))
    with pytest.raises(StorageError):
        one.feedback(Feedback("id-1", 1.0, 1.0))
    other.execute("ROLLBACK")
    until(lambda: len(read(tmp_path)) == 200)
    assert one.state()["lost"] == 0
    assert "Requests go on" in caplog.text
    assert "written again; 0 were lost" in caplog.text


def test_a_full_queue_is_counted_and_told_as_a_gap(recorder: Open, tmp_path: Path) -> None:
    one = recorder(max_waiting=BATCH)
    other = sqlite3.connect(tmp_path / "events.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    tell(one, 0)
    until(lambda: one.state()["failure"] is not None)
    tell(one, *range(1, 3 * BATCH))
    until(lambda: one.state()["lost"] > 0)
    until(lambda: one.state()["waiting"] >= BATCH)
    lost = one.state()["lost"]
    other.execute("ROLLBACK")
    until(lambda: one.state()["waiting"] == 0 and one.state()["failure"] is None)
    with EventLog.open(tmp_path / "events.db") as log:
        (gap,) = log.gaps()
        assert gap["lost"] == lost
        assert "locked" in gap["reason"]
        assert log.counts()["events"] == 3 * BATCH - lost


def test_a_full_disk_loses_nothing_but_what_does_not_fit_in_the_queue(recorder: Open, tmpfs: Path) -> None:
    one = recorder(tmpfs, content="full")
    ballast = tmpfs / "ballast"
    free = os.statvfs(tmpfs)
    ballast.write_bytes(b"x" * (free.f_bavail * free.f_bsize - 100_000))
    tell(one, *range(300), output="y" * 2000)
    until(lambda: one.state()["failure"] is not None)
    assert "full" in str(one.state()["failure"])
    tell(one, *range(300, 310), output="y" * 2000)
    ballast.unlink()
    until(lambda: one.state()["failure"] is None and one.state()["waiting"] == 0)
    assert one.state()["lost"] == 0
    assert len(read(tmpfs)) == 310


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    place = tmp_path / "tmpfs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_request_that_nobody_understands_is_counted_without_its_text(
    recorder: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> list[Answered]:
        raise ValueError("a secret of a caller")

    one = recorder()
    one.observe(broken)
    tell(one, 1)
    until(lambda: one.state()["written"] == 1)
    assert one.state()["unreadable"] == 1
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_feedback_on_an_answer_that_still_waits(recorder: Open, tmp_path: Path) -> None:
    one = recorder()
    tell(one, 1)
    assert one.feedback(Feedback("id-1", 1.0, 1.0, subject="ann"))
    assert one.feedback(Feedback("req-1", 2.0, 1.0, subject="ann"))
    assert not one.feedback(Feedback("nobody", 1.0, 1.0))
    with EventLog.open(tmp_path / "events.db") as log:
        (said,) = log.feedback()
    assert said["at"] == 2.0
    assert said["subject"] == SubjectKey(b"k" * 32).hash("ann")


def test_texts_are_sketched_up_to_the_rate(recorder: Open, tmp_path: Path) -> None:
    one = recorder(sketches_per_s=0.001)
    tell(one, *range(SKETCH_BURST + 100))
    one.close()
    assert sum(row["sketch"] is not None for row in read(tmp_path)) == SKETCH_BURST
    two = recorder(tmp_path / "other", sketches_per_s=0)
    tell(two, *range(5))
    two.close()
    assert [row["sketch"] for row in read(tmp_path / "other")] == [None] * 5


def test_old_events_are_pruned_at_the_start(recorder: Open, tmp_path: Path) -> None:
    first = recorder()
    tell(first, 1, at=time.time() - 3 * 86_400)
    tell(first, 2, at=time.time())
    first.close()
    recorder(retention_days=2)
    until(lambda: [row["id"] for row in read(tmp_path)] == ["id-2"])


def test_many_threads_tell_at_once(recorder: Open, tmp_path: Path) -> None:
    one = recorder()
    threads = [threading.Thread(target=tell, args=(one, *range(n * 200, n * 200 + 200))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one.close()
    assert len(read(tmp_path)) == 1600


CHILD = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[2]]
from test_monitor_writer import EventLog, EventRecorder, preparation, tell
place = Path(sys.argv[1])
one = EventRecorder.open(EventLog.open(place / "events.db"), preparation(), folder=place)
number = 0
while True:
    tell(one, number, at=time.time())
    print(number, flush=True)
    number += 1
    time.sleep(0.002)
"""


def test_after_kill_9_no_event_is_missing_but_of_the_last_second_and_the_next_start_says_so(
    recorder: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    here = Path(__file__).parent
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(here)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(1000):
        last = child.stdout.readline()
    killed_at = time.time()
    child.send_signal(signal.SIGKILL)
    rest = child.communicate()[0].split()
    told = int((rest or [last])[-1]) + 1
    rows = read(tmp_path)
    numbers = sorted(int(row["id"].removeprefix("id-")) for row in rows)
    assert numbers == list(range(len(numbers)))
    assert len(numbers) <= told
    assert max(row["at"] for row in rows) > killed_at - LATE_S
    with caplog.at_level(logging.WARNING):
        recorder()
    assert "ended without closing" in caplog.text
    with EventLog.open(tmp_path / "events.db") as log:
        (gap,) = log.gaps()
    assert gap["lost"] is None
    assert killed_at - LATE_S < gap["from_at"] < killed_at + 0.5
    assert "at most its last second" in gap["reason"]


def test_a_server_that_still_runs_is_not_called_crashed(recorder: Open, tmp_path: Path) -> None:
    recorder()
    recorder()
    with EventLog.open(tmp_path / "events.db") as log:
        assert log.gaps() == []


def test_without_a_place_to_write_the_server_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "running").write_text("in the way")
    log = EventLog.open(tmp_path / "events.db")
    with pytest.raises(StorageError):
        EventRecorder.open(log, preparation(), folder=tmp_path)


def test_recording_costs_little_processor_time(recorder: Open) -> None:
    one = recorder(content="full")
    text = "where is my card, I ordered it 12 days ago and it still has not arrived?"
    started = time.process_time()
    tell(one, *range(4000), messages=(Message("user", text),))
    one.close()
    assert (time.process_time() - started) / 4000 < 300e-6
