"""Runs that are killed, run out of disk, or are refused before any work."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_helpers import Place

from slmops.artifacts import open_artifact
from slmops.errors import DataError, MemoryBudgetError, ModelError, PrivacyError, RecipeError, StorageError
from slmops.evaluate.summary import REQUIRED_KEYS
from slmops.package import verify_bundle
from slmops.pipeline import run_recipe
from slmops.progress import Progress
from slmops.recipe import parse_recipe
from slmops.store import Store

# One process imports torch; each run is forked off it, and can be killed for itself.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["slmops.pipeline", "slmops.train"])

QUICK = {"untaught_baseline": False, "latency_requests": 5}


def run_apart(raw: dict[str, Any], root: Path, log: Path) -> None:
    """A whole run in a process of its own; each first sign of a part of the work is a line in ``log``."""
    torch.set_num_threads(1)
    seen: set[str] = set()

    def note(event: Progress) -> None:
        if event.task not in seen and event.note != "done before":
            seen.add(event.task)
            with log.open("a") as file:
                file.write(event.task + "\n")

    with Store.open(root) as store:
        result = run_recipe(parse_recipe(raw), store, progress=note)
    (root / "digest").write_text(result.bundle.digest)


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


# --- killed -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments_and_run_again_it_ends_the_same(place: Place, tmp_path: Path) -> None:
    """Killed in another part of the work each time; what has a final name is whole at every moment."""
    raw = place.raw(evaluate=QUICK)
    parts = ["writing rows", "adapt teacher", "teacher", "student", "score student-torch", "measure"]
    moments, root, kills = random.Random(3), tmp_path / "store", 0
    for attempt in range(len(parts) + 1):
        log = tmp_path / f"log-{attempt}"
        process = PROCESSES.Process(target=run_apart, args=(raw, root, log))
        process.start()
        if attempt < len(parts):
            # An earlier run may have come further than its own part before it was killed.
            while not set(parts[attempt:]) & set(lines_of(log)) and process.is_alive():
                time.sleep(0.005)
            process.join(moments.uniform(0.0, 0.3))
            process.kill()
        process.join(500)
        kills += process.exitcode == -signal.SIGKILL
        assert process.exitcode in {0, -signal.SIGKILL}
        for folder in (root / "artifacts").glob("*/[!.]*"):
            open_artifact(folder).verify()
    assert process.exitcode == 0
    assert kills >= 3  # on a busy machine the last parts may end before the kill arrives
    report = json.loads((root / "runs" / "tiny" / "report.json").read_text())
    assert set(REQUIRED_KEYS) <= report.keys()
    assert verify_bundle(root / "runs" / "tiny" / "bundle") == []
    assert list((root / "work").iterdir()) == []
    assert not list(root.rglob("*.tmp"))
    with Store.open(tmp_path / "whole") as store:
        whole = run_recipe(place.recipe(evaluate=QUICK), store)
    same = ("dataset", "checkpoint", "variant")
    assert digests(root, same) == digests(tmp_path / "whole", same)
    assert report["student"]["score"] == whole.report["student"]["score"]


def digests(root: Path, kinds: tuple[str, ...]) -> set[str]:
    manifests = (path for kind in kinds for path in (root / "artifacts" / kind).glob("*/manifest.json"))
    return {json.loads(path.read_text())["digest"] for path in manifests}


# --- no room ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MB of its own."""
    mounted_at = tmp_path / "tmpfs"
    mounted_at.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m,mode=700", "tmpfs", str(mounted_at)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield mounted_at
    subprocess.run(["umount", "-l", str(mounted_at)], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    free = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave_bytes)))
    return filler


@pytest.mark.slow
@pytest.mark.parametrize("part", ["adapt teacher", "student", "compress fp32", "measure"])
def test_a_full_disk_in_the_middle_is_one_sentence_and_nothing_is_lost(place: Place, tmpfs: Path, part: str) -> None:
    root, fillers = tmpfs / "store", []

    def fill_up(event: Progress) -> None:
        if not fillers and event.task == part:
            fillers.append(fill(tmpfs, 20_000))

    with Store.open(root) as store, pytest.raises(StorageError, match=r"No space left|full") as caught:
        run_recipe(place.recipe(evaluate=QUICK), store, progress=fill_up)
    assert "Free some space" in (caught.value.remedy or "")
    assert "\n" not in str(caught.value)
    for folder in (root / "artifacts").glob("*/*"):
        assert not folder.name.startswith(".")
        open_artifact(folder).verify()
    fillers[0].unlink()
    events: list[Progress] = []
    with Store.open(root) as store:
        result = run_recipe(place.recipe(evaluate=QUICK), store, progress=events.append)
    assert result.passed
    assert "data" in {event.task for event in events if event.note == "done before"}


