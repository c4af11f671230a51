"""A disk that is full or cannot be written to: one sentence, and nothing half-written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from slmops.artifacts import Dataset, Draft
from slmops.errors import StorageError
from slmops.store import Store

Child = Callable[..., "subprocess.Popen[str]"]


def small(draft: Draft) -> None:
    (draft.path / "train.jsonl").write_text("x")


def stage(store: Store, build: Callable[[Draft], None], seed: int = 0) -> Dataset:
    return store.stage("data", Dataset, inputs={}, config={"seed": seed}, code_version="1", build=build).artifact


def test_a_full_disk_stops_the_build_and_leaves_what_was_whole(tmpfs: Path) -> None:
    def big(draft: Draft) -> None:
        with (draft.path / "model.bin").open("wb") as file:
            for _ in range(64):
                file.write(os.urandom(1 << 20))

    with Store.open(tmpfs / "store") as store:
        whole = stage(store, small)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            stage(store, big, seed=1)
        assert caught.value.remedy == "Free some space or choose another --store."
        assert [path.name for path in (store.root / "artifacts" / "dataset").iterdir()] == [whole.path.name]
        assert stage(store, small, seed=2).size_bytes == 1  # the space is there again
        whole.verify()


def test_a_native_writer_on_a_full_disk_is_understood_too(tmpfs: Path) -> None:
    """safetensors reports it as an error of its own, with the system's words inside."""
    numpy_writer = pytest.importorskip("safetensors.numpy")
    np = pytest.importorskip("numpy")

    def big(draft: Draft) -> None:
        numpy_writer.save_file({"w": np.zeros(8 << 20, np.float32)}, draft.path / "model.safetensors")

    with Store.open(tmpfs / "store") as store:
        with pytest.raises(StorageError, match="No space left on device"):
            stage(store, big)
        assert list((store.root / "artifacts" / "dataset").iterdir()) == []


def test_a_disk_that_is_full_from_the_start(tmpfs: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        (tmpfs / "filler").write_bytes(bytes(4 << 20))
    with pytest.raises(StorageError, match=r"No space left|full"):
        Store.open(tmpfs / "store")


def test_a_full_disk_at_every_size_leaves_no_half(tmpfs: Path) -> None:
    """The room ends at the draft, the manifest, the index: whatever is under a final name is whole."""
    filler = tmpfs / "filler"
    with Store.open(tmpfs / "store") as store:
        for seed in range(24):
            free = os.statvfs(tmpfs)
            room = (seed % 12) * 4096
            filler.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))

            def build(draft: Draft) -> None:
                (draft.path / "a.bin").write_bytes(bytes(9000))
                (draft.path / "b.bin").write_bytes(bytes(3000))

            try:
                stage(store, build, seed)
            except StorageError as error:
                outcome = error.message
            else:
                outcome = ""
            filler.unlink()
            assert bool(outcome) or stage(store, build, seed).size_bytes == 12_000
            for directory in (store.root / "artifacts" / "dataset").iterdir():
                assert not directory.name.startswith(".")
                Dataset.open(directory).verify()
    with Store.open(tmpfs / "store") as later:
        made = list((later.root / "artifacts" / "dataset").iterdir())
        assert made
        assert all(later.find(path.name[:16]).path == path for path in made)


def test_a_read_only_file_system(tmpfs: Path) -> None:
    with Store.open(tmpfs / "store") as store:
        done = stage(store, small)
        subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
        assert stage(store, small) == done
        with pytest.raises(StorageError, match="Read-only file system") as caught:
            stage(store, small, seed=1)
        assert caught.value.remedy == "Choose a writable --store."
        with pytest.raises(StorageError, match="Read-only file system"):
            store.record_run("r")
    with pytest.raises(StorageError, match="Read-only file system"):
        Store.open(tmpfs / "store")
    with pytest.raises(StorageError, match="Read-only file system"):
        Store.open(tmpfs / "another" / "store")
    with Store.open(tmpfs / "store", read_only=True) as reading:
        assert reading.find(done.digest[:8]) == done


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
def test_a_store_of_somebody_else(tmp_path: Path, child: Child) -> None:
    with Store.open(tmp_path / "store") as store:
        stage(store, small)
    code = """
import os, sys
from slmops.errors import StorageError
from slmops.store import Store
import slmops.store.index, slmops.artifacts
os.setgid(65534); os.setuid(65534)
for place in sys.argv[1:]:
    try:
        Store.open(place)
    except StorageError as error:
        print(error)
"""
    for place in (tmp_path, *tmp_path.parents):  # let nobody come as far as the store
        if place.stat().st_uid == 0 and place != Path(place.anchor):
            place.chmod(place.stat().st_mode | 0o055)
    out, err = child(code, tmp_path / "store", tmp_path / "new").communicate(timeout=300)
    assert [("Permission denied" in line, "Choose a writable --store" in line) for line in out.splitlines()] == [
        (True, True),
        (True, True),
    ], err


def test_a_file_where_the_store_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StorageError, match="Could not open the store") as caught:
            Store.open(place)
        assert caught.value.remedy == "Choose a directory for --store."
