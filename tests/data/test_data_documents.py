"""Running text: txt and md files, folders of them, columns of rows; documents, splits, duplicates, bad input."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Run
from slmops.data import source_digests
from slmops.data.readers import BadRecord, Reading, Record, read_records
from slmops.errors import DataError, RecipeError
from slmops.recipe import DataConfig, parse_recipe

MARKDOWN = """before

# One
first
## Two
### Three
second

```sh
# no heading
```
# Four
"""


def texts_of(path: Path, **options: Any) -> list[str]:
    return [record.values["text"] for record in read_records(Reading(path, **options)) if isinstance(record, Record)]


def numbered(count: int) -> list[str]:
    return [f"Document {n} tells of {' '.join(str(n * k) for k in range(3, 15))}." for n in range(count)]


def test_what_a_document_is(tmp_path: Path) -> None:
    notes, page = tmp_path / "notes.txt", tmp_path / "page.md"
    notes.write_text("\n\none\nline\n\n \t\ntwo\n\n\n\nthree")
    page.write_text(MARKDOWN)
    assert texts_of(notes) == ["one\nline", "two", "three"]
    sections = ["before", "# One\nfirst", "## Two\n### Three\nsecond\n\n```sh\n# no heading\n```", "# Four"]
    assert texts_of(page) == sections
    assert texts_of(page, documents="file") == [MARKDOWN.strip()]
    assert texts_of(page, documents="paragraph")[0] == "before"
    assert len(texts_of(page, documents="paragraph")) == 3  # divided at blank lines alone
    zipped = tmp_path / "notes.txt.gz"
    zipped.write_bytes(gzip.compress(notes.read_bytes().replace(b"\n", b"\r\n")))
    assert [text.replace("\r", "") for text in texts_of(zipped)] == texts_of(notes)


def test_a_document_too_large_is_set_aside_and_the_next_one_read(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("\n\n".join(["short", "\n".join(["many lines"] * 40), "x" * 500, "last"]))
    found = list(read_records(Reading(path, max_row_bytes=100)))
    assert [record.row for record in found] == [1, 2, 3, 4]
    assert [isinstance(record, BadRecord) for record in found] == [False, True, True, False]
    assert isinstance(found[1], BadRecord)
    assert "larger than data.max_row_bytes (100)" in found[1].reason


def test_documents_are_divided_and_repeats_removed_as_rows_are(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    texts = numbered(40)
    path.write_text("\n\n".join([*texts, texts[3], texts[5].upper() + " !"]))
    done = run(task="generation", train=path, text="{text}")
    assert sorted(row.text for row in done.rows) == sorted(texts)
    assert {split: len(rows) for split, rows in done.splits.items()} == {"train": 32, "validation": 4, "test": 4}
    assert all(row.target is None and len(row.messages) == 1 for row in done.rows)
    assert done.summary["duplicates_removed"]["exact"] + done.summary["duplicates_removed"]["near"] == 2


def test_columns_of_rows(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"title": f"T{n}", "body": text, "kind": "ab"[n % 2]} for n, text in enumerate(numbered(40))]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"title": "T", "body": " ", "kind": "a"}]))
    done = run(task="generation", train=path, text="{title}\n{body}", split={"stratify": "kind"})
    assert {row.text for row in done.rows} == {f"{row['title']}\n{row['body']}" for row in rows}
    assert done.reasons == {41: "column body is empty"}
    with pytest.raises(DataError, match=r"no column 'words'; there are: title.*Set data\.text"):
        run(task="generation", train=path, text="{words}")


def test_a_folder_of_files(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    for n, text in enumerate(numbered(20)):
        place = folder / f"deep{n % 2}" / f"{n // 2}.{'md' if n % 4 else 'txt'}"  # the same names in both folders
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"# A heading\n\n{text}\n\n# Another\n\nmore of {n}")
    (folder / "empty.txt").write_text("")
    (folder / ".hidden.md").write_text("hidden")
    (folder / "table.csv").write_text("a,b\n1,2\n")
    config = DataConfig(train=str(folder), text="{text}")
    done = run(task="generation", train=folder, text="{text}")
    assert len(done.rows) == 20
    assert len(run(task="generation", train=folder, text="{text}", documents="paragraph").rows) > 20
    before = source_digests(config)
    moved = folder / "deep0/0.txt"
    moved.rename(folder / "deep1/first.txt")
    assert source_digests(config) != before
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no txt or md file"):
        run(task="generation", train=tmp_path / "none", text="{text}")
    with pytest.raises(DataError, match="is not a file"):
        run(task="generation", train=folder)


def test_bytes_of_another_encoding_and_too_few_documents(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"one\n\ntw\xf6")
    with pytest.raises(DataError, match="not utf-8") as caught:
        run(task="generation", train=path, text="{text}")
    assert caught.value.path == path
    path.write_text("only one")
    with pytest.raises(DataError, match="usable rows are too few"):
        run(task="generation", train=path, text="{text}")
    path.write_text(" \n\n \n")
    with pytest.raises(DataError, match="no data row"):
        run(task="generation", train=path, text="{text}")


def recipe(**sections: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {"name": "field", "task": "generation", "data": {"train": "notes.txt", "text": "{text}"}}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
    return raw


def test_a_recipe_of_running_text() -> None:
    plain = parse_recipe(recipe())
    assert plain.data.target is None
    assert parse_recipe(plain.model_dump(mode="json", by_alias=True)) == plain


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"task": "qa"}, "the task is qa: set task: generation"),
        ({"data": {"target": "{label}"}}, "data.target is '{label}'"),
        ({"data": {"input": "{title}"}}, "data.input is '{title}'"),
        ({"data": {"messages": "chat"}}, "data.messages is 'chat'"),
        ({"data": {"system": "Be kind."}}, "data.system is 'Be kind.'"),
        ({"data": {"text": None, "documents": "file"}}, "data.documents is file, but data.text is not set"),
        ({"train": {"preferences": "pairs.jsonl"}}, "train.preferences is set"),
        ({"train": {"engine": "olive"}, "student": {"model": "x"}}, "train.engine: olive is set"),
        ({"search": {"space": {"train.learning_rate": [1e-4, 1e-3]}}}, "search is set"),
        ({"distill": {"unlabelled": "more.txt"}}, "distill.unlabelled is set"),
        ({"data": {"documents": "chapter"}}, "data.documents is 'chapter'"),
        ({"teacher": {"adapt_text_epochs": 1, "adapt": False}}, "teacher.adapt is false"),
        ({"teacher": {"adapt_text_epochs": 1, "model": "openai:x"}}, "openai:x is not trained here"),
        (
            {
                "task": "nli",
                "data": {"text": None, "target": "{label}"},
                "train": {"forgetting": {"data": "general.jsonl"}},
            },
            "a classifier keeps no output layer",
        ),
    ],
)
def test_keys_that_make_no_sense(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(recipe(**sections))
    assert message in str(caught.value)
