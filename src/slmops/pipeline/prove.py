"""Export, score, measure, judge: the half of a run that proves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Artifact, Bundle, Checkpoint, Dataset, Draft, Report, Row, Variant
from slmops.chat import tokenizer_digest
from slmops.compress import SHOWS_STATES, export_classifier, export_format, export_generator, torch_variant
from slmops.distill import OpenAITeacher, TeacherFailure, check_answer, redacted, teacher_request
from slmops.errors import TeacherError
from slmops.evaluate.baselines import DESCRIPTIONS, baseline_scores
from slmops.evaluate.benchmarks import BenchmarkScore
from slmops.evaluate.calibration import calibration_in_words
from slmops.evaluate.choose import Candidate, choose, gates_of
from slmops.evaluate.closest import closest, closest_in_words
from slmops.evaluate.cost import cost_per_1000, cost_per_1000_by_tokens
from slmops.evaluate.estimate import DeviceEstimate, estimate_on
from slmops.evaluate.gates import MB, Gate, verdict
from slmops.evaluate.limits import Limits
from slmops.evaluate.machine import machine_facts
from slmops.evaluate.measure import DoesNotFitError, Measurement, measure_interleaved
from slmops.evaluate.parity import Parity, Step, advice, check_step, compare_models, drift_gates
from slmops.evaluate.report_html import render_report
from slmops.evaluate.scores import Scores, score_classifier, score_generator, score_predictions
from slmops.evaluate.significance import compare
from slmops.evaluate.speed import MachineSpeed, machine_speed
from slmops.evaluate.summary import BaselineEntry, ModelEntry, build_report, measures_of
from slmops.hardware import device_profile
from slmops.pipeline.benchmarks import (
    PUBLISHED,
    ask_variant,
    benchmark_gates,
    read_benchmarks,
    side_by_side,
)
from slmops.pipeline.calibrate import calibration_of
from slmops.pipeline.context import Context
from slmops.pipeline.quantize import quantized
from slmops.pipeline.teach import asked_config
from slmops.progress import Progress, ProgressSink
from slmops.recipe import FormatConfig, Precision, Recipe, portable_recipe
from slmops.runtime import GenerationRequest, open_classifier, open_generator
from slmops.trust import digest_file, digest_json

SCORING = (
    "slmops.evaluate.scores",
    "slmops.evaluate.metrics",
    "slmops.evaluate.numbers",
    "slmops.evaluate.significance",
)
"""What a score depends on; the rest of the stage may change without scoring anew."""

UNROUNDED = frozenset({"fp32", "fp16", "f32", "f16", "bf16"})
"""Precisions that a conversion alone leads to; below them, numbers are rounded to few steps."""


@dataclass(frozen=True)
class _Measured:
    """A variant, what it was made from, and what was found out about it."""

    variant: Variant
    checkpoint: Checkpoint
    candidate: Candidate
    parity: Parity | None = None
    benchmarks: Mapping[str, BenchmarkScore] = field(default_factory=dict)


def evaluate(
    context: Context,
    data: Dataset,
    teacher: Checkpoint | None,
    student: Checkpoint,
    untaught: Checkpoint | None,
    *,
    whole: Checkpoint | None = None,
    answers: Dataset | None = None,
) -> Report:
    """Export, score and measure everything, on the same rows and in the same time window; then judge.

    ``whole``: the student before it was pruned; itself or None where it was not. ``answers``: what the student learnt
    from, for forms that are calibrated or trained on; None: ``data``.
    """
    measured = _measured(context, data, teacher, student, whole, answers or data)
    baselines = _baselines(context, data, untaught)
    teacher_entry = (
        _remote_teacher_entry(context, data) if teacher is None else _entry(context, measured["teacher-torch"])
    )
    histories = {"student": _history(student.path)} | ({"teacher": _history(teacher.path)} if teacher else {})
    inputs: dict[str, Artifact | str] = {name: one.variant for name, one in measured.items()}
    inputs["data"] = data
    inputs["measurements"] = digest_json({name: one.candidate.measurement.to_json() for name, one in measured.items()})
    inputs["drift"] = digest_json({name: one.parity.to_json() for name, one in measured.items() if one.parity})
    inputs["baselines"] = digest_json({name: entry.to_json() for name, entry in baselines.items()})
    inputs["teacher_entry"] = digest_json(teacher_entry.to_json())
    inputs["measures"] = digest_json({name: measures_of(one.candidate.scores) for name, one in measured.items()})
    published = _published(context)
    inputs["benchmarks"] = digest_json(
        {
            who: {name: score.to_json() for name, score in scores.items()}
            for who, scores in {**{name: one.benchmarks for name, one in measured.items()}, **published}.items()
        }
    )
    if context.search is not None:
        inputs["search"] = digest_json(dict(context.search))
    judged = _judged(context.recipe, teacher_entry, measured)
    chosen, _ = choose(judged)
    calibration = calibration_of(context, chosen.id, measured[chosen.id].variant, data)
    if calibration is not None:
        inputs["calibration"] = digest_json(calibration.to_json())

    def build(draft: Draft) -> None:
        content = {**_judge(context, teacher_entry, measured, baselines, data, judged, published), "history": histories}
        content["calibration"] = None if calibration is None else calibration.to_json()
        content["calibration_in_words"] = "" if calibration is None else calibration_in_words(calibration)
        _write_report(draft, content)
        (draft.path / "report.html").write_text(render_report(content), "utf-8")

    return context.stage(
        "report",
        Report,
        inputs,
        {"recipe": portable_recipe(context.recipe)},
        ["slmops.evaluate", "slmops.pipeline"],
        build,
    )


def _measured(
    context: Context,
    data: Dataset,
    teacher: Checkpoint | None,
    student: Checkpoint,
    whole: Checkpoint | None,
    answers: Dataset,
) -> dict[str, _Measured]:
    checkpoints: dict[str, Checkpoint] = {}
    variants: dict[str, Variant] = {}

    def add(who: str, checkpoint: Checkpoint, made: Mapping[str, Variant]) -> None:
        named = {"torch": as_trained(context, who, checkpoint), **made}
        variants.update({f"{who}-{name}": variant for name, variant in named.items()})
        checkpoints.update(dict.fromkeys([f"{who}-{name}" for name in named], checkpoint))

    before: str | None = None
    if whole is not None and whole.digest != student.digest:
        before = "teacher-torch" if teacher is not None and whole.digest == teacher.digest else WHOLE
        if before == WHOLE:
            add(WHOLE.removesuffix("-torch"), whole, {})
    if teacher is not None:
        precisions = context.recipe.compress.teacher_precisions
        add("teacher", teacher, {one: exported(context, "teacher", teacher, one) for one in precisions})
    add("student", student, student_variants(context, student, answers))
    scores = {name: score_variant(context, name, variant, data) for name, variant in variants.items()}
    parities = _parities(context, variants, scores, data)
    if before is not None and comparable(context.recipe, variants[before], variants["student-torch"]):
        parities["student-torch"] = _pruned_parity(context, before, variants, scores, student, data)
    measurements = measure_variants(context, variants, data)
    estimates = estimate_variants(context, variants, measurements)
    drift, floors = context.recipe.gates.drift, context.recipe.gates.benchmarks
    questions = read_benchmarks(context)
    asked = {
        name: ask_variant(context, name, variant, variant.digest, questions)
        for name, variant in variants.items()
        if name == "teacher-torch" or name.startswith("student-")
    }
    return {
        name: _Measured(
            variant,
            checkpoints[name],
            Candidate(
                name,
                variant.model_bytes,
                scores[name],
                measurements[name],
                estimates.get(name),
                tuple(gate for one in _steps_to(name, parities) for gate in drift_gates(one, drift)),
                tuple(benchmark_gates(asked[name], floors)) if name in asked else (),
            ),
            parities.get(name),
            asked.get(name, {}),
        )
        for name, variant in variants.items()
    }


WHOLE = "unpruned-torch"
"""The student before it was pruned."""


def comparable(recipe: Recipe, before: Variant, after: Variant) -> bool:
    """Whether the two answer in one space: labels, or tokens with the same numbers."""
    return recipe.closed or tokenizer_digest(before.model_path) == tokenizer_digest(after.model_path)


def _steps_to(name: str, parities: Mapping[str, Parity]) -> list[Parity]:
    """The steps that are judged with a form: its own, and pruning, through which all forms of the student went."""
    pruned = [parities["student-torch"]] if name.startswith("student-") and "student-torch" in parities else []
    own = [parities[name]] if name in parities and name != "student-torch" else []
    return pruned + own


def _pruned_parity(
    context: Context,
    before: str,
    variants: Mapping[str, Variant],
    scores: Mapping[str, Scores],
    student: Checkpoint,
    data: Dataset,
) -> Parity:
    gone, layers = student.manifest.metrics["layers_gone"], student.manifest.metrics["layers"]
    kept = [layer for layer in range(layers + len(gone)) if layer not in gone]
    after = "student-torch"
    parity = _parity(
        context,
        (before, variants[before]),
        (after, variants[after]),
        "pruned",
        data,
        layer_of=dict(enumerate(kept)),
    )
    rows = [row.id for row in context.test_rows(data)]
    return parity.with_answers(scores[before].predictions, scores[after].predictions, rows)


def _parities(
    context: Context, variants: Mapping[str, Variant], scores: Mapping[str, Scores], data: Dataset
) -> dict[str, Parity]:
    """How far each step moved the student, by the name of the form after it.

    Raises:
        GateError: the step from torch to a graph, through which all forms go, did.
    """
    drift = context.recipe.gates.drift
    found: dict[str, Parity] = {}
    for name in (name for name in variants if name.startswith("student-") and name != "student-torch"):
        before = "student-fp32" if "student-fp32" in variants and name != "student-fp32" else "student-torch"
        precision = variants[name].description["precision"]
        step: Step = "converted" if precision in UNROUNDED else "quantized"
        parity = _parity(context, (before, variants[before]), (name, variants[name]), step, data)
        rows = [row.id for row in context.test_rows(data)]
        parity = parity.with_answers(scores[before].predictions, scores[name].predictions, rows)
        if before == "student-torch" and step == "converted":
            check_step(parity, drift_gates(parity, drift))
        found[name] = parity
    return found


def _parity(
    context: Context,
    before: tuple[str, Variant],
    after: tuple[str, Variant],
    step: Step,
    data: Dataset,
    *,
    layer_of: Mapping[int, int] | None = None,
) -> Parity:
    recipe = context.recipe

    def build(draft: Draft) -> None:
        parity = compare_models(
            (before[0], before[1].model_path),
            (after[0], after[1].model_path),
            context.test_rows(data),
            step=step,
            closed=recipe.closed,
            to_messages=context.student_messages,
            max_rows=recipe.gates.drift.rows,
            threads=recipe.evaluate.threads,
            layer_of=layer_of,
            progress=partial(_rename, context.progress, f"compare {after[0]}"),
        )
        _write_report(draft, parity.to_json())

    report = context.stage(
        f"parity-{after[0]}",
        Report,
        {"before": before[1], "after": after[1], "data": data},
        {"names": [before[0], after[0]], "step": step, "rows": recipe.gates.drift.rows},
        ["slmops.evaluate.parity", "slmops.evaluate.drift", "slmops.runtime"],
        build,
    )
    return Parity.from_json(report.content)


def estimate_variants(
    context: Context, variants: Mapping[str, Variant], measurements: Mapping[str, Measurement]
) -> dict[str, DeviceEstimate]:
    """Every form on the budget's device; none where the budget names no device."""
    budget = context.recipe.budget
    if budget.device is None:
        return {}
    profile = device_profile(budget.device)
    report = context.stage(
        "speed",
        Report,
        {"measurements": digest_json({name: one.to_json() for name, one in measurements.items()})},
        {"cores": profile.cores},
        ["slmops.evaluate.speed"],
        lambda draft: _write_report(draft, machine_speed(profile.cores).to_json()),
    )
    here = MachineSpeed(**report.content)
    flags = machine_facts()["cpu_flags"]
    return {
        name: estimate_on(
            profile,
            here,
            measurements[name],
            size_bytes=variant.model_bytes,
            parameters=int(variant.description.get("parameters") or 0),
            precision=variant.description["precision"],
            flags_here=flags,
        )
        for name, variant in variants.items()
    }


