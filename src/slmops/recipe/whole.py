"""The recipe as a whole, and what has to hold across its sections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from slmops.recipe.compress import CompressConfig
from slmops.recipe.data import DataConfig
from slmops.recipe.distill import DistillConfig, StudentConfig
from slmops.recipe.evaluate import BudgetConfig, EvaluateConfig, GatesConfig, ImproveConfig
from slmops.recipe.search import SearchConfig
from slmops.recipe.section import CLOSED_TASKS, Section, Task
from slmops.recipe.teacher import TeacherConfig
from slmops.recipe.train import OLIVE_KNOWS, OLIVE_LORA, AzureMLConfig, TrainConfig


class Recipe(Section):
    """A whole run: data → teacher → student → compress → evaluate → package."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    task: Task
    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    teachers: tuple[TeacherConfig, ...] = Field(
        (), description="further teachers; the same as a list of them under teacher"
    )
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig | None = Field(None, description="null: train as written above")
    compress: CompressConfig = CompressConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    budget: BudgetConfig = BudgetConfig()
    azureml: AzureMLConfig | None = Field(None, description="where --on azureml runs")
    gates: GatesConfig = GatesConfig()
    improve: ImproveConfig = ImproveConfig()
    privacy: Literal["local", "remote"] = Field(
        "local", description="local: rows never leave this machine; remote: a remote teacher may read them"
    )
    seed: int = 0

    @property
    def closed(self) -> bool:
        """Whether answers are labels out of a fixed set."""
        return self.task in CLOSED_TASKS

    @model_validator(mode="before")
    @classmethod
    def _divide_teachers(cls, raw: Any) -> Any:
        """``teacher`` may be a list: the first is the teacher, the others teach besides."""
        if isinstance(raw, Mapping) and isinstance(listed := raw.get("teacher"), list | tuple) and listed:
            return {**raw, "teacher": listed[0], "teachers": [*listed[1:], *raw.get("teachers", ())]}
        return raw

    @model_validator(mode="after")
    def _check_across(self) -> Recipe:
        if self.data.split.validation + self.data.split.test >= 0.9:
            raise ValueError("data.split: validation and test leave less than a tenth of the rows for training")
        if self.data.target is None and self.closed and not self.teacher.remote:
            raise ValueError(
                f"data.target is null, but a local teacher can answer {self.task} only after it has seen labelled rows"
            )
        self._check_running_text()
        if self.improve.forgetting and self.closed:
            raise ValueError(f"improve.forgetting is set, but a classifier ({self.task}) has no loss on general text")
        if self.train.forgetting and self.closed:
            raise ValueError(
                f"train.forgetting is set, but the task is {self.task}: a classifier keeps no output layer over "
                "tokens, so it has no loss on general text before or after training that a budget could hold; leave "
                "it out, or choose an open task"
            )
        if self.budget.tokens_per_s is not None and self.closed:
            raise ValueError(
                f"budget.tokens_per_s is for models that write text; the answers of {self.task} are labels: "
                "use budget.latency_ms_p95"
            )
        if self.closed and (wrong := [one.format for one in self.compress.formats]):
            raise ValueError(
                f"compress.formats has {wrong[0]}, which holds models that write text; the answers of {self.task} are "
                "labels: use compress.precisions"
            )
        if self.train.preferences and self.closed:
            raise ValueError(
                f"train.preferences is for open tasks, and the answers of {self.task} are labels out of a fixed set"
            )
        if self.train.engine == "olive":
            if self.closed or self.student.model is None:
                raise ValueError(
                    "train.engine is olive, which trains adapters of a whole language model: it needs an open task and "
                    "a student.model"
                )
            self._check_olive()
        self._check_teacher()
        self._check_benchmarks()
        prune = self.compress.prune
        losses = prune.recover.losses if prune is not None and prune.recover is not None else None
        if losses is not None and losses.hidden and not self.closed:
            raise ValueError(
                "compress.prune.recover.losses.hidden is for closed label sets: an open task recovers by the "
                "distribution over the next token"
            )
        return self

    def _check_benchmarks(self) -> None:
        if self.closed and self.evaluate.benchmarks:
            raise ValueError(
                f"evaluate.benchmarks asks models for text, and the answers of {self.task} are labels: a classifier "
                "can answer no other task; leave it out"
            )
        known = [one.name for one in self.evaluate.benchmarks]
        for name in self.gates.benchmarks:
            if name not in known:
                raise ValueError(
                    f"gates.benchmarks names {name}, and evaluate.benchmarks has {', '.join(known) or 'none'}"
                )

    def _check_running_text(self) -> None:
        """What does not go with text that has no answers."""
        data = self.data
        if data.documents is not None and data.text is None:
            raise ValueError(
                f"data.documents is {data.documents}, but data.text is not set: it divides running text, for example "
                'text: "{text}"'
            )
        if data.text is None:
            return
        if self.task != "generation":
            raise ValueError(
                f"data.text is running text without answers, and the task is {self.task}: set task: generation"
            )
        for key, on in (
            ("train.engine: olive", self.train.engine == "olive"),
            ("train.preferences", self.train.preferences is not None),
            ("search", self.search is not None),
            ("distill.unlabelled", self.distill.unlabelled is not None),
            ("teachers", bool(self.teachers)),
        ):
            if on:
                raise ValueError(
                    f"data.text is running text without answers, and {key} is set, which is for rows with answers: "
                    "leave one of both out"
                )

    def _check_olive(self) -> None:
        """Refuse what does not reach Olive, instead of leaving it out in silence."""
        if self.train.method not in (None, "lora", "qlora"):
            raise ValueError(f"train.engine is olive, which does not train with train.method {self.train.method}")
        for section, prefix, known in ((self.train, "train", OLIVE_KNOWS), (self.train.lora, "train.lora", OLIVE_LORA)):
            for key, field in type(section).model_fields.items():
                if key not in known and getattr(section, key) != field.default:
                    raise ValueError(f"train.engine is olive, and {prefix}.{key} is set, which does not reach Olive")

    def _check_teacher(self) -> None:
        """What is asked of the teacher that this task or this kind of teacher does not have."""
        teacher = self.teacher
        if teacher.own:
            raise ValueError(
                f"teacher.model is {teacher.model}, but the first teacher has to be a language model: its tokenizer "
                f"and its weights are what the student starts from; name {teacher.model} among teachers"
            )
        for further in self.teachers:
            if further.own and not self.closed:
                raise ValueError(
                    f"a teacher is {further.model}, which knows labels alone, and the answers of {self.task} are texts"
                )
            if further.own and self.data.target is None:
                raise ValueError(f"a teacher is {further.model}, which learns from labels, and data.target is null")
        if self.closed and not teacher.remote and (teacher.samples > 1 or teacher.new_prompts):
            key = "samples" if teacher.samples > 1 else "new_prompts"
            raise ValueError(
                f"teacher.{key} is for a teacher that writes text; {teacher.model} gives its whole distribution over "
                "the labels in one go (for more texts see distill.unlabelled)"
            )
        if teacher.judge is not None and self.closed:
            raise ValueError(f"teacher.judge is for open tasks; the labels of {self.task} are compared with gold")
        if teacher.judge is not None and teacher.judge.model is None and not teacher.remote and teacher.adapt:
            raise ValueError(
                "teacher.judge names no model, and a teacher that was adapted to the task judges badly: name one in "
                "teacher.judge.model, or set teacher.adapt: false"
            )
        if teacher.judge is not None and not (teacher.judge.model or "openai:").startswith("openai:"):
            raise ValueError(f"teacher.judge.model is {teacher.judge.model!r}, not openai:MODEL")
        if teacher.answer_schema is not None and self.task != "extraction":
            raise ValueError(f"teacher.answer_schema is for extraction, and the task is {self.task}")
        if (wanted := teacher.new_prompts) is not None:
            if not teacher.remote and teacher.adapt:
                raise ValueError(
                    "teacher.new_prompts needs a teacher that can write: one behind a server, or teacher.adapt: false"
                )
            key, other = ("per_label", "rows") if self.closed else ("rows", "per_label")
            if getattr(wanted, key) is None or getattr(wanted, other) is not None:
                raise ValueError(f"teacher.new_prompts needs {key} for {self.task}, and not {other}")


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema."""
    return Recipe.model_json_schema(by_alias=True)


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON, defaults filled in. Holds paths of this machine: see :func:`portable_recipe`."""
    return recipe.model_dump(mode="json", by_alias=True)
