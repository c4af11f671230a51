"""A stage is done once for the same inputs, configuration and code; damage is named, not used."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.artifacts import MANIFEST_NAME, Artifact, Dataset, Draft, Report, drafting
from slmops.errors import ArtifactError, CorruptArtifactError, StorageError
from slmops.store import StageResult, Store, stage_key

SOURCE = "5" * 64


def write(text: str = "rows\n", name: str = "train.jsonl") -> Callable[[Draft], None]:
    def build(draft: Draft) -> None:
        (draft.path / name).write_text(text)
        draft.metrics["bytes"] = len(text)

    return build


def never(draft: Draft) -> None:
    pytest.fail("the work was done again")


def data_stage(
    store: Store,
    build: Callable[[Draft], None],
    *,
    name: str = "data",
    inputs: Mapping[str, Artifact | str] = {"train": SOURCE},
    config: Mapping[str, Any] = {"seed": 0},
    code_version: str = "1",
) -> StageResult[Dataset]:
    return store.stage(name, Dataset, inputs=inputs, config=config, code_version=code_version, build=build)


def test_the_same_stage_is_not_done_again_and_still_tells_what_it_cost(store: Store) -> None:
    def slow(draft: Draft) -> None:
        time.sleep(0.05)
        write()(draft)

    first = data_stage(store, slow)
    again = data_stage(store, never)
    assert (first.reused, again.reused) == (False, True)
    assert again.wall_s == first.wall_s >= 0.05
    assert again.artifact == first.artifact
    assert isinstance(again.artifact, Dataset)
    assert again.artifact.path == store.root / "artifacts" / "dataset" / again.artifact.manifest.key[:16]
    assert again.artifact.manifest.inputs == {"train": SOURCE}
    assert again.artifact.manifest.config == {"seed": 0}
    assert again.artifact.manifest.metrics == {"bytes": 5}
    assert list((store.root / "work").iterdir()) == []
    with Store.open(store.root) as later:
        assert data_stage(later, never).wall_s == first.wall_s


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"inputs": {"train": "6" * 64}},
        {"inputs": {"test": SOURCE}},
        {"config": {"seed": 1}},
        {"config": {"seed": 0, "more": None}},
        {"code_version": "2"},
    ],
)
def test_any_change_of_what_counts_is_done_anew(store: Store, change: dict[str, Any]) -> None:
    first = data_stage(store, write())
    second = data_stage(store, write(), **change)
    assert not second.reused
    assert second.artifact.manifest.key != first.artifact.manifest.key
    assert data_stage(store, never).reused


def test_tuples_and_numbers_as_keys_are_the_same_configuration_after_a_round_trip(store: Store) -> None:
    config = {10: ("a", 1.5), 9: Path("x")}
    first = data_stage(store, write(), config=config)
    assert data_stage(store, never, config=json.loads(json.dumps(dict(first.artifact.manifest.config)))).reused


def test_an_input_counts_by_its_contents(store: Store) -> None:
    one = data_stage(store, write("same"), config={"seed": 1}).artifact
    other = data_stage(store, write("same"), config={"seed": 2}).artifact
    assert one.digest == other.digest
    data_stage(store, write(), name="split", inputs={"data": one})
    assert data_stage(store, never, name="split", inputs={"data": other}).reused


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5)), st.text(max_size=5), st.text(max_size=5))
def test_no_two_parts_of_a_key_run_into_each_other(inputs: dict[str, str], name: str, version: str) -> None:
    key = stage_key(name, "dataset", inputs, {}, version)
    assert key != stage_key(name, "dataset", {}, inputs, version) or not inputs
    assert key != stage_key(version, "dataset", inputs, {}, name) or name == version
    assert key != stage_key(name, "report", inputs, {}, version)


def test_a_failure_keeps_the_work_for_the_next_attempt(store: Store) -> None:
    def first(draft: Draft) -> None:
        (draft.work / "step").write_text("1")
        (draft.path / "train.jsonl").write_text("half")
        raise RuntimeError("mid-way")

    def second(draft: Draft) -> None:
        assert (draft.work / "step").read_text() == "1"
        assert list(draft.path.iterdir()) == []
        write()(draft)

    with pytest.raises(RuntimeError, match="mid-way"):
        data_stage(store, first)
    assert list((store.root / "artifacts" / "dataset").iterdir()) == []
    assert not data_stage(store, second).reused


def test_configuration_that_is_not_a_number_stops_before_the_work(store: Store) -> None:
    with pytest.raises(ArtifactError, match=r"config\.rate is nan"):
        data_stage(store, never, config={"rate": float("nan")})


def test_a_build_may_open_the_store_and_run_a_stage_of_its_own(store: Store) -> None:
    def outer(draft: Draft) -> None:
        with Store.open(store.root) as inner:
            data_stage(inner, write("inner"), name="inner")
        write("outer")(draft)

    assert not data_stage(store, outer).reused
    assert data_stage(store, never, name="inner").reused


# --- damage -----------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_one_flipped_byte_of_an_input_is_named_and_not_used(store: Store) -> None:
    data = data_stage(store, write("0123456789"))
    _flip(data.artifact.path / "train.jsonl")
    with Store.open(store.root) as later:
        found = data_stage(later, never).artifact  # the sizes agree; the bytes are compared before they are read
        with pytest.raises(CorruptArtifactError, match=r"train\.jsonl has changed") as caught:
            data_stage(later, never, name="next", inputs={"data": found})
    assert str(data.artifact.path / "train.jsonl") in caught.value.message
    assert caught.value.remedy


def test_a_flipped_byte_of_a_manifest_is_named(store: Store) -> None:
    data = data_stage(store, write())
    path = data.artifact.path / MANIFEST_NAME
    path.write_text(path.read_text().replace('"bytes": 5', '"bytes": 6'))
    with pytest.raises(CorruptArtifactError, match=r"manifest\.json has changed"):
        data_stage(store, never)


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest", "swapped"])
def test_a_damaged_result_is_named_and_neither_used_nor_overwritten(store: Store, damage: str) -> None:
    data = data_stage(store, write("0123456789")).artifact
    match damage:
        case "shorter":
            (data.path / "train.jsonl").write_text("012")
            expected = "train.jsonl has 3 bytes where the manifest says 10"
        case "missing":
            (data.path / "train.jsonl").unlink()
            expected = "train.jsonl is missing"
        case "manifest":
            (data.path / MANIFEST_NAME).unlink()
            expected = "manifest.json is missing"
        case _:
            other = data_stage(store, write("other"), config={"seed": 1}).artifact
            (data.path / MANIFEST_NAME).write_bytes((other.path / MANIFEST_NAME).read_bytes())
            expected = "has the key"
    with pytest.raises(CorruptArtifactError) as caught:
        data_stage(store, never)
    assert expected in caught.value.message
    assert str(data.path) in str(caught.value.remedy)


def test_inputs_are_compared_once_a_process_unless_they_change(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    verify = Artifact.verify
    monkeypatch.setattr(Artifact, "verify", lambda self: (read.append(self.path), verify(self))[1])
    with drafting("dataset", store.root.parent / "elsewhere") as draft:
        write()(draft)
    data = Dataset.open(store.root.parent / "elsewhere")
    for seed in range(3):
        data_stage(store, write(), name="next", inputs={"data": data}, config={"seed": seed})
    assert read == [data.path]
    built_here = data_stage(store, write()).artifact
    data_stage(store, write(), name="next", inputs={"data": built_here}, config={"seed": 9})
    assert read == [data.path]
    _flip(data.path / "train.jsonl")
    with pytest.raises(CorruptArtifactError, match="has changed"):
        store.verify(data)


def test_an_input_that_is_gone_is_named(store: Store) -> None:
    data = data_stage(store, write()).artifact
    (data.path / "train.jsonl").unlink()
    with pytest.raises(CorruptArtifactError, match=r"train\.jsonl is missing"):
        data_stage(store, never, name="next", inputs={"data": data})


# --- finding ----------------------------------------------------------------------------------------------------


def test_an_artifact_is_found_by_digest_key_and_path(store: Store) -> None:
    data = data_stage(store, write()).artifact
    for text in (
        data.digest,
        data.digest[:4],
        data.digest[:12].upper(),
        data.manifest.key[:9],
        str(data.path),
        str(data.path / MANIFEST_NAME),
    ):
        found = store.find(text)
        assert found == data
        assert isinstance(found, Dataset)


def test_an_unknown_name_says_what_is_there(store: Store) -> None:
    with pytest.raises(ArtifactError, match="no artifact 'abcd'") as caught:
        store.find("abcd")
    assert "empty" in str(caught.value.remedy)
    digest = data_stage(store, write()).artifact.digest
    for text in ("", "xyz", "%", "____", digest[:3], digest + "0", str(store.root)):
        with pytest.raises(ArtifactError, match="There is no artifact") as caught:
            store.find(text)
        assert f"{digest[:12]} (dataset data)" in str(caught.value.remedy)


def test_an_ambiguous_prefix_lists_the_candidates(store: Store) -> None:
    seen: dict[str, str] = {}
    for seed in range(3000):
        key = stage_key("data", "dataset", {"train": SOURCE}, {"seed": seed}, "1")
        if (twin := seen.get(key[:4])) is not None:
            break
        seen[key[:4]] = str(seed)
    for number in (int(twin or 0), seed):
        data_stage(store, write(f"{number}"), config={"seed": number})
    with pytest.raises(ArtifactError, match="may mean 2 artifacts"):
        store.find(key[:4])


def test_the_same_contents_under_two_keys_are_one_answer(store: Store) -> None:
    for seed in range(2):
        digest = data_stage(store, write("same"), config={"seed": seed}).artifact.digest
    assert store.find(digest[:8]).digest == digest


def test_what_another_process_finished_is_found(store: Store) -> None:
    with Store.open(store.root) as other:
        digest = data_stage(other, write()).artifact.digest
    assert store.find(digest[:10]).digest == digest


def test_a_deleted_artifact_is_no_longer_found_and_is_made_again(store: Store) -> None:
    data = data_stage(store, write()).artifact
    for path in data.path.iterdir():
        path.unlink()
    data.path.rmdir()
    with pytest.raises(ArtifactError, match="There is no artifact"):
        store.find(data.digest)
    assert not data_stage(store, write()).reused


# --- reading only -----------------------------------------------------------------------------------------------


def test_a_store_for_reading_gives_what_is_done_and_writes_nothing(store: Store) -> None:
    data = data_stage(store, write()).artifact
    before = sorted(str(path) for path in store.root.rglob("*"))
    with Store.open(store.root, read_only=True) as reading:
        assert data_stage(reading, never).reused
        assert reading.find(data.digest[:8]) == data
        with pytest.raises(StorageError, match="report is not done yet"):
            reading.stage("report", Report, inputs={"data": data}, config={}, code_version="", build=never)
    assert sorted(str(path) for path in store.root.rglob("*")) == before


def test_a_store_for_reading_need_not_exist(tmp_path: Path) -> None:
    with Store.open(tmp_path / "none", read_only=True) as reading, pytest.raises(ArtifactError, match="no artifact"):
        reading.find("abcd")
    assert not (tmp_path / "none").exists()
