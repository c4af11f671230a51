"""The whole way, in order: data → teacher → student → compress → evaluate → package.

This package alone knows the order. Each stage is asked for by the digest of what it reads, how it is set and which
code it is, so a run that was stopped goes on where it was, and a run that changes one thing redoes what follows from it
and no more.

::

    teach     data, teacher, answers, student
    prune     what is removed from it, and what it learns after
    search    which values of the student's keys are best, where the recipe asks
    fit       the same with the budget as its goal
    prove     export, score, measure, judge
    quantize  forms in few bits: rows to calibrate on, what is learnt on the grid
    ship      bundle, and the folder where a person finds it
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from slmops.artifacts import Artifact, Bundle, Dataset, Draft, Report, Variant
from slmops.compress import check_formats, export_format, export_generator
from slmops.distill import Estimate, check_remote_allowed
from slmops.errors import RecipeError, UsageError
from slmops.models import fetch_model
from slmops.pipeline.azureml.job import STAGES
from slmops.pipeline.benchmarks import read_benchmarks
from slmops.pipeline.context import Context
from slmops.pipeline.fit import find_smallest
from slmops.pipeline.judge import check_metrics
from slmops.pipeline.prove import evaluate
from slmops.pipeline.prune import check_prunable, check_prune, make_learnt
from slmops.pipeline.quantize import check_calibration, check_quantize
from slmops.pipeline.search import find_best
from slmops.pipeline.ship import make_place, package, publish, write_recipe
from slmops.pipeline.teach import (
    ask_for_answers,
    check_engines,
    check_fits,
    check_further_texts,
    check_judgeable,
    check_signals,
    estimate_answers,
    impossible_signals,
    learns_by_adapters,
    make_student,
    make_teacher,
    prepare_data,
)
from slmops.progress import ProgressSink, ignore
from slmops.recipe import FormatConfig, Precision, Recipe
from slmops.store import Store, code_version

__all__ = [
    "STAGES",
    "BaseForm",
    "RunResult",
    "base_variant",
    "distill_recipe",
    "estimate_recipe",
    "run_recipe",
    "run_until",
]

BaseForm = Literal["onnx", "openvino", "gguf"]
SERVED_MAX_TOKENS = 2048
TRAIN_ONLY = ("method", "loss", "forgetting", "trackers", "processes", "checkpoint_activations")
"""Keys of ``train`` that ``slmops train`` honours and a run's student does not know (but for adapters of a named one:
:func:`learns_by_adapters`)."""


@dataclass(frozen=True)
class RunResult:
    """``report`` is the content of ``folder/report.json``. ``reused``: every stage was found done."""

    report: Mapping[str, Any]
    folder: Path
    bundle: Bundle
    reused: bool

    @property
    def passed(self) -> bool:
        return bool(self.report["passed"])


def run_recipe(
    recipe: Recipe,
    store: Store,
    *,
    out: Path | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> RunResult:
    """Do all that ``recipe`` asks for and is not done yet.

    ``out`` (default: ``runs/<name>`` in the store) receives ``report.json``, ``report.html`` and ``bundle/``.

    Raises:
        SlmopsError: any stage's own; what was finished before stays done.
    """
    started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    context = Context(recipe, store, offline, progress)
    folder = out or store.root / "runs" / recipe.name
    made: dict[str, Artifact] = {}
    for _, artifacts in _walk(context, folder):
        made |= artifacts
    report, bundle = Report.open(made["report"].path), Bundle.open(made["bundle"].path)
    publish(context, folder, report, bundle)
    content = json.loads((folder / "report.json").read_text("utf-8"))
    outcome = "passed" if content["passed"] else "gate failed"
    store.record_run(recipe.name, started_at=started_at, outcome=outcome, report_digest=report.digest)
    return RunResult(content, folder, bundle, context.reused)


def distill_recipe(
    recipe: Recipe, store: Store, *, offline: bool = False, progress: ProgressSink = ignore
) -> tuple[Dataset, bool]:
    """The first part alone: rows, a teacher, its answers; and whether all of it was found done.

    :func:`run_recipe` finds what was done here.

    Raises:
        SlmopsError: any stage's own; what was finished before stays done.
    """
    context = Context(recipe, store, offline, progress)
    _check(recipe)
    check_further_texts(context)
    data = prepare_data(context)
    check_fits(context)
    answers = ask_for_answers(context, data, make_teacher(context, data))
    return answers, context.reused


def estimate_recipe(
    recipe: Recipe, store: Store, *, offline: bool = False, progress: ProgressSink = ignore
) -> Estimate | None:
    """What the teacher's answers would take. The rows are prepared; nobody is asked and no model is fetched.

    None: a local teacher gives its distribution over the labels; no answer is written or paid for.

    Raises:
        SlmopsError: the rows or the recipe cannot be used.
    """
    context = Context(recipe, store, offline, progress)
    _check(recipe)
    return estimate_answers(context, prepare_data(context))


def run_until(
    recipe: Recipe,
    store: Store,
    stage: str,
    *,
    out: Path | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> dict[str, Artifact]:
    """Do what ``recipe`` asks for up to ``stage`` (one of :data:`STAGES`), and no more; what was made, by name.

    A later call goes on from there. A stage that the recipe does not have is the end of those before it.

    Raises:
        UsageError: there is no such stage.
        SlmopsError: as :func:`run_recipe`.
    """
    if stage not in STAGES:
        raise UsageError(f"There is no stage {stage!r}.", remedy=f"Choose one of {', '.join(STAGES)}.")
    return walk_until(Context(recipe, store, offline, progress), stage, out or store.root / "runs" / recipe.name)


def walk_until(context: Context, stage: str, folder: Path) -> dict[str, Artifact]:
    """As :func:`run_until`, within a run that has begun. ``folder`` gets what a search finds."""
    made: dict[str, Artifact] = {}
    for name, artifacts in _walk(context, folder):
        if STAGES.index(name) > STAGES.index(stage):
            break
        made |= artifacts
        if name == stage:
            break
    return made


def _walk(context: Context, folder: Path) -> Iterator[tuple[str, dict[str, Artifact]]]:
    """The stages in their order, each done when it is asked for: its name and what it made."""
    _check(context.recipe)
    check_engines(context)
    check_further_texts(context)
    make_place(folder)
    data = prepare_data(context)
    check_judgeable(context, data)
    check_metrics(context, context.test_rows(data))
    read_benchmarks(context)
    check_fits(context)
    check_signals(context)
    prune = context.recipe.compress.prune
    if prune is not None and (prune.of == "teacher" or not context.recipe.closed or context.named_student):
        check_prunable((context.base if prune.of == "teacher" else context.named_student or context.base).path, prune)
    check_calibration(context, data)
    yield "data", {"data": data}
    teacher = make_teacher(context, data)
    yield "teacher", {} if teacher is None else {"teacher": teacher}
    answers = ask_for_answers(context, data, teacher)
    yield "answers", {"answers": answers}
    if context.recipe.search is not None:
        find = find_best if context.recipe.search.goal == "loss" else find_smallest
        found = find(context, data, answers, teacher)
        context.go_on_with(found.recipe)
        context.search, context.wall_s["search"] = found.summary, found.wall_s
        context.reused &= found.reused
        write_recipe(found.recipe, folder / "best.yaml")
        yield "search", {}
        answers = ask_for_answers(context, data, teacher)
    whole, student = make_learnt(context, data, answers, teacher)
    untaught = make_student(context, "untaught", data, taught=False) if context.wants_untaught else None
    yield "student", {"student": student}
    report = evaluate(context, data, teacher, student, untaught, whole=whole, answers=answers)
    yield "evaluate", {"report": report}
    yield "package", {"report": report, "bundle": package(context, report, data, teacher, student)}


def base_variant(
    source: str,
    store: Store,
    *,
    precision: Precision = "int4",
    form: BaseForm = "onnx",
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> Variant:
    """A language model as it was published, made ready to be served: for a look, or as a teacher on this machine.
    ``form``: for which engine; ``precision`` is of the first two, GGUF is written in Q4_K_M.

    Raises:
        ModelError, ConversionError: as fetching and exporting do.
        MissingExtraError: what the form needs is not installed.
    """
    model = fetch_model(source, offline=offline, progress=progress)
    name = source.partition(":")[2].partition("@")[0].rsplit("/", 1)[-1] or model.path.name
    common: dict[str, Any] = {
        "task": "generation",
        "name": name,
        "max_tokens": SERVED_MAX_TOKENS,
        "system": None,
        "progress": progress,
    }

    def build(draft: Draft) -> None:
        if form == "onnx":
            export_generator(model.path, draft, precision=precision, **common)
        else:
            settings = FormatConfig(format=form, quantization=precision if form == "openvino" else "q4_k_m")
            export_format(model.path, draft, settings, **common)

    return store.stage(
        f"base-{precision}" if form == "onnx" else f"base-{form}",
        Variant,
        inputs={"model": model.digest},
        config={"precision": precision, "name": name} | ({} if form == "onnx" else {"form": form}),
        code_version=code_version("slmops.compress"),
        build=build,
    ).artifact


def _check(recipe: Recipe) -> None:
    """What can be known to be wrong before any work is done."""
    if recipe.data.text is not None:
        raise RecipeError(
            "data.text is running text: it asks nothing that a teacher could answer or a student be judged by.",
            remedy="Learn it by: slmops train RECIPE --out FOLDER; then name FOLDER as teacher.model or student.model.",
        )
    check_remote_allowed(recipe.teacher, recipe.privacy)
    wanted = recipe.compress.choose
    made = recipe.compress.variants
    if wanted != "auto" and wanted not in made:
        raise RecipeError(
            f"compress.choose is {wanted}, which is not among compress.precisions, formats or quantize.",
            remedy=f"Add it there, or choose one of {', '.join(made)}.",
        )
    check_formats(recipe)
    if problem := impossible_signals(recipe):
        raise problem
    check_prune(recipe)
    check_quantize(recipe)
    for key in TRAIN_ONLY:
        value = getattr(recipe.train, key)
        if key == "method" and (recipe.train.engine == "olive" or learns_by_adapters(recipe)):
            continue
        if value != type(recipe.train).model_fields[key].default and (key, value) != ("method", "full"):
            shown = value if isinstance(value, str | int) else "set"
            raise RecipeError(
                f"train.{key} is {shown}, but a run trains its student whole.",
                remedy="Leave it out, or fine-tune without a teacher: slmops train RECIPE."
                + (" Adapters are for a student.model of an open task." if key == "method" else ""),
            )
    if recipe.closed and not recipe.teacher.remote and not recipe.teacher.adapt:
        raise RecipeError(
            f"teacher.adapt is false, but {recipe.teacher.model} has no head for these labels.",
            remedy="Set teacher.adapt: true, or ask a model behind a server (openai:MODEL).",
        )
