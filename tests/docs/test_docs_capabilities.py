"""``docs/capabilities.md`` names nothing that is not there: recipe keys, verbs, errors, tests, examples, benchmarks."""

from __future__ import annotations

import ast
import re
import shlex
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import typer
from pydantic import BaseModel

from slmops import errors
from slmops.cli.app import app
from slmops.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/capabilities.md"
MISSING = "not yet"
COMMAND: Any = typer.main.get_command(app)


def tables() -> dict[str, list[list[str]]]:
    """Heading -> the rows of its table, without the first two."""
    found: dict[str, list[list[str]]] = {}
    for line in PAGE.read_text("utf-8").splitlines():
        if line.startswith("## "):
            found[line[3:]] = rows = []
        elif line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: rows[2:] for heading, rows in found.items() if rows}


def cells(column: int, *, but: str = "") -> Iterator[tuple[str, list[str]]]:
    """The row's name, and what stands between backticks in its column."""
    for heading, rows in tables().items():
        for row in rows:
            if heading != but:
                yield row[0], re.findall(r"`([^`]+)`", row[column])


def test_four_whole_tables() -> None:
    found = tables()
    assert [len(rows) > 10 for rows in found.values()] == [True] * 4
    for rows in found.values():
        assert all(len(row) == 3 and all(row) for row in rows)
        names = [row[0] for row in rows]
        assert len(set(names)) == len(names)


def test_every_row_is_run_by_something_or_says_that_it_is_missing() -> None:
    for heading, rows in tables().items():
        for name, asked, run in rows:
            assert ("`" in asked and "`" in run) or (asked == run == MISSING), f"{heading}: {name}"


@pytest.mark.parametrize("reference", sorted({one for _, named in cells(2) for one in named}))
def test_what_runs_it_is_there(reference: str) -> None:
    path, _, test = reference.partition("::")
    assert (ROOT / path).is_file()
    if path.startswith("tests/"):
        assert test in functions_of(path)
    else:
        assert not test
        assert path.startswith(("benchmarks/", "examples/"))


@pytest.mark.parametrize("asked", sorted({one for _, named in cells(1, but=[*tables()][-1]) for one in named}))
def test_what_asks_for_it_is_a_key_or_a_verb(asked: str) -> None:
    if asked.startswith("slmops "):
        command = COMMAND
        for word in shlex.split(asked)[1:]:
            if word.startswith("--"):
                assert any(word in option.opts for option in command.params), word
            else:
                command = command.commands[word]
        return
    key, _, value = asked.partition(": ")
    kinds = kinds_of(key)
    if value:
        assert value in {text for kind in kinds if get_origin(kind) is typing.Literal for text in get_args(kind)}


def test_errors_are_ours() -> None:
    for name, named in [*cells(1)][-len([*tables().values()][-1]) :]:
        for error in named:
            assert issubclass(getattr(errors, error), errors.SlmopsError), name


def test_a_wrong_key_would_be_seen() -> None:
    for key in ("train.metod", "teacher.judge.scores", "search.space.x", "distill.losses.gold.more"):
        with pytest.raises(AssertionError):
            kinds_of(key)
    assert "test_a_wrong_key_would_be_seen" in functions_of("tests/docs/test_docs_capabilities.py")


@cache
def functions_of(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def kinds_of(key: str) -> list[Any]:
    """The types that a recipe's key takes, unions taken apart."""
    sections: list[Any] = [Recipe]
    kinds: list[Any] = []
    for name in key.split("."):
        fields = [
            field
            for section in sections
            if isinstance(section, type) and issubclass(section, BaseModel)
            for field_name, field in section.model_fields.items()
            if name == (field.alias or field_name)
        ]
        assert fields, f"{key}: there is no {name}"
        kinds = [kind for field in fields for kind in members(field.annotation)]
        sections = kinds
    return kinds


def members(kind: Any) -> list[Any]:
    if get_origin(kind) in (typing.Union, types.UnionType):
        return [inner for one in get_args(kind) for inner in members(one)]
    return [*members(get_args(kind)[0])] if get_origin(kind) is typing.Annotated else [kind]