def as_trained(context: Context, who: str, checkpoint: Checkpoint) -> Variant:
    recipe = context.recipe
    return context.stage(
        f"{who}-torch",
        Variant,
        {"checkpoint": checkpoint},
        {"name": recipe.name, "max_tokens": recipe.train.max_tokens},
        ["slmops.compress"],
        lambda draft: torch_variant(
            checkpoint.path,
            draft,
            form=context.form,
            task=recipe.task,
            name=recipe.name,
            max_tokens=recipe.train.max_tokens,
            system=context.system,
        ),
    )


def student_variants(context: Context, student: Checkpoint, answers: Dataset) -> dict[str, Variant]:
    """All variants that the recipe asks for, by their names: precisions, other formats, algorithms of quantization."""
    compress, who = context.recipe.compress, "student"
    return {
        **{precision: exported(context, who, student, precision) for precision in compress.precisions},
        **{one.variant: formatted(context, who, student, one) for one in compress.formats},
        **{one.variant: quantized(context, who, student, answers, one) for one in compress.quantize},
    }


def exported(context: Context, who: str, checkpoint: Checkpoint, precision: Precision) -> Variant:
    recipe = context.recipe
    common: dict[str, Any] = {
        "precision": precision,
        "task": recipe.task,
        "name": recipe.name,
        "max_tokens": recipe.train.max_tokens,
        "progress": context.progress,
    }
    build: Callable[[Path, Draft], None]
    states = recipe.compress.embeddings and not recipe.closed and who == "student"
    if recipe.closed:
        build = partial(export_classifier, **common)
    else:
        options = SHOWS_STATES if states else ()
        build = partial(export_generator, system=context.system, builder_options=options, **common)
    return context.stage(
        f"{who}-{precision}",
        Variant,
        {"checkpoint": checkpoint},
        {
            "precision": precision,
            "name": recipe.name,
            "max_tokens": recipe.train.max_tokens,
            **({"embeddings": True} if states else {}),
        },
        ["slmops.compress"],
        lambda draft: build(checkpoint.path, draft),
    )


