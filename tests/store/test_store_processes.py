"""Killed at any moment and run again; two at once."""

from __future__ import annotations

import logging
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slmops.artifacts import Dataset, Draft, open_artifact
from slmops.store import Store

Child = Callable[..., "subprocess.Popen[str]"]

STEPS = 12

STAGES = f"""
import sys, time
from pathlib import Path
from slmops.artifacts import Dataset, Report
from slmops.store import Store

def build(draft):
    journal = draft.work / "journal"
    done = len(journal.read_text().split()) if journal.exists() else 0
    print("resumed at", done, flush=True)
    for step in range(done, {STEPS}):
        time.sleep(0.02)
        (draft.path / "half").write_bytes(bytes(100_000))
        with journal.open("a") as file:
            file.write(f"{{step}}\\n")
    (draft.path / "half").unlink(missing_ok=True)
    for number in range(20):
        (draft.path / f"{{number}}.bin").write_bytes(bytes([number]) * 50_000)
    (draft.path / "train.jsonl").write_text(journal.read_text())

def report(draft):
    (draft.path / "report.json").write_text("{{}}")

with Store.open(Path(sys.argv[1])) as store:
    data = store.stage("data", Dataset, inputs={{"train": "5" * 64}}, config={{}}, code_version="1", build=build)
    made = store.stage("report", Report, inputs={{"data": data.artifact}}, config={{}}, code_version="1", build=report)
    print("finished", data.reused, made.artifact.digest, flush=True)
"""


def test_killed_at_random_moments_the_result_is_whole_and_work_is_not_lost(tmp_path: Path, child: Child) -> None:
    moments = random.Random(7)
    root = tmp_path / "store"
    steps_at_start: list[int] = []
    kills = 0
    for attempt in range(16):
        process = child(STAGES, root)
        first = ""
        if attempt < 15:
            # Mostly counted from the first sign of work, so that work and its end are hit; sometimes from the start.
            first = process.stdout.readline() if attempt % 4 else ""
            time.sleep(moments.uniform(0, 0.06) if attempt < 12 else moments.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        out, err = process.communicate(timeout=300)
        assert process.returncode in {0, -signal.SIGKILL}, err
        kills += process.returncode != 0
        if "resumed at" in (text := first + out):
            steps_at_start.append(int(text.split("resumed at ")[1].split()[0]))
        for directory in (root / "artifacts").glob("*/*"):
            if not directory.name.startswith("."):  # under its final name: whole, at every moment
                open_artifact(directory).verify()
    assert "finished" in out
    assert kills >= 10
    assert steps_at_start == sorted(steps_at_start), "a later run began before an earlier one's journal"
    assert max(steps_at_start) > 0, "no run went on from another's work"
    with Store.open(root) as store:
        lines = next((root / "artifacts" / "dataset").iterdir()) / "train.jsonl"
        assert lines.read_text().split() == [str(step) for step in range(STEPS)]
        assert [path.name for path in root.rglob("*.tmp")] == []
        assert list((root / "work").iterdir()) == []
        lineage = store.trace(store.find(str(next((root / "artifacts" / "report").iterdir()))))
        assert [node.kind for node in lineage.ancestors] == ["dataset", "source"]


def test_killed_after_the_rename_the_next_opening_tidies_up(tmp_path: Path, child: Child) -> None:
    code = """
import os, signal, sys
from slmops.artifacts import Dataset
from slmops.artifacts import base
from slmops.store import Store

base.sync_directory = lambda path: os.kill(os.getpid(), signal.SIGKILL) if path.name == "dataset" else None
build = lambda draft: (draft.path / "train.jsonl").write_text("x")
Store.open(sys.argv[1]).stage("data", Dataset, inputs={}, config={}, code_version="1", build=build)
"""
    process = child(code, tmp_path)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "work").iterdir())) == 1
    with Store.open(tmp_path) as store:
        assert list((tmp_path / "work").iterdir()) == []
        artifact = next((tmp_path / "artifacts" / "dataset").iterdir())
        assert store.find(artifact.name[:8]).path == artifact


def test_a_draft_in_work_is_left_alone_and_a_dead_one_is_removed(tmp_path: Path, child: Child) -> None:
    code = """
import sys, time
from slmops.artifacts import Dataset
from slmops.store import Store

def build(draft):
    (draft.path / "train.jsonl").write_text("x")
    print("started", flush=True)
    time.sleep(60)

Store.open(sys.argv[1]).stage("data", Dataset, inputs={}, config={}, code_version="1", build=build)
"""
    process = child(code, tmp_path)
    assert process.stdout.readline() == "started\n"
    Store.open(tmp_path).close()
    assert len(list(tmp_path.glob("artifacts/dataset/.*.tmp"))) == 1
    process.kill()
    process.communicate()
    assert len(list(tmp_path.glob("artifacts/dataset/.*.tmp"))) == 1
    Store.open(tmp_path).close()
    assert list(tmp_path.glob("artifacts/dataset/.*.tmp")) == []


def test_two_processes_at_once_do_the_work_once(tmp_path: Path, child: Child) -> None:
    code = """
import sys, time
from slmops.artifacts import Dataset
from slmops.store import Store

def build(draft):
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    time.sleep(0.5)
    (draft.path / "train.jsonl").write_text("x")

result = Store.open(sys.argv[1]).stage("data", Dataset, inputs={}, config={}, code_version="1", build=build)
print(result.reused, result.artifact.digest, result.wall_s >= 0.5)
"""
    processes = [child(code, tmp_path / "store", tmp_path / "log") for _ in range(3)]
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        answers.append(out.split())
    assert (tmp_path / "log").read_text() == "built\n"
    assert sorted(answer[0] for answer in answers) == ["False", "True", "True"]
    assert len({answer[1] for answer in answers}) == 1
    assert all(answer[2] == "True" for answer in answers)


def test_who_waits_says_so_and_takes_over_when_the_first_fails(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    at_work, go_on = threading.Event(), threading.Event()

    def failing(draft: Draft) -> None:
        (draft.work / "step").write_text("1")
        at_work.set()
        go_on.wait(120)
        raise RuntimeError("the first one fails")

    def build(draft: Draft) -> None:
        assert (draft.work / "step").read_text() == "1"
        (draft.path / "train.jsonl").write_text("x")

    def first() -> None:
        with pytest.raises(RuntimeError), Store.open(tmp_path) as store:
            store.stage("data", Dataset, inputs={}, config={}, code_version="1", build=failing)

    thread = threading.Thread(target=first)
    thread.start()
    assert at_work.wait(120)
    threading.Timer(0.3, go_on.set).start()
    with caplog.at_level(logging.WARNING), Store.open(tmp_path) as store:
        result = store.stage("data", Dataset, inputs={}, config={}, code_version="1", build=build)
    thread.join(120)
    assert not result.reused
    assert "data (" in caplog.text
    assert "is being made by another run; waiting for it" in caplog.text


def test_many_open_a_new_store_at_once(tmp_path: Path, child: Child) -> None:
    code = "import sys; from slmops.store import Store; s = Store.open(sys.argv[1]); s.record_run('r'); print('ok')"
    processes = [child(code, tmp_path / "store") for _ in range(5)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert (process.returncode, out) == (0, "ok\n"), err
    with Store.open(tmp_path / "store") as store:
        assert len(store.runs()) == 5
