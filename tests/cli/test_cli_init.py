"""``slmops init``: a recipe that loads, with the columns of one's own file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner, Result

from slmops.cli.app import app
from slmops.cli.init import recipe_text
from slmops.errors import DataError, UsageError
from slmops.recipe import Recipe, Task, load_recipe, recipe_schema


def init(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], catch_exceptions=True)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(path: Path = Path("recipe.yaml")) -> Recipe:
    return load_recipe(path)


def test_without_a_file_it_is_about_the_sample(here: Path) -> None:
    result = init()
    assert result.exit_code == 0
    assert "wrote recipe.yaml" in result.stdout
    assert "slmops data recipe.yaml" in result.stdout
    recipe = loaded()
    assert (recipe.name, recipe.task, recipe.data.train) == ("support-intents", "classification", "sample:support")
    assert (recipe.data.input, recipe.data.target) == ("{text}", "{intent}")


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("my rows.csv", "id,question,answer,note\n1,a,b,c\n", ("{question}", "{answer}")),
        ("BOM.csv", "\ufefftext,label\nx,y\n", ("{text}", "{label}")),
        ("other.csv", "first,second,third\n1,2,3\n", ("{first}", "{third}")),
        ("quoted.csv", '"the text","category"\n"a, b",c\n', ("{the text}", "{category}")),
        ("chat.jsonl", '\n{"instruction": "a", "response": "b", "lang": "de"}\n', ("{instruction}", "{response}")),
        ("document.jsonl", '{"summary": "s", "document": "d"}\n', ("{document}", "{summary}")),
        ("tabs.tsv", "sentence\tclass\na\tb\n", ("{sentence}", "{class}")),
    ],
)
def test_columns_are_guessed(here: Path, name: str, content: str, columns: tuple[str, str]) -> None:
    (here / name).write_text(content, "utf-8")
    result = init(here / name)
    assert result.exit_code == 0, result.output
    recipe = loaded()
    assert (recipe.data.input, recipe.data.target) == columns
    assert recipe.data.train == str(here / name)
    assert recipe.name == name.partition(".")[0].lower().replace(" ", "-")


def test_columns_of_parquet(here: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pa.table({"prompt": ["a"], "output": ["b"]}), here / "rows.parquet")
    assert init("rows.parquet").exit_code == 0
    assert (loaded().data.input, loaded().data.target) == ("{prompt}", "{output}")


def test_what_is_told_is_used(here: Path) -> None:
    (here / "rows.csv").write_text("a,b,c\n1,2,3\n")
    arguments = ["rows.csv", "--task", "math", "--name", "my-math", "--input", "{a} and {c}", "--target", "#### {b}"]
    assert init(*arguments, "--out", "other.yaml").exit_code == 0
    recipe = loaded(here / "other.yaml")
    assert (recipe.name, recipe.task) == ("my-math", "math")
    assert (recipe.data.input, recipe.data.target) == ("{a} and {c}", "#### {b}")
    assert not (here / "recipe.yaml").exists()


def test_a_recipe_elsewhere_finds_the_file(here: Path) -> None:
    """Relative paths in a recipe start at its folder."""
    (here / "data").mkdir()
    (here / "recipes").mkdir()
    (here / "data" / "rows.csv").write_text("text,label\na,b\n")
    assert init("data/rows.csv", "--out", "recipes/r.yaml").exit_code == 0
    assert Path(loaded(Path("recipes/r.yaml")).data.train).samefile(here / "data" / "rows.csv")
    assert str(here) not in (here / "recipes" / "r.yaml").read_text()


@pytest.mark.parametrize("task", get_args(Task))
def test_every_task_makes_a_recipe_that_loads(here: Path, task: str) -> None:
    assert init("--task", task).exit_code == 0
    assert loaded().task == task


@pytest.mark.parametrize("template", ['{a} "quoted" # not a comment', "{a}: {b}\n- {c}", "{é} ✓ \\"])
def test_awkward_templates_survive(here: Path, template: str) -> None:
    (here / "rows.csv").write_text("a,b\n1,2\n")
    assert init("rows.csv", "--input", template).exit_code == 0
    assert loaded().data.input == template


def test_columns_with_line_breaks_do_not_break_the_recipe(here: Path) -> None:
    (here / "rows.csv").write_text('"text\nof two lines",label # x\na,b\n')
    assert init("rows.csv").exit_code == 0
    assert loaded().data.target == "{label # x}"


def test_what_is_commented_out_are_the_defaults_or_loads_at_least() -> None:
    """Whoever takes the comment signs away gets a recipe, not an error."""
    text = recipe_text(
        name="x", task="classification", source="rows.csv", input_template="{a}", target_template="{b}", columns=["a"]
    )
    lines = [line for line in text.splitlines() if "base_url" not in line and "api_key_env" not in line]
    bare = [line.replace("# ", "", 1) if line.lstrip().startswith("# ") and ":" in line else line for line in lines]
    head = next(index for index, line in enumerate(bare) if line.startswith("name:"))
    raw: dict[str, Any] = yaml.safe_load("\n".join(bare[head:]))
    recipe = Recipe.model_validate(raw)
    assert recipe.data.near_duplicates == Recipe.model_validate({**raw, "data": {"train": "x"}}).data.near_duplicates


def test_the_schema_is_printed_and_nothing_is_written(here: Path) -> None:
    result = init("--schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == recipe_schema()
    assert list(here.iterdir()) == []


# --- what it refuses --------------------------------------------------------------------------------------------


def test_it_never_overwrites(here: Path) -> None:
    (here / "recipe.yaml").write_text("mine")
    result = init()
    assert isinstance(result.exception, UsageError)
    assert result.exception.exit_code == 2
    assert str(result.exception) == "recipe.yaml exists already. Choose another name with --out, or delete it."
    assert (here / "recipe.yaml").read_text() == "mine"


def test_an_unknown_task(here: Path) -> None:
    result = init("--task", "clasification")
    assert isinstance(result.exception, UsageError)
    assert "classification, nli" in str(result.exception)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("gone.csv", None, "There is no file"),
        ("empty.csv", b"", "is empty"),
        ("empty.jsonl", b"\n\n", "is empty"),
        ("broken.jsonl", b"{not json}\n", "no row that can be read"),
        ("number.jsonl", b"3\n", "no row that can be read"),
        ("strings.jsonl", b'"abc"\n', "no row that can be read"),
        ("latin.csv", "Grüße,label\na,b\n".encode("latin-1"), "utf-8"),
        ("binary.parquet", b"no parquet", "parquet"),
        ("table.xlsx", b"PK", "no kind that can be read"),
    ],
)
def test_files_that_cannot_be_used(here: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (here / name).write_bytes(content)
    result = init(name)
    assert isinstance(result.exception, DataError), result.exception
    assert words in str(result.exception)
    assert name in str(result.exception)
    assert result.exception.remedy or "is empty" in words
    assert not (here / "recipe.yaml").exists()


def test_a_folder_instead_of_a_file(here: Path) -> None:
    result = init(here)
    assert isinstance(result.exception, DataError)
    assert "There is no file" in str(result.exception)


def test_a_place_that_cannot_be_written(here: Path) -> None:
    result = init("--out", "no/such/folder/recipe.yaml")
    assert isinstance(result.exception, UsageError)
    assert "no/such/folder" in str(result.exception)


def test_a_bad_name(here: Path) -> None:
    """Told, and no recipe left behind that would not load."""
    result = init("--name", "My Model!")
    assert isinstance(result.exception, UsageError)
    assert "My Model!" in str(result.exception)
    assert not (here / "recipe.yaml").exists()
