"""Writing artifacts whole or not at all, and finding damage."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.artifacts import MANIFEST_NAME, Artifact, Bundle, Dataset, Draft, Row, drafting, open_artifact
from slmops.artifacts.base import is_storage_trouble
from slmops.artifacts.plain import plain_json
from slmops.errors import ArtifactError, CorruptArtifactError, StorageError


def _dataset(destination: Path, key: str = "", text: str = "hello") -> Dataset:
    with drafting("dataset", destination, key=key, inputs={"source": "ab"}, config={"seed": 0}) as draft:
        row = Row.from_json({"id": 1, "messages": [{"role": "user", "content": text}], "target": "greet"})
        for split in ("train", "validation", "test"):
            (draft.path / f"{split}.jsonl").write_text(json.dumps(row.to_json()) + "\n", "utf-8")
        (draft.path / "summary.json").write_text('{"labels": ["greet"]}', "utf-8")
        draft.metrics["rows"] = 3
        draft.extra["note"] = "kept"
    return Dataset.open(destination)


def _left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("."))


def test_a_draft_becomes_an_artifact(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d", key="k")
    dataset.verify()
    assert dataset.labels == ("greet",)
    assert [row.text for row in dataset.rows("test")] == ["hello"]
    assert dataset.size_bytes == sum(p.stat().st_size for p in dataset.path.iterdir() if p.name != MANIFEST_NAME)
    assert dataset.manifest.metrics == {"rows": 3}
    assert dataset.manifest.extra == {"note": "kept"}
    assert _left_over(tmp_path) == []
    assert isinstance(open_artifact(dataset.path), Dataset)


def test_the_digest_is_over_contents_alone(tmp_path: Path) -> None:
    one, same, other = _dataset(tmp_path / "1", "a"), _dataset(tmp_path / "2", "b"), _dataset(tmp_path / "3", "a", "x")
    assert one.digest == same.digest != other.digest


def test_another_kind_is_refused_and_an_unknown_kind_is_opened_plainly(tmp_path: Path) -> None:
    _dataset(tmp_path / "d")
    with pytest.raises(ArtifactError, match="is a dataset, not a bundle"):
        Bundle.open(tmp_path / "d")
    with drafting("hologram", tmp_path / "h") as draft:
        (draft.path / "x").write_bytes(b"")
    assert type(open_artifact(tmp_path / "h")) is Artifact


def test_an_error_leaves_no_artifact_and_keeps_the_work(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mid-way"), drafting("dataset", tmp_path / "d") as draft:
        _fail(draft, RuntimeError("mid-way"))
    assert [path.name for path in tmp_path.iterdir()] == [".d.work"]
    with drafting("dataset", tmp_path / "d") as draft:
        assert (draft.work / "journal").read_text() == "step 1"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_the_same_key_finished_by_another_is_taken_and_anything_else_is_not_overwritten(tmp_path: Path) -> None:
    first = _dataset(tmp_path / "d", key="k")
    assert _dataset(tmp_path / "d", key="k", text="later").digest == first.digest
    for key in ("other", ""):
        with pytest.raises(ArtifactError, match="exists already"):
            _dataset(tmp_path / "d", key=key)
    (tmp_path / "f").write_text("a file")
    with pytest.raises(ArtifactError, match="exists already"):
        _dataset(tmp_path / "f", key="k")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("somebody's")
    with pytest.raises(ArtifactError, match="exists already"):
        _dataset(tmp_path / "full", key="k")
    assert (tmp_path / "full" / "x").read_text() == "somebody's"
    Dataset.open(tmp_path / "d").verify()


def test_the_manifest_is_not_for_the_block_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written by drafting"), drafting("dataset", tmp_path / "d") as draft:
        (draft.path / MANIFEST_NAME).write_text("{}")
    with drafting("dataset", tmp_path / "d") as draft:
        (draft.path / "inner").mkdir()
        (draft.path / "inner" / MANIFEST_NAME).write_text("{}")
    Dataset.open(tmp_path / "d").verify()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_flipped_bit_is_named(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    dataset = _dataset(tmp_path_factory.mktemp("flip") / "d")
    name = data.draw(st.sampled_from(sorted(dataset.manifest.files)))
    path = dataset.path / name
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    with pytest.raises(CorruptArtifactError) as caught:
        Dataset.open(dataset.path).verify()
    assert str(path) in caught.value.message
    assert "has changed" in caught.value.message


def test_missing_and_added_files_are_named(tmp_path: Path) -> None:
    dataset = _dataset(tmp_path / "d")
    (dataset.path / "surprise.bin").write_bytes(b"")
    with pytest.raises(CorruptArtifactError, match=r"surprise\.bin is not in the manifest"):
        dataset.verify()
    (dataset.path / "test.jsonl").unlink()
    with pytest.raises(CorruptArtifactError, match=r"test\.jsonl is missing"):
        dataset.verify()


def test_metrics_that_are_not_finite_become_null_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), drafting("report", tmp_path / "r") as draft:
        draft.metrics |= {"loss": float("nan"), "by": {"epoch": [np.float32(0.5), np.inf]}, "rows": np.int64(7)}
    assert open_artifact(tmp_path / "r").manifest.metrics == {"loss": None, "by": {"epoch": [0.5, None]}, "rows": 7}
    assert "metrics.loss is nan" in caplog.text
    assert "metrics.by.epoch[1] is inf" in caplog.text


def test_configuration_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"config\.rate is nan"),
        drafting("report", tmp_path / "r", config={"rate": float("nan")}),
    ):
        pass
    assert not (tmp_path / "r").exists()


def test_plain_json_of_what_stages_hand_in() -> None:
    value = {1: (True, None), "p": Path("a/b"), "array": np.array([[1, 2]]), "odd": "\udcff"}
    assert plain_json(value, "v") == {"1": [True, None], "p": "a/b", "array": [[1, 2]], "odd": "\\udcff"}
    with pytest.raises(TypeError, match=r"v\.f is a function"):
        plain_json({"f": lambda: None}, "v")


# --- a disk that will not take it -------------------------------------------------------------------------------


def _fail(draft: Draft, error: Exception) -> None:
    (draft.path / "half").write_bytes(b"half")
    (draft.work / "journal").write_text("step 1")
    raise error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence_and_nothing_is_left(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StorageError) as caught, drafting("variant", tmp_path / "v") as draft:
        _fail(draft, error)
    assert "Could not write the variant" in caught.value.message
    assert "Free some space" in str(caught.value.remedy)
    assert not (tmp_path / "v").exists()
    assert _left_over(tmp_path) == [".v.work"]


def test_a_users_file_that_cannot_be_read_is_not_blamed_on_the_store(tmp_path: Path) -> None:
    unreadable = PermissionError(errno.EACCES, "Permission denied", "/home/somebody/rows.csv")
    with pytest.raises(PermissionError), drafting("dataset", tmp_path / "d") as draft:
        _fail(draft, unreadable)
    with pytest.raises(StorageError), drafting("dataset", tmp_path / "d") as draft:
        _fail(draft, PermissionError(errno.EACCES, "Permission denied", str(draft.path / "x")))


def test_which_errors_are_the_disks() -> None:
    assert is_storage_trouble(OSError(errno.EROFS, "read-only"))
    assert is_storage_trouble(PermissionError(errno.EACCES, "no", "/store"), within=[Path("/store/artifacts")])
    assert not is_storage_trouble(PermissionError(errno.EACCES, "no", "/other"), within=[Path("/store")])
    assert not is_storage_trouble(FileNotFoundError(errno.ENOENT, "gone"))


def test_an_error_of_ours_passes_unchanged(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifactError, match="inner"), drafting("dataset", tmp_path / "d"):
        raise CorruptArtifactError("inner")
