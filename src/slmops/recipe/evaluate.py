"""``evaluate``, ``budget``, ``gates`` and ``improve``: what is measured, and what has to hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from slmops.hardware import device_profile, device_profiles, known_devices
from slmops.recipe.section import Section
from slmops.recipe.train import ForgettingConfig


class BenchmarkConfig(Section):
    """A public task, or rows in the form of one: what a model can do beside the recipe's own rows."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(description="in reports and gates")
    task: str | None = Field(
        None, description="a task of lm-evaluation-harness by its name, or a file of one (.yaml); null: data and kind"
    )
    data: str | None = Field(None, description="jsonl, csv or parquet file, or hf:owner/name@revision[:split[slice]]")
    kind: Literal["choice", "text", "perplexity"] = Field(
        "choice",
        description="choice: the likeliest of several answers; text: an answer is written and compared; "
        "perplexity: how likely the answer is",
    )
    prompt: str = Field("{question}", description="template over columns")
    answer: str = Field(
        "{answer}", description="template over columns; choice: a choice, its label or its number from 0"
    )
    choices: tuple[str, ...] | dict[str, str] | str | None = Field(
        None, description="choice: the answers; or answer in the data -> what the model says; or a column with a list"
    )
    labels: str | None = Field(None, description="choice: column with the list of the choices' labels (A, B, …)")
    match: Literal["exact", "number"] = Field("exact", description="text: how an answer is compared")
    shots: Annotated[int, Field(ge=0, le=32)] = Field(0, description="solved examples before each question")
    rows: Annotated[int, Field(gt=0)] | None = Field(100, description="the first so many; null: all")
    max_new_tokens: Annotated[int, Field(gt=0)] = Field(256, description="text: of an answer, at most")

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        """A name alone is a task; true and false as keys of choices are what they are in a JSON file."""
        if isinstance(raw, str):
            return {"name": Path(raw).stem if raw.endswith((".yaml", ".yml")) else raw, "task": raw}
        if isinstance(raw, Mapping) and isinstance(raw.get("choices"), Mapping):
            return {**raw, "choices": {_as_in_json(key): value for key, value in raw["choices"].items()}}
        return raw

    @model_validator(mode="after")
    def _check_form(self) -> BenchmarkConfig:
        if (self.task is None) == (self.data is None):
            raise ValueError(f"evaluate.benchmarks: {self.name} needs either task or data, and not both")
        if self.data is not None and self.kind == "choice" and not self.choices:
            raise ValueError(
                f"evaluate.benchmarks: {self.name} has no choices: list them, or name the column that holds them"
            )
        return self


def _as_in_json(key: Any) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


class EvaluateConfig(Section):
    """How models are measured."""

    metrics: tuple[str, ...] = Field(
        (),
        description="measures of your own: FILE.py:FUNCTION beside the recipe, or the name of an entry point in the "
        "group slmops.metrics",
    )
    benchmarks: tuple[BenchmarkConfig, ...] = Field(
        (), description="public tasks for teacher and student (open tasks): names, files, or sections"
    )

    max_rows: Annotated[int, Field(gt=0)] | None = Field(None, description="use so many test rows; null: all")
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    latency_requests: Annotated[int, Field(gt=0)] = 200
    threads: Annotated[int, Field(gt=0)] | None = Field(None, description="null: all cores")
    untaught_baseline: bool = Field(True, description="also train the same student without the teacher")
    abstain_below: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="closed label sets: the served model tells that it abstains below this confidence"
    )
    answered_accuracy: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="the same by its aim: the share of answered validation rows that must be right"
    )
    price_per_hour: Annotated[float, Field(ge=0)] = Field(0.10, description="of the machine, for cost per 1,000")
    teacher_price_per_million_tokens: Annotated[float, Field(ge=0)] | None = None
    currency: str = "USD"

    @field_validator("metrics", "benchmarks", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping | BenchmarkConfig) else value

    @model_validator(mode="after")
    def _own_names(self) -> EvaluateConfig:
        names = [one.name for one in self.benchmarks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluate.benchmarks has two named {twice[0]}: give one of them another name")
        return self

    @model_validator(mode="after")
    def _one_threshold(self) -> EvaluateConfig:
        if self.abstain_below is not None and self.answered_accuracy is not None:
            raise ValueError("abstain_below and answered_accuracy both set the threshold: keep one of them")
        return self


LEAST_MEMORY_MB = 30
"""Python with onnxruntime and nothing to run takes more than this."""


class BudgetConfig(Section):
    """What the device can hold. None: no limit. Megabytes are decimal."""

    device: str | None = Field(
        None,
        description="raspberry-pi-4, raspberry-pi-5, jetson-orin-nano, phone, laptop or small-server: fills in size_mb "
        "and memory_mb, limits the measured process, and has latency_ms_p95 and tokens_per_s judged by an estimate",
    )
    size_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="all files of the model")
    memory_mb: Annotated[float, Field(gt=0)] | None = Field(None, description="peak of the process, Python included")
    latency_ms_p95: Annotated[float, Field(gt=0)] | None = Field(None, description="of single requests")
    tokens_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="open tasks: new tokens a second of a single request, at least"
    )

    @field_validator("device")
    @classmethod
    def _check_device(cls, name: str | None) -> str | None:
        if name is not None and name not in device_profiles():
            raise ValueError(f"budget.device is {name!r}. {known_devices(name).removesuffix('.')}")
        return name

    @model_validator(mode="after")
    def _check_possible(self) -> BudgetConfig:
        if self.memory_mb is not None and self.memory_mb < LEAST_MEMORY_MB:
            raise ValueError(
                f"budget.memory_mb is {self.memory_mb:g}: the process counts as a whole, and Python with onnxruntime "
                f"takes more than {LEAST_MEMORY_MB} MB before any model is loaded"
            )
        return self

    def with_device(self) -> BudgetConfig:
        """This budget with the limits that ``device`` sets where nothing was written."""
        if self.device is None:
            return self
        profile = device_profile(self.device)
        return self.model_copy(
            update={
                "size_mb": profile.model_storage_mb if self.size_mb is None else self.size_mb,
                "memory_mb": profile.model_memory_mb if self.memory_mb is None else self.memory_mb,
            }
        )


