"""What a model can do beside its task: questions with choices, answers that are written, text that is foreseen.

A model is asked as it is served: in its chat template, solved examples as turns before the question. Three kinds:

``choice``      the likeliest of several answers, by its log-probability as the whole turn; beside it that by byte
``text``        a greedy answer, compared with the right one
``perplexity``  bits a byte that the answer takes after its prompt (comparable between tokenizers); lower is better

Guarantees: one value a question, in their order, so that two models compare pair by pair. Not covered: prompts as raw
text without a template, which is how leaderboards ask base models: figures compare between models asked here, and not
with those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message
from slmops.errors import ModelError
from slmops.evaluate import metrics
from slmops.evaluate.significance import bootstrap_interval
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import Task
from slmops.runtime import GenerationRequest, Generator

Kind = Literal["choice", "text", "perplexity"]
BATCH = 16
METRICS: dict[Kind, str] = {"choice": "accuracy", "text": "exact_match", "perplexity": "bits_per_byte"}


@dataclass(frozen=True)
class Question:
    """``choices``: for the kind ``choice``, among them ``answer``."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Benchmark:
    """``questions``, after ``solved`` ones with their answers; or ``task``: a task of lm-evaluation-harness."""

    name: str
    kind: Kind = "choice"
    questions: tuple[Question, ...] = ()
    solved: tuple[Question, ...] = ()
    match: Literal["exact", "number"] = "exact"
    max_new_tokens: int = 256
    task: str | None = None
    rows: int | None = None
    shots: int = 0


@dataclass(frozen=True, eq=False)
class BenchmarkScore:
    """``per_row``: float64 ``[questions]``, and ``value`` their mean; ``higher_is_better`` as the metric has it."""

    name: str
    metric: str
    value: float
    ci95: tuple[float, float]
    per_row: NDArray[np.float64]
    higher_is_better: bool = True
    others: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, metric: str, per_row: NDArray[np.float64], seed: int, **more: Any) -> BenchmarkScore:
        return cls(name, metric, float(per_row.mean()), bootstrap_interval(per_row, seed), per_row, **more)

    def summary(self) -> dict[str, Any]:
        """Without the rows, as the report has it."""
        return {
            "metric": self.metric,
            "value": self.value,
            "ci95": list(self.ci95),
            "rows": len(self.per_row),
            "higher_is_better": self.higher_is_better,
            "others": dict(self.others),
        }

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, **self.summary(), "per_row": self.per_row.tolist()}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> BenchmarkScore:
        return cls(
            raw["name"],
            raw["metric"],
            float(raw["value"]),
            (float(raw["ci95"][0]), float(raw["ci95"][1])),
            np.asarray(raw["per_row"], dtype=np.float64),
            bool(raw["higher_is_better"]),
            dict(raw["others"]),
        )


def run_benchmarks(
    generator: Generator,
    benchmarks: Sequence[Benchmark],
    *,
    seed: int = 0,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> dict[str, BenchmarkScore]:
    """Ask all of them, by name. ``offline``: data of harness tasks are taken from this machine or not at all.

    Raises:
        ModelError: the engine cannot score given text, which ``choice`` and ``perplexity`` need.
        ContextLengthError: a question that does not fit in the model's context.
        MissingExtraError, RecipeError, DataError: as :func:`slmops.evaluate.harness.run_tasks`.
    """
    found: dict[str, BenchmarkScore] = {}
    for one in benchmarks:
        if one.task is None:
            found[one.name] = _ask(generator, one, seed, progress)
            continue
        from slmops.evaluate.harness import run_task

        found[one.name] = run_task(generator, one, seed=seed, offline=offline, progress=progress)
    return found


def _ask(generator: Generator, benchmark: Benchmark, seed: int, progress: ProgressSink) -> BenchmarkScore:
    ask: dict[Kind, Callable[..., BenchmarkScore]] = {"choice": _choose, "text": _write, "perplexity": _foresee}
    return ask[benchmark.kind](generator, benchmark, seed, progress)


def conversation(question: Question, solved: Sequence[Question]) -> tuple[Message, ...]:
    """The solved questions as turns, and the question behind them."""
    turns = [turn for one in solved for turn in (Message("user", one.prompt), Message("assistant", one.answer))]
    return (*turns, Message("user", question.prompt))


def _choose(generator: Generator, benchmark: Benchmark, seed: int, progress: ProgressSink) -> BenchmarkScore:
    asked = [
        (conversation(question, benchmark.solved), choice)
        for question in benchmark.questions
        for choice in question.choices
    ]
    nats = _likelihoods(generator, asked, benchmark.name, progress)
    right, by_byte, start = [], [], 0
    for question in benchmark.questions:
        mine = nats[start : start + len(question.choices)]
        start += len(question.choices)
        gold = question.choices.index(question.answer)
        lengths = np.array([len(choice.encode()) for choice in question.choices])
        right.append(float(mine.argmax() == gold))
        by_byte.append(float((mine / lengths).argmax() == gold))
    chance = float(np.mean([1 / len(question.choices) for question in benchmark.questions]))
    others = {"accuracy_by_byte": float(np.mean(by_byte)), "chance": chance}
    return BenchmarkScore.of(benchmark.name, METRICS["choice"], np.array(right), seed, others=others)


def _write(generator: Generator, benchmark: Benchmark, seed: int, progress: ProgressSink) -> BenchmarkScore:
    requests = [
        GenerationRequest(conversation(one, benchmark.solved), max_tokens=benchmark.max_new_tokens, seed=seed)
        for one in benchmark.questions
    ]
    answers: list[str] = []
    cut_off = 0
    for start in range(0, len(requests), BATCH):
        for answer in generator.generate(requests[start : start + BATCH]):
            answers.append(answer.text.strip())
            cut_off += answer.finish_reason == "length"
        progress(Progress(benchmark.name, len(answers), len(requests)))
    targets = [one.answer for one in benchmark.questions]
    task: Task = "math" if benchmark.match == "number" else "qa"
    right = metrics.primary_scores(task, answers, targets)
    return BenchmarkScore.of(
        benchmark.name, metrics.primary_metric(task), right, seed, others={"cut_off": cut_off / len(answers)}
    )


def _foresee(generator: Generator, benchmark: Benchmark, seed: int, progress: ProgressSink) -> BenchmarkScore:
    asked = [(conversation(one, benchmark.solved), one.answer) for one in benchmark.questions]
    nats = _likelihoods(generator, asked, benchmark.name, progress)
    lengths = np.array([len(one.answer.encode()) for one in benchmark.questions])
    bits = -nats / math.log(2) / lengths
    whole = float(-nats.sum() / math.log(2) / lengths.sum())
    return BenchmarkScore.of(
        benchmark.name,
        METRICS["perplexity"],
        bits,
        seed,
        higher_is_better=False,
        others={"bits_per_byte_of_all": whole, "byte_perplexity": 2**whole},
    )


def _likelihoods(
    generator: Generator, asked: Sequence[tuple[tuple[Message, ...], str]], name: str, progress: ProgressSink
) -> NDArray[np.float64]:
    """Log-probability of each answer, nats."""
    found: list[float] = []
    try:
        for start in range(0, len(asked), BATCH):
            found += [score.logprob for score in generator.score(asked[start : start + BATCH])]
            progress(Progress(name, len(found), len(asked)))
    except NotImplementedError as error:
        raise ModelError(
            f"The benchmark {name} asks how likely given answers are, which this model's engine does not tell: {error}",
            remedy="Ask the form as trained, or a benchmark of kind: text.",
        ) from error
    return np.array(found)
