"""One model on a recipe's test rows, and another beside it: the check for a step that was made by hand.

Nothing is trained and nothing is kept: the rows are the store's, the answers are asked anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Row
from slmops.errors import DataError, RecipeError
from slmops.evaluate.benchmarks import Benchmark
from slmops.evaluate.gates import Gate, measure_gates, parity_gate
from slmops.evaluate.measures import measured
from slmops.evaluate.parity import Parity, Step, advice, compare_models, drift_gates
from slmops.evaluate.scores import Scores, score_classifier, score_generator, score_predictions
from slmops.evaluate.summary import measures_of
from slmops.package import resolve_model_folder
from slmops.pipeline.benchmarks import ask, benchmark_gates, read_benchmarks, side_by_side
from slmops.pipeline.context import Context
from slmops.pipeline.teach import prepare_data
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import Recipe, parse_recipe
from slmops.runtime import open_classifier, open_generator
from slmops.store import Store

TRIED_ROWS = 50


@dataclass(frozen=True)
class Judgement:
    """``gates`` and ``parity`` where there was another model to compare with; ``against`` is its scores.

    ``scores``: on the recipe's rows, where there was one; ``benchmarks``: as :func:`side_by_side` has them, the models
    named :data:`THIS` and :data:`BEFORE`.
    """

    scores: Scores | None
    against: Scores | None = None
    parity: Parity | None = None
    gates: tuple[Gate, ...] = ()
    benchmarks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        def told(scores: Scores | None) -> dict[str, Any] | None:
            return (
                None
                if scores is None
                else {
                    "metric": scores.metric,
                    **scores.summary(),
                    "others": dict(scores.others),
                    "measures": measures_of(scores),
                }
            )

        return {
            "scores": told(self.scores),
            "against": told(self.against),
            "parity": self.parity.to_json() if self.parity else None,
            "gates": [gate.to_json() for gate in self.gates],
            "benchmarks": self.benchmarks,
            "passed": self.passed,
            "advice": advice(self.parity) if self.parity and not self.passed else "",
        }


def judge_model(
    recipe: Recipe,
    store: Store,
    model: Path,
    *,
    against: Path | None = None,
    step: Step = "converted",
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> Judgement:
    """Score ``model`` (a bundle, a variant, a model folder, a checkpoint) on the test rows of ``recipe``.

    ``against``  the form before: compared by tokens, distributions, answers and a paired test of the score, and held to
                 ``gates.parity`` and to the limits of ``gates.drift`` for ``step``

    Raises:
        DataError: no test rows with targets.
        SlmopsError: the rows or a model cannot be read.
    """
    folder = model_folder(model)
    before = None if against is None else model_folder(against)
    context = Context(recipe, store, offline, progress)
    questions = read_benchmarks(context)
    rows = context.test_rows(prepare_data(context))
    if not rows:
        raise DataError("The test split has no row with a target.", remedy="Give data.test, or more rows.")
    check_metrics(context, rows)
    scores = _scored(context, "model", folder, rows)
    benchmarks, benchmarked = _benchmarked(context, folder, before, questions)
    own_gates = (*measure_gates(scores, recipe.gates.metrics), *benchmarked)
    if before is None:
        return Judgement(scores, gates=own_gates, benchmarks=benchmarks)
    other = _scored(context, "the form before", before, rows)
    parity = compare_models(
        (str(against), before),
        (str(model), folder),
        rows,
        step=step,
        closed=recipe.closed,
        to_messages=context.student_messages,
        max_rows=recipe.gates.drift.rows,
        threads=recipe.evaluate.threads,
        progress=partial(_rename, progress, "compare"),
    ).with_answers(other.predictions, scores.predictions, [row.id for row in rows])
    gates = (
        *own_gates,
        parity_gate(other, scores, recipe.gates.parity, seed=recipe.seed),
        *drift_gates(parity, recipe.gates.drift),
    )
    return Judgement(scores, other, parity, gates, benchmarks)


def judge_by_benchmarks(
    benchmarks: Sequence[Any],
    store: Store,
    model: Path,
    *,
    against: Path | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> Judgement:
    """Ask ``model`` (and ``against``) the ``benchmarks``, as a recipe's ``evaluate.benchmarks`` has them, without one.

    Raises:
        RecipeError: a benchmark that cannot be understood.
        SlmopsError: its rows or a model cannot be read.
    """
    folder, before = model_folder(model), None if against is None else model_folder(against)
    raw = {"name": "benchmarks", "task": "generation", "data": {"train": "-"}}
    context = Context(parse_recipe({**raw, "evaluate": {"benchmarks": list(benchmarks)}}), store, offline, progress)
    found, _ = _benchmarked(context, folder, before, read_benchmarks(context))
    return Judgement(None, benchmarks=found)


THIS, BEFORE = "model", "before"


def _benchmarked(
    context: Context, folder: Path, before: Path | None, questions: Sequence[Benchmark]
) -> tuple[dict[str, Any], list[Gate]]:
    """What both models reach on the benchmarks, and the recipe's gates over them."""
    if not questions:
        return {}, []
    asked = {THIS: ask(context, THIS, folder, questions)}
    if before is not None:
        asked[BEFORE] = ask(context, BEFORE, before, questions)
    return (
        side_by_side(asked, THIS, context.recipe.seed),
        benchmark_gates(asked[THIS], context.recipe.gates.benchmarks),
    )