def formatted(context: Context, who: str, checkpoint: Checkpoint, settings: FormatConfig) -> Variant:
    """The checkpoint for another engine, or as another tool makes it."""
    recipe = context.recipe
    base = context.named_student if settings.format == "onnx-adapters" else None
    max_tokens = recipe.train.max_tokens + recipe.evaluate.max_new_tokens
    config = None if settings.config is None else digest_file(Path(settings.config)).sha256
    return context.stage(
        f"{who}-{settings.variant}",
        Variant,
        {
            "checkpoint": checkpoint,
            **({} if base is None else {"base": base.digest}),
            **({} if config is None else {"olive": config}),
        },
        {
            "format": settings.format,
            "quantization": settings.stored_as,
            "name": recipe.name,
            "max_tokens": max_tokens,
        },
        ["slmops.compress"],
        lambda draft: export_format(
            checkpoint.path,
            draft,
            settings,
            base=None if base is None else base.path,
            task=recipe.task,
            name=recipe.name,
            max_tokens=max_tokens,
            system=context.system,
            progress=context.progress,
        ),
    )


def score_variant(
    context: Context,
    who: str,
    variant: Variant | Bundle,
    data: Dataset,
    *,
    split: str = "test",
    most_rows: int | None = None,
) -> Scores:
    """The answers of ``variant`` to the labelled rows of ``split``, at most ``most_rows`` of them where it is not the
    test split (of that one as many as the recipe says)."""
    recipe = context.recipe

    def asked() -> list[Row]:
        if split == "test":
            return context.test_rows(data)
        return [row for row in data.rows(split) if row.target is not None][:most_rows]

    def build(draft: Draft) -> None:
        rows = asked()
        report = partial(_rename, context.progress, f"score {who}")
        threads = recipe.evaluate.threads
        if recipe.closed:
            classifier = open_classifier(variant.model_path, threads=threads)
            scores = score_classifier(classifier, rows, task=recipe.task, seed=recipe.seed, progress=report)
            classifier.close()
        else:
            generator = open_generator(variant.model_path, threads=threads)
            scores = score_generator(
                generator,
                rows,
                task=recipe.task,
                max_new_tokens=recipe.evaluate.max_new_tokens,
                to_messages=context.student_messages,
                seed=recipe.seed,
                progress=report,
            )
            generator.close()
        _write_report(draft, scores.to_json())

    report = context.stage(
        f"score-{who}" if split == "test" else f"score-{split}-{who}",
        Report,
        {"variant": variant, "data": data},
        {
            "rows": recipe.evaluate.max_rows if split == "test" else most_rows,
            "max_new_tokens": recipe.evaluate.max_new_tokens,
            **({} if split == "test" else {"split": split}),
        },
        [*SCORING, "slmops.runtime"],
        build,
    )
    return with_measures(context, Scores.from_json(report.content), asked)