def test_no_room_for_the_result(place: Place, tmpfs: Path, tmp_path: Path, done: Any) -> None:
    """The store is elsewhere and whole; only the copy of the bundle does not fit."""
    fill(tmpfs, 40_000)
    with (
        Store.open(done.store) as store,
        pytest.raises(StorageError, match="Could not put report and bundle") as caught,
    ):
        run_recipe(place.recipe(), store, out=tmpfs / "out")
    assert "No space left" in caught.value.message
    assert "--out" in (caught.value.remedy or "")
    assert not (tmpfs / "out" / "bundle").exists()
    (tmpfs / "filler").unlink()
    with Store.open(done.store) as store:
        assert run_recipe(place.recipe(), store, out=tmpfs / "out").reused
    assert verify_bundle(tmpfs / "out" / "bundle") == []
    assert {path.name for path in (tmpfs / "out").iterdir()} == {"report.json", "report.html", "bundle"}


# --- refused before any work ------------------------------------------------------------------------------------


def refused(place: Place, root: Path, kind: type[Exception], **sections: Any) -> Exception:
    events: list[Progress] = []
    with Store.open(root) as store, pytest.raises(kind) as caught:
        run_recipe(place.recipe(**sections), store, progress=events.append)
    assert not [event for event in events if event.task in {"adapt teacher", "teacher", "student"}]
    return caught.value


def test_rows_would_leave_the_machine(place: Place, tmp_path: Path) -> None:
    teacher = {"model": "openai:gpt", "base_url": "https://teacher.example/v1"}
    error = refused(place, tmp_path, PrivacyError, teacher=teacher)
    assert "privacy: local" in str(error)
    assert "teacher.example" in str(error)
    assert not list((tmp_path / "artifacts").iterdir())


def test_a_key_that_is_not_set(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    teacher = {"model": "openai:gpt", "base_url": "https://teacher.example/v1", "api_key_env": "NO_SUCH_KEY"}
    error = refused(place, tmp_path, RecipeError, teacher=teacher, privacy="remote")
    assert "NO_SUCH_KEY" in str(error)
    assert not list((tmp_path / "artifacts").iterdir())


def test_a_chosen_precision_that_is_not_made(place: Place, tmp_path: Path) -> None:
    error = refused(place, tmp_path, RecipeError, compress={"choose": "int4"})
    assert str(error) == (
        "compress.choose is int4, which is not among compress.precisions, formats or quantize. Add it there, or "
        "choose one of fp32, int8."
    )


def test_no_precision_at_all(place: Place) -> None:
    with pytest.raises(RecipeError, match=r"compress\.precisions is "):
        place.recipe(compress={"precisions": []})


def test_a_local_teacher_without_a_head(place: Place, tmp_path: Path) -> None:
    error = refused(place, tmp_path, RecipeError, teacher={"adapt": False})
    assert "teacher.adapt is false" in str(error)


def test_a_missing_file_and_a_missing_column(place: Place, tmp_path: Path) -> None:
    error = refused(place, tmp_path, DataError, data={"train": str(tmp_path / "nowhere.csv")})
    assert "There is no file" in str(error)
    error = refused(place, tmp_path, DataError, data={"target": "{lable}"})
    assert "Did you mean 'label'?" in str(error)


def test_a_missing_teacher(place: Place, tmp_path: Path) -> None:
    error = refused(place, tmp_path, ModelError, teacher={"model": str(tmp_path / "nowhere")})
    assert "nowhere" in str(error)


def test_a_teacher_that_does_not_fit_in_memory(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import slmops.models.memory as memory

    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 1_000_000)
    refused(place, tmp_path, MemoryBudgetError)


def test_rows_that_nobody_can_be_judged_by(place: Place, tmp_path: Path) -> None:
    """Only the teacher answers, and nothing says whether it is right."""
    teacher = {"model": "openai:fake", "base_url": "http://127.0.0.1:9/v1"}
    sections: dict[str, Any] = {"task": "generation", "data": {"target": None}, "teacher": teacher}
    error = refused(place, tmp_path, DataError, **sections)
    assert "No row of the test split has an answer" in str(error)
    assert "data.target" in str(error)


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"method": "lora"}, "train.method is lora"),
        ({"processes": 2}, "train.processes is 2"),
        ({"trackers": ["mlflow"]}, "train.trackers is set"),
    ],
)
def test_a_run_refuses_what_only_fine_tuning_honours(place: Place, tmp_path: Path, train: Any, said: str) -> None:
    with Store.open(tmp_path / "store") as store, pytest.raises(RecipeError, match=said) as caught:
        run_recipe(place.recipe(train=train), store)
    assert "slmops train RECIPE" in (caught.value.remedy or "")
