"""Texts for a teacher to label: none that repeats a row, whatever split that is in; what cannot be used is counted."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slmops.data import check_unlabelled, read_unlabelled, unlabelled_source
from slmops.errors import DataError, RecipeError
from slmops.progress import Progress
from slmops.recipe import DataConfig

CONFIG = DataConfig(train="rows.csv")
KNOWN = ["where is my card, please tell me now", "I want a refund for the fee", "what is my balance today"]


def read(path: Path, known: list[str] | None = None, config: DataConfig = CONFIG) -> list[str]:
    return read_unlabelled(config, "classification", unlabelled_source(config, str(path)), known or KNOWN)


def jsonl(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def test_what_repeats_a_row_or_an_earlier_text_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "more.csv"
    path.write_text(
        "text\n"
        "a text that nobody has seen before\n"
        '"Where is my card, please tell me NOW!"\n'  # of the rows: case and punctuation do not count
        "a text that nobody has seen before.\n"
        '"where is my card, please tell me nows"\n'  # nearly a row
        "another one altogether\n"
    )
    assert read(path) == ["a text that nobody has seen before", "another one altogether"]
    exact = CONFIG.model_copy(update={"near_duplicates": None})
    assert "where is my card, please tell me nows" in read(path, config=exact)
    assert "Where is my card, please tell me NOW!" not in read(path, config=exact)


def test_rows_that_cannot_be_used_are_counted_and_end_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(
        tmp_path / "more.jsonl",
        {"text": "fine as it is"},
        '{"text": "half',
        {"text": "  "},
        {"other": "no text"},
        {"text": "a\0b"},
        {"text": "fine too, and longer"},
    )
    with caplog.at_level(logging.INFO, "slmops.data.unlabelled"):
        assert read(path) == ["fine as it is", "fine too, and longer"]
    assert "2 texts, 0 repeated, 4 unusable" in caplog.text


def test_the_recipes_template_is_used_and_no_answer_is_needed(tmp_path: Path) -> None:
    config = DataConfig(train="rows.csv", input="{title}: {body}", target="{label}", id="number", system="Be brief.")
    path = jsonl(tmp_path / "more.jsonl", {"title": "Lost", "body": "my card"}, {"title": "Only a title"})
    assert read(path, config=config) == ["Lost: my card"]


def test_parquet_without_the_column_to_split_by(tmp_path: Path) -> None:
    config = DataConfig.model_validate({"train": "rows.csv", "split": {"stratify": "category"}})
    pq.write_table(pa.table({"text": ["one text", "and another one"], "more": [1, 2]}), tmp_path / "more.parquet")
    source = unlabelled_source(config, str(tmp_path / "more.parquet"))
    check_unlabelled(config, "classification", source)
    assert read(tmp_path / "more.parquet", config=config) == ["one text", "and another one"]


def test_progress_ends_with_all_rows(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "more.jsonl", {"text": "one"}, {"text": "two"})
    events: list[Progress] = []
    source = unlabelled_source(CONFIG, str(path))
    read_unlabelled(CONFIG, "classification", source, KNOWN, progress=events.append)
    assert (events[-1].task, events[-1].done, events[-1].total) == ("reading more.jsonl", 2, 2)


# --- refused ----------------------------------------------------------------------------------------------------


def test_nothing_new_is_left(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "more.jsonl", *({"text": text} for text in KNOWN))
    with pytest.raises(DataError, match="None of the 3 rows has a text that is not among the labelled") as caught:
        read(path)
    assert caught.value.path == path
    assert "distill.unlabelled" in (caught.value.remedy or "")


def test_a_file_that_is_not_there_names_its_own_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no file .*nowhere\.csv") as caught:
        unlabelled_source(CONFIG, str(tmp_path / "nowhere.csv"))
    assert caught.value.remedy == "Check distill.unlabelled, or name another: --set distill.unlabelled=FILE."
    with pytest.raises(DataError, match="is not a file"):
        unlabelled_source(CONFIG, str(tmp_path))
    with pytest.raises(RecipeError, match=r"distill\.unlabelled is 'hf:nonsense'"):
        unlabelled_source(CONFIG, "hf:nonsense")


@pytest.mark.parametrize("name", ["more.csv", "more.jsonl"])
def test_a_missing_column_is_known_from_the_first_rows(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("texts,more\na,b\n" if name.endswith("csv") else '{"texts": "a"}\n')
    with pytest.raises(DataError, match="There is no column 'text'; there are: texts") as caught:
        check_unlabelled(CONFIG, "classification", unlabelled_source(CONFIG, str(path)))
    assert "Did you mean 'texts'?" in (caught.value.remedy or "")