class DriftLimits(Section):
    """How far one step may move a model, on the task's own rows. null: shown, not judged."""

    top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="share of the predicted tokens (closed label sets: rows) whose likeliest answer is the same"
    )
    kl: Annotated[float, Field(ge=0)] | None = Field(
        None, description="mean divergence of the distribution after the step from the one before, nats"
    )
    answers_equal: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="share of the test rows with the same greedy answer"
    )


class DriftConfig(Section):
    """What is compared after each step, and how much may change. ``gates.parity`` is about the task's score."""

    rows: Annotated[int, Field(gt=0)] = Field(64, description="test rows whose distributions are compared")
    tokens_equal: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="share of the texts that both runtimes turn into the same tokens"
    )
    converted: DriftLimits = Field(
        DriftLimits(top1_agreement=0.95, kl=0.01, answers_equal=None),
        description="from torch to a graph of fp32 or fp16: the same model; a run stops where it is not",
    )
    merged: DriftLimits = Field(
        DriftLimits(top1_agreement=0.95, kl=0.01, answers_equal=None),
        description="adapters into their base: the same model (slmops evaluate --step merged)",
    )
    pruned: DriftLimits = Field(
        DriftLimits(top1_agreement=None, kl=None, answers_equal=None), description="layers, heads, channels, weights"
    )
    quantized: DriftLimits = Field(
        DriftLimits(top1_agreement=None, kl=None, answers_equal=None), description="to int8 or int4"
    )


_FLOOR = re.compile(r"\s*(>=|<=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Floor:
    """A limit as written: ``">= 3"``, ``"<= 0.1"``."""

    direction: Literal["at_least", "at_most"]
    limit: float

    @classmethod
    def parse(cls, text: str) -> Floor:
        """Raises :class:`ValueError` for anything else."""
        found = _FLOOR.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no limit: write >= or <= and a number, for example '>= 3'")
        return cls("at_least" if found[1] == ">=" else "at_most", float(found[2]))


class GatesConfig(Section):
    """Quality floors. A gate that does not hold ends the run with exit code 1, after the report is written."""

    metrics: dict[str, str] = Field(
        {}, description="measure -> limit, such as '>= 3': those of evaluate.metrics, and the task's further metrics"
    )
    benchmarks: dict[str, str] = Field({}, description="name of a benchmark -> limit, such as '>= 0.5'")

    retention: Annotated[float, Field(ge=0)] = Field(0.9, description="student's score / teacher's score")
    format_valid: Annotated[float, Field(ge=0, le=1)] = 0.95
    parity: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="score that one transformation may cost, as a share of the score before"
    )
    drift: DriftConfig = DriftConfig()

    @field_validator("metrics", "benchmarks")
    @classmethod
    def _check_limits(cls, limits: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for name, text in limits.items():
            try:
                Floor.parse(text)
            except ValueError as error:
                raise ValueError(f"gates.{info.field_name}.{name}: {error}") from None
        return limits


class ImproveConfig(Section):
    """What ``slmops improve`` makes of feedback, and what a new version has to hold."""

    old_loss_points: Annotated[float, Field(ge=0)] = Field(
        0.5, description="points of score that may be lost on the test rows that the version in use was judged by"
    )
    old_loss_proven: bool = Field(
        False, description="the 95 % interval of the loss too must be within old_loss_points: needs many test rows"
    )
    new_label_score: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="share of the test rows of labels that are new which must be right"
    )
    test_share: Annotated[float, Field(gt=0, lt=0.9)] = Field(0.2, description="of the corrections, to judge by")
    new_labels: bool = Field(True, description="false: corrections to labels that are not known go to quarantine")
    least_label_rows: Annotated[int, Field(ge=1)] = Field(5, description="corrections that a new label needs")
    weight: Annotated[int, Field(ge=1, le=100)] | None = Field(
        None, description="how often each correction is learnt; null: so often that its label is balanced (closed sets)"
    )
    doubt: Annotated[float, Field(gt=0.5, le=1)] | None = Field(
        0.9,
        description="a correction is kept out where a linear model is so sure of another label (closed sets); null: "
        "all are believed",
    )
    go_on: bool = Field(
        True,
        description="the student goes on from the one in use, which changes fewer of its answers (closed sets, the "
        "same keys of student); false: from scratch",
    )
    forgetting: ForgettingConfig | None = Field(
        None, description="general rows, and how much the loss on them may rise beside the version in use (open tasks)"
    )
