from __future__ import annotations

from pathlib import Path

import pytest

from slmops.data import source_digests
from slmops.data.sources import Slice, choose_files, parse_slice, resolve
from slmops.errors import DataError, RecipeError
from slmops.recipe import DataConfig
from slmops.trust import digest_bytes


@pytest.mark.parametrize(
    "text", [":4096", "10%:20%", "-100:", ":-10", "5:7", "33%:67%", "-10%:", ":", "50:", ":100%", "99:2000", "-5:-2"]
)
@pytest.mark.parametrize("total", [1, 7, 100, 1033])
def test_slices_mean_what_datasets_makes_of_them(text: str, total: int) -> None:
    datasets = pytest.importorskip("datasets")
    part = parse_slice(text, source="hf:a/b")
    try:
        [expected] = datasets.ReadInstruction.from_spec(f"train[{text}]").to_absolute({"train": total})
    except (ValueError, AssertionError):
        return  # datasets refuses bounds outside the split; here they are cut to it
    start, stop = part.rows(total)
    assert (min(start, stop), stop) == (expected.from_ or 0, total if expected.to is None else expected.to) or (
        stop <= start and expected.to is not None and expected.to <= (expected.from_ or 0)
    )


@pytest.mark.parametrize("text", ["5", "a:b", "1:2:3", "1.5%:", "-120%:", ":120%"])
def test_what_is_no_slice(text: str) -> None:
    with pytest.raises(RecipeError, match=r"\["):
        parse_slice(text, source="hf:a/b")


def test_a_slice_knows_whether_it_needs_the_total() -> None:
    assert not Slice("", "4096").needs_total
    assert Slice("-10", "").needs_total
    assert Slice("", "10%").needs_total


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["data/train-00001-of-00002.parquet", "data/train-00000-of-00002.parquet", "data/test-0.parquet"], "train", 2),
        (["train.jsonl", "train.csv", "test.csv"], "train", 1),
        (["dev.csv", "train.csv"], "validation", 1),
        (["rows.csv", "README.md", ".git/train.csv"], "train", 1),
        (["test/a.jsonl", "test/b.jsonl.gz"], "test", 2),
        (["one/train.csv", "two/train.csv"], "one/train", 1),
        (["contrain.csv", "train_0.json"], "train", 1),
    ],
)
def test_files_of_a_split(tmp_path: Path, names: list[str], split: str, expected: int) -> None:
    chosen = choose_files(tree(tmp_path, *names), split, source="hf:a/b")
    assert len(chosen) == expected
    assert list(chosen) == sorted(chosen)
    if "train.jsonl" in names:
        assert chosen[0].name == "train.jsonl"
    if "train_0.json" in names:
        assert chosen[0].name == "train_0.json"


def test_a_split_that_is_not_there_names_what_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test'; there is: train\.csv"):
        choose_files(tree(tmp_path, "train.csv"), "test", source="hf:a/b")


def test_a_split_in_several_folders_must_be_chosen(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"several folders: one, two.*one/train"):
        choose_files(tree(tmp_path, "one/train.csv", "two/train.csv"), "train", source="hf:a/b")


def test_hub_sources_are_fetched_at_their_revision(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(name: str, revision: str | None) -> Path:
        asked.append((name, revision))
        return tree(tmp_path, "train.csv", "validation.csv")

    config = DataConfig(train="hf:owner/some.name@v1.0:train[:5]", validation="hf:owner/name")
    train, validation = resolve(config, fetch)
    assert asked == [("owner/some.name", "v1.0"), ("owner/name", None)]
    assert train.slice == Slice("", "5")
    assert validation.files[0].name == "validation.csv"
    assert validation.slice is None


@pytest.mark.parametrize("text", ["hf:name", "hf:a/b@", "hf:a/b:train[:5", "hf:a/b:train+test"])
def test_hub_sources_that_cannot_be_understood(text: str) -> None:
    with pytest.raises(RecipeError, match="cannot be understood"):
        resolve(DataConfig(train=text), lambda name, revision: Path())


def test_a_missing_file_and_an_unknown_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*nowhere\.csv.*data\.train"):
        resolve(DataConfig(train=str(tmp_path / "nowhere.csv")), None)
    with pytest.raises(DataError, match=r"not a file.*data\.test"):
        resolve(DataConfig(train="sample:support", test=str(tmp_path)), None)
    with pytest.raises(RecipeError, match="sample:support"):
        resolve(DataConfig(train="sample:other"), None)
    with pytest.raises(DataError, match="must be fetched"):
        resolve(DataConfig(train="hf:a/b"), None)


def test_digests_follow_the_bytes(tmp_path: Path) -> None:
    train, test = tmp_path / "a.csv", tmp_path / "b.csv"
    train.write_text("one")
    test.write_text("two")
    config = DataConfig(train=str(train), test=str(test))
    before = source_digests(config)
    assert before == {"train": digest_bytes(b"one"), "test": digest_bytes(b"two")}
    test.write_text("three")
    assert source_digests(config)["train"] == before["train"]
    assert source_digests(config)["test"] != before["test"]