def answers_of(context: Context, what: str, folder: Path, rows: Sequence[Row]) -> list[str]:
    """What the model at ``folder`` answers to ``rows``."""
    return _answered(context, what, folder, rows).predictions


def check_metrics(context: Context, rows: Sequence[Row]) -> None:
    """Try the user's own measures on the right answers and on empty ones, and look for what ``gates.metrics`` names.

    Raises:
        RecipeError: a measure that cannot be used, or a gate on a figure that nobody measures.
    """
    recipe, targets = context.recipe, [row.target or "" for row in rows]
    measured(context.own_metrics, [""] * len(rows), rows, seed=recipe.seed)
    if not (context.own_metrics or recipe.gates.metrics) or not rows:
        return
    shown = rows[:TRIED_ROWS]
    ideal = score_predictions(targets[:TRIED_ROWS], targets[:TRIED_ROWS], task=recipe.task, seed=recipe.seed)
    own = measured(context.own_metrics, targets, rows, seed=recipe.seed)
    known = [*own, *ideal.others]
    for name in recipe.gates.metrics:
        if name not in known:
            raise RecipeError(
                f"gates.metrics names {name}, which nothing measures on these {len(shown)} rows.",
                remedy=f"Known here: {', '.join(known)}; more by evaluate.metrics.",
            )


def rows_to_ask(recipe: Recipe, store: Store, *, offline: bool = False, progress: ProgressSink = ignore) -> list[Row]:
    """The recipe's test rows with targets, each with the conversation that a model is shown for it.

    Raises:
        DataError: no test rows with targets.
    """
    context = Context(recipe, store, offline, progress)
    rows = context.test_rows(prepare_data(context))
    if not rows:
        raise DataError("The test split has no row with a target.", remedy="Give data.test, or more rows.")
    return rows if recipe.closed else [replace(row, messages=context.student_messages(row)) for row in rows]


def model_folder(path: Path) -> Path:
    """As :func:`resolve_model_folder`; a checkpoint of transformers is a model folder too."""
    return path if (path / "config.json").is_file() else resolve_model_folder(path)


def _scored(context: Context, what: str, folder: Path, rows: Sequence[Row]) -> Scores:
    found = _answered(context, what, folder, rows)
    return found.with_measures(context.own_metrics, rows, seed=context.recipe.seed)


def _answered(context: Context, what: str, folder: Path, rows: Sequence[Row]) -> Scores:
    recipe, report = context.recipe, partial(_rename, context.progress, f"score {what}")
    threads = recipe.evaluate.threads
    if recipe.closed:
        classifier = open_classifier(folder, threads=threads)
        try:
            return score_classifier(classifier, rows, task=recipe.task, seed=recipe.seed, progress=report)
        finally:
            classifier.close()
    generator = open_generator(folder, threads=threads)
    try:
        return score_generator(
            generator,
            rows,
            task=recipe.task,
            max_new_tokens=recipe.evaluate.max_new_tokens,
            to_messages=context.student_messages,
            seed=recipe.seed,
            progress=report,
        )
    finally:
        generator.close()


def _rename(progress: ProgressSink, task: str, event: Progress) -> None:
    progress(Progress(task, event.done, event.total, event.unit, event.note))
