"""Benchmarks of a run, and of one model: their rows read, their questions made, teacher and student asked.

What a task's training cost in general ability stands beside what it gained: the model as published is asked as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Draft, Report, Variant
from slmops.data import read_values, values_source
from slmops.data.templates import ABSENT, MissingValueError, lookup, parse_template, to_text
from slmops.errors import DataError, RecipeError
from slmops.evaluate.benchmarks import Benchmark, BenchmarkScore, Question, run_benchmarks
from slmops.evaluate.gates import Gate, floor_gate
from slmops.evaluate.significance import compare
from slmops.models import fetch_hub_dataset
from slmops.pipeline.context import Context
from slmops.progress import Progress
from slmops.recipe import BenchmarkConfig
from slmops.runtime import open_generator
from slmops.trust import digest_json

KEY = "evaluate.benchmarks"
PUBLISHED = "published"
"""The model that the student was cut from or starts with, before any training of ours."""


def read_benchmarks(context: Context) -> tuple[Benchmark, ...]:
    """The recipe's benchmarks, their rows as questions.

    Raises:
        RecipeError: a column or a task that is not there, a template that cannot be read.
        DataError: a file that cannot be read, or a row whose answer is none of its choices.
        MissingExtraError: a task of the harness, which is not installed.
    """
    return tuple(_read(context, config) for config in context.recipe.evaluate.benchmarks)


def _read(context: Context, config: BenchmarkConfig) -> Benchmark:
    if config.task is not None:
        from slmops.evaluate.harness import check_task

        check_task(config.task)
        return Benchmark(config.name, task=config.task, rows=config.rows, shots=config.shots)
    assert config.data is not None
    hub = partial(fetch_hub_dataset, offline=context.offline)
    source = values_source(config.data, key=f"{KEY}.{config.name}.data", fetch_hub=hub)
    wanted = None if config.rows is None else config.rows + config.shots
    rows = read_values(source, wanted)
    if len(rows) <= config.shots:
        raise DataError(
            f"The benchmark {config.name} has {len(rows)} rows, and {config.shots} of them are solved examples.",
            path=source.files[0],
            remedy="Lower shots, or give more rows.",
        )
    questions = tuple(question_of(config, row, number, source.files[0]) for number, row in enumerate(rows, start=1))
    return Benchmark(
        config.name,
        config.kind,
        questions[config.shots :],
        questions[: config.shots],
        config.match,
        config.max_new_tokens,
    )


def question_of(config: BenchmarkConfig, row: Mapping[str, Any], number: int, path: Path) -> Question:
    """One row as a question; errors as :func:`read_benchmarks`."""
    prompt = _rendered(config, "prompt", row, number, path)
    answer = _rendered(config, "answer", row, number, path)
    if config.kind != "choice":
        return Question(prompt, answer)
    choices, labels = _choices(config, row, number, path)
    chosen = answer_among(answer, choices, labels)
    if chosen is None:
        raise DataError(
            f"The answer {answer!r} of the benchmark {config.name} is none of its choices ({', '.join(choices)}).",
            path=path,
            row=number,
            remedy="Name the column of their labels, or write choices as {answer in the data: what the model says}.",
        )
    return Question(prompt, chosen, choices)


def answer_among(answer: str, choices: Sequence[str], labels: Sequence[str]) -> str | None:
    """The choice that ``answer`` means: by its label, by itself, or by its number from 0; None for none."""
    for known in (labels, choices):
        if answer in known:
            return choices[known.index(answer)]
    return choices[int(answer)] if answer.isdecimal() and int(answer) < len(choices) else None


def _rendered(config: BenchmarkConfig, part: str, row: Mapping[str, Any], number: int, path: Path) -> str:
    template = parse_template(getattr(config, part), key=f"{KEY}.{config.name}.{part}")
    try:
        return template.render(row)
    except MissingValueError as error:
        raise RecipeError(
            f"{KEY}.{config.name}.{part} is {template.source!r}, and in row {number} of {path.name} {error}.",
            remedy=f"Columns there: {', '.join(map(str, row))}.",
        ) from None


def _choices(
    config: BenchmarkConfig, row: Mapping[str, Any], number: int, path: Path
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What may be answered, and what the data call it."""
    if isinstance(config.choices, Mapping):
        return tuple(config.choices.values()), tuple(config.choices)
    labels = () if config.labels is None else _listed(config, config.labels, row, number, path)
    if isinstance(config.choices, str):
        return _listed(config, config.choices, row, number, path), labels
    return config.choices or (), labels