def with_measures(context: Context, scores: Scores, rows: Callable[[], list[Row]]) -> Scores:
    """These scores with the user's own measures of the same answers; ``rows`` are read where there are some."""
    own = context.own_metrics
    return scores.with_measures(own, rows(), seed=context.recipe.seed) if own else scores


def measure_variants(context: Context, variants: Mapping[str, Variant], data: Dataset) -> dict[str, Measurement]:
    recipe = context.recipe

    def build(draft: Draft) -> None:
        rows = context.test_rows(data)
        requests: list[str] | list[GenerationRequest]
        if recipe.closed:
            requests = [row.text for row in _cycle(rows, recipe.evaluate.latency_requests)]
        else:
            requests = [
                GenerationRequest(context.student_messages(row), max_tokens=64)
                for row in _cycle(rows, max(5, recipe.evaluate.latency_requests // 20))
            ]
        found = _measure_within(
            limits,
            lambda held: measure_interleaved(
                {name: variant.model_path for name, variant in variants.items()},
                form=context.form,
                requests=requests,
                threads=recipe.evaluate.threads,
                limit_s=30.0,
                limits=held,
                progress=context.progress,
            ),
        )
        _write_report(draft, {name: measurement.to_json() for name, measurement in found.items()})

    limits = _device_limits(recipe, variants)

    report = context.stage(
        "measure",
        Report,
        {**variants, "data": data},
        {
            "requests": recipe.evaluate.latency_requests,
            "threads": recipe.evaluate.threads,
            **({"limits": {name: one.to_json() for name, one in limits.items()}} if limits else {}),
        },
        ["slmops.evaluate.measure", "slmops.evaluate.probe", "slmops.evaluate.limits", "slmops.runtime"],
        build,
    )
    return {name: Measurement.from_json(raw) for name, raw in report.content.items()}


def _device_limits(recipe: Recipe, names: Iterable[str]) -> dict[str, Limits]:
    """The device's cores for all, that they compare; its memory for the student, which is what goes there."""
    if recipe.budget.device is None:
        return {}
    profile = device_profile(recipe.budget.device)
    memory_bytes = int(profile.model_memory_mb * MB)
    return {
        name: Limits(memory_bytes if name.startswith("student-") and name != "student-torch" else None, profile.cores)
        for name in names
    }


def _measure_within(
    limits: Mapping[str, Limits], measure: Callable[[Mapping[str, Limits]], dict[str, Measurement]]
) -> dict[str, Measurement]:
    """A model that does not run in its memory is measured without that limit, and told apart."""
    held = dict(limits)
    lifted: set[str] = set()
    while True:
        try:
            found = measure(held)
        except DoesNotFitError as error:
            if error.name in lifted:
                raise
            lifted.add(error.name)
            held[error.name] = Limits(None, held[error.name].cores)
        else:
            return {name: _told_apart(one, limits[name]) if name in lifted else one for name, one in found.items()}


def _told_apart(measurement: Measurement, limits: Limits) -> Measurement:
    held = {**(measurement.limits or {}), "memory_bytes": limits.memory_bytes, "fits": False}
    return replace(measurement, limits=held)


def _baselines(context: Context, data: Dataset, untaught: Checkpoint | None) -> dict[str, BaselineEntry]:
    recipe = context.recipe

    def build(draft: Draft) -> None:
        found = baseline_scores(data, recipe.seed, task=recipe.task)
        _write_report(draft, {name: scores.to_json() for name, scores in found.items()})

    report = context.stage(
        "baselines", Report, {"data": data}, {}, ["slmops.evaluate.baselines", "slmops.evaluate.metrics"], build
    )
    found = {name: Scores.from_json(raw) for name, raw in report.content.items()}
    rows = len(context.test_rows(data))
    entries = {
        name: BaselineEntry(
            with_measures(context, scores.first(rows, seed=recipe.seed), partial(context.test_rows, data)),
            DESCRIPTIONS[name],
            size_bytes=_whole(scores.others.get("size_bytes")),
            latency_ms_p50=scores.others.get("latency_ms_p50"),
            artifact=report.digest,
        )
        for name, scores in found.items()
    }
    if untaught is not None:
        variant = as_trained(context, "untaught", untaught)
        entries["untaught"] = BaselineEntry(
            score_variant(context, "untaught", variant, data),
            DESCRIPTIONS["untaught"],
            size_bytes=variant.model_bytes,
            artifact=variant.digest,
        )
    return entries


def _remote_teacher_entry(context: Context, data: Dataset) -> ModelEntry:
    """The teacher behind a server, asked the test rows. Its size and memory are not for us to see."""
    recipe = context.recipe

    def build(draft: Draft) -> None:
        rows = context.test_rows(data)
        asker = OpenAITeacher(recipe.teacher, seed=recipe.seed)
        requests = [
            redacted(teacher_request(recipe.task, data.labels, row, recipe.teacher, temperature=0.0), context.redact)
            for row in rows
        ]
        answers, tokens, failures = [""] * len(rows), 0, 0
        for done, (index, outcome) in enumerate(asker.answer(requests), start=1):
            if isinstance(outcome, TeacherFailure):
                failures += 1
            else:
                checked = check_answer(recipe.task, data.labels, rows[index], outcome.text, outcome.finish_reason)
                closed_answer = checked.normalized if recipe.closed else None
                answers[index] = closed_answer or outcome.text
                tokens += outcome.prompt_tokens + outcome.completion_tokens
            context.progress(Progress("score teacher", done, len(rows)))
        # A teacher that is not there is no bad teacher: its score would be too low, and the student's share too high.
        if len(rows) - failures < max(1, recipe.teacher.min_success_ratio * len(rows)):
            raise TeacherError(
                f"{asker.identity} answered {len(rows) - failures} of the {len(rows)} test rows.",
                remedy="Look at the server and run again: all else is done.",
            )
        scores = score_predictions(
            answers, [row.target or "" for row in rows], task=recipe.task, labels=data.labels, seed=recipe.seed
        )
        _write_report(draft, {"scores": scores.to_json(), "tokens_per_request": tokens / len(rows)})

    report = context.stage(
        "score-teacher",
        Report,
        {"data": data},
        {
            "rows": recipe.evaluate.max_rows,
            "teacher": asked_config(context),
        },
        ["slmops.distill", *SCORING, "slmops.privacy.redact"],
        build,
    )
    price = recipe.evaluate.teacher_price_per_million_tokens
    tokens = float(report.content["tokens_per_request"])
    return ModelEntry(
        id="teacher",
        scores=with_measures(context, Scores.from_json(report.content["scores"]), partial(context.test_rows, data)),
        runtime=recipe.teacher.model,
        cost_per_1000=None if price is None else cost_per_1000_by_tokens(tokens, price),
        artifact=report.digest,
    )


def _entry(context: Context, measured: _Measured) -> ModelEntry:
    description, found = measured.variant.description, measured.candidate
    return ModelEntry(
        id=found.id,
        scores=found.scores,
        parameters=int(measured.checkpoint.manifest.metrics.get("parameters") or description["parameters"]),
        size_bytes=found.size_bytes,
        measurement=found.measurement,
        cost_per_1000=cost_per_1000(found.measurement.throughput_per_s, context.recipe.evaluate.price_per_hour),
        runtime=description["runtime"],
        precision=description["precision"],
        artifact=measured.variant.digest,
        extra={} if found.estimate is None else {"on_device": found.estimate.to_json()},
    )


def _judged(
    recipe: Recipe, teacher: ModelEntry, measured: Mapping[str, _Measured]
) -> list[tuple[Candidate, list[Gate]]]:
    """What may go into the bundle, with its gates."""
    return [
        (candidate, gates_of(_way_to(candidate, measured), teacher.scores, recipe.gates, recipe.budget, recipe.seed))
        for candidate in _candidates(recipe, measured)
    ]


def _judge(
    context: Context,
    teacher: ModelEntry,
    measured: Mapping[str, _Measured],
    baselines: Mapping[str, BaselineEntry],
    data: Dataset,
    judged: Sequence[tuple[Candidate, list[Gate]]],
    published: Mapping[str, Mapping[str, BenchmarkScore]],
) -> dict[str, Any]:
    recipe = context.recipe
    chosen, gates = choose(judged)
    removed = measured["student-torch"].checkpoint.manifest.metrics
    misses = closest(judged)
    rivals: dict[str, BaselineEntry | ModelEntry] = {**baselines, "teacher": teacher}
    return build_report(
        name=recipe.name,
        task=recipe.task,
        machine=machine_facts(),
        teacher=teacher,
        student=_entry(context, measured[chosen.id]),
        variants=[_entry(context, one) for one in measured.values()],
        baselines=baselines,
        gates=gates,
        verdict=verdict(
            chosen.scores,
            teacher.scores,
            gates=gates,
            baselines={entry.description: entry.scores for entry in baselines.values()},
            seed=recipe.seed,
        ),
        bundle="",
        wall_s=context.wall_s,
        comparisons={
            f"student_vs_{name}": compare(rival.scores.per_row, chosen.scores.per_row, seed=recipe.seed)
            for name, rival in rivals.items()
        },
        extra={
            "data": data.summary,
            "currency": recipe.evaluate.currency,
            "seed": recipe.seed,
            "budget": recipe.budget.with_device().model_dump(mode="json"),
            "candidates": [
                {"id": candidate.id, "passed": all(gate.passed for gate in own), "gates": [g.to_json() for g in own]}
                for candidate, own in judged
            ],
            "closest": [miss.to_json() for miss in misses],
            "closest_in_words": closest_in_words(misses),
            "drift": [_drift_entry(one.parity, one.candidate) for one in measured.values() if one.parity],
            "measures": _measures(teacher.scores, chosen.scores, recipe.seed),
            "benchmarks": side_by_side(
                {**published, **{name: one.benchmarks for name, one in measured.items() if one.benchmarks}},
                chosen.id,
                recipe.seed,
            )
            if recipe.evaluate.benchmarks
            else {},
            **({} if context.search is None else {"search": context.search}),
            **({} if "removed" not in removed else {"pruned": removed}),
        },
    )


def _published(context: Context) -> dict[str, dict[str, BenchmarkScore]]:
    """The benchmarks of the model that the student comes from, as it was before any training here."""
    questions = read_benchmarks(context)
    if not questions:
        return {}
    model = context.named_student or context.base
    return {PUBLISHED: ask_variant(context, PUBLISHED, model.path, model.digest, questions)}


def _measures(teacher: Scores, student: Scores, seed: int) -> dict[str, Any]:
    """The user's own measures: what teacher and student reach, and by the row whether they differ."""
    found: dict[str, Any] = {}
    for name, ours in student.measures.items():
        theirs = teacher.measures[name]
        found[name] = {"teacher": theirs.to_json(), "student": ours.to_json(), "test": None}
        if ours.per_row is not None and theirs.per_row is not None:
            found[name]["test"] = compare(theirs.per_row, ours.per_row, seed=seed).to_json()
    return found


def _drift_entry(parity: Parity, candidate: Candidate) -> dict[str, Any]:
    """A step for the report: its figures, and what to try where a gate of it fails."""
    passed = all(gate.passed for gate in candidate.drift)
    where = parity.layers.sentence if parity.layers else ""
    return {**parity.to_json(), "passed": passed, "where": where, "advice": "" if passed else advice(parity)}


def _candidates(recipe: Recipe, measured: Mapping[str, _Measured]) -> list[Candidate]:
    """The student's exported forms that may go into the bundle."""
    made = recipe.compress.variants
    wanted = made if recipe.compress.choose == "auto" else (recipe.compress.choose,)
    return [measured[f"student-{name}"].candidate for name in wanted]


def _way_to(candidate: Candidate, measured: Mapping[str, _Measured]) -> list[Candidate]:
    """The forms that the candidate's weights went through: as trained, pruned, the fp32 graph, its own. (A teacher that
    was pruned is not among them: how much of it is kept is the gate of retention.)"""
    before = [measured[name].candidate for name in (WHOLE, "student-torch", "student-fp32") if name in measured]
    return [*(one for one in before if one.id != candidate.id), candidate]


def _rename(progress: ProgressSink, task: str, event: Progress) -> None:
    progress(Progress(task, event.done, event.total, event.unit, event.note))


def _cycle(rows: Sequence[Row], count: int) -> Iterator[Row]:
    return (rows[index % len(rows)] for index in range(count))


def _write_report(draft: Draft, content: Mapping[str, Any]) -> None:
    (draft.path / "report.json").write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), "utf-8")


def _history(folder: Path) -> list[dict[str, float]]:
    path = folder / "history.json"
    history: list[dict[str, float]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return history


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