def _listed(config: BenchmarkConfig, column: str, row: Mapping[str, Any], number: int, path: Path) -> tuple[str, ...]:
    value = lookup(row, column.strip("{}"))
    if isinstance(value, str):  # a table has no lists: they stand there as JSON
        try:
            value = json.loads(value)
        except ValueError:
            value = ABSENT
    texts = [to_text(one) for one in value] if isinstance(value, list | tuple) else []
    if len(texts) < 2 or None in texts:
        raise RecipeError(
            f"{KEY}.{config.name}: the column {column} holds no list of choices in row {number} of {path.name}.",
            remedy=f"Columns there: {', '.join(map(str, row))}.",
        )
    return tuple(str(text) for text in texts)


def ask(context: Context, what: str, folder: Path, benchmarks: Sequence[Benchmark]) -> dict[str, BenchmarkScore]:
    """What the model at ``folder`` reaches, by benchmark."""

    def report(event: Progress) -> None:
        context.progress(Progress(f"{event.task}: {what}", event.done, event.total, event.unit, event.note))

    generator = open_generator(folder, threads=context.recipe.evaluate.threads)
    try:
        return run_benchmarks(generator, benchmarks, seed=context.recipe.seed, offline=context.offline, progress=report)
    finally:
        generator.close()


def ask_variant(
    context: Context, who: str, variant: Variant | Path, digest: str, benchmarks: Sequence[Benchmark]
) -> dict[str, BenchmarkScore]:
    """The same, found again where that model has been asked the same."""
    if not benchmarks:
        return {}

    def build(draft: Draft) -> None:
        folder = variant.model_path if isinstance(variant, Variant) else variant
        found = ask(context, who, folder, benchmarks)
        content = {name: score.to_json() for name, score in found.items()}
        (draft.path / "report.json").write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), "utf-8")

    report = context.stage(
        f"benchmarks-{who}",
        Report,
        {"model": digest, "questions": digest_of(benchmarks)},
        {},
        ["slmops.evaluate.benchmarks", "slmops.evaluate.metrics", "slmops.runtime"],
        build,
    )
    return {name: BenchmarkScore.from_json(raw) for name, raw in report.content.items()}


def digest_of(benchmarks: Sequence[Benchmark]) -> str:
    """Of all that is asked; of a task of one's own its file counts, of a harness task its name."""

    def told(one: Benchmark) -> dict[str, Any]:
        raw = {**vars(one), "questions": [vars(q) for q in one.questions], "solved": [vars(q) for q in one.solved]}
        if one.task is not None and Path(one.task).is_file():
            raw["task"] = Path(one.task).read_text("utf-8")
        return raw

    return digest_json([told(one) for one in benchmarks])


def benchmark_gates(scores: Mapping[str, BenchmarkScore], limits: Mapping[str, str]) -> list[Gate]:
    """One gate for each limit of ``gates.benchmarks``."""
    gates = []
    for name, text in limits.items():
        low, high = scores[name].ci95
        note = f"{scores[name].metric} on {len(scores[name].per_row)} questions, 95 % interval {low:.3g} to {high:.3g}."
        gates.append(floor_gate(f"benchmark {name}", scores[name].value, text, note=note))
    return gates


def side_by_side(
    asked: Mapping[str, Mapping[str, BenchmarkScore]], student: str, seed: int
) -> dict[str, dict[str, Any]]:
    """For the report: by benchmark, every model's score, and the student's paired test with each other model.

    ``asked``: model -> its scores.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, ours in asked[student].items():
        others = {who: scores[name] for who, scores in asked.items() if who != student}
        found[name] = {
            "metric": ours.metric,
            "higher_is_better": ours.higher_is_better,
            "models": {who: scores[name].summary() for who, scores in asked.items()},
            "tests": {
                who: compare(theirs.per_row, ours.per_row, seed=seed).to_json() for who, theirs in others.items()
            },
        }
    return found
