"""Public tasks as lm-evaluation-harness (lm-eval, extra ``benchmarks``) defines them, asked of our generators.

The harness brings the tasks: their data, prompts, solved examples, filters and metrics. Our side of it is a language
model of its kind that speaks messages: the chat history goes through the harness as JSON and comes out as messages
again, so that the model is asked as it is served, in whatever engine.

Guarantees: no telemetry, and no code fetched from a hub; ``offline`` keeps the hub away from the data, too. A task file
of a user's own may name Python functions beside it, which are run. Not covered: tasks that score raw text
(``loglikelihood``, ``loglikelihood_rolling``), which no chat model is served as.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from slmops.artifacts import Message
from slmops.errors import DataError, MissingExtraError, ModelError, RecipeError
from slmops.evaluate.benchmarks import BATCH, Benchmark, BenchmarkScore
from slmops.progress import Progress, ProgressSink, ignore
from slmops.runtime import GenerationRequest, Generator

EXTRA = "benchmarks"
KEY = "evaluate.benchmarks"
ASKED = frozenset({"multiple_choice", "generate_until"})
"""Kinds of request that can be asked through a chat template."""
MOST_NEW_TOKENS = 256
"""Where a task does not say."""

log = logging.getLogger(__name__)


def check_harness() -> None:
    """Raises :class:`MissingExtraError` where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise MissingExtraError(f"{KEY}: a task of lm-evaluation-harness", EXTRA)


def check_task(name: str) -> None:
    """Whether the harness has such a task, or the file is there; reads no data.

    Raises:
        MissingExtraError: lm-eval is not installed.
        RecipeError: there is no such task or file.
    """
    check_harness()
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise RecipeError(f"{KEY} names {name}, which is not there.", remedy="Put the file beside the recipe.")
        return
    if name not in _manager().all_tasks:
        import difflib

        near = ", ".join(difflib.get_close_matches(name, _manager().all_tasks, n=3))
        raise RecipeError(
            f"{KEY} names {name}, which lm-evaluation-harness has not.",
            remedy=f"Near it: {near}." if near else "Its names: python -m lm_eval ls tasks",
        )


def run_task(
    generator: Generator, benchmark: Benchmark, *, seed: int, offline: bool, progress: ProgressSink = ignore
) -> BenchmarkScore:
    """Ask one task (of a group, all of its tasks).

    Raises:
        MissingExtraError, RecipeError: as :func:`check_task`.
        RecipeError: a task that scores raw text, or whose own metric gives no number a question.
        DataError: its data cannot be had.
    """
    assert benchmark.task is not None
    check_task(benchmark.task)
    with _kept_here(offline=offline), _without_bars():
        from lm_eval.evaluator import evaluate

        tasks = _load(benchmark, seed)
        model = _asked_model(generator, benchmark.name, progress)
        found = evaluate(
            lm=model,
            task_dict=tasks,
            limit=benchmark.rows,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
        )
    return _score(benchmark, tasks["tasks"], found, seed)


@cache
def _manager() -> Any:
    """Of all tasks that the harness has; it reads thousands of files for that."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _load(benchmark: Benchmark, seed: int) -> Any:
    from lm_eval.tasks import TaskManager

    name = str(benchmark.task)
    own = name.endswith((".yaml", ".yml"))
    try:
        tasks = TaskManager(include_defaults=False).load(name) if own else _manager().load(name)
    except (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError) as error:
        raise DataError(
            f"The benchmark {benchmark.name} cannot be read: {type(error).__name__}: {error}.",
            remedy="Check its file, or have its data in the hub's cache on this machine; offline nothing is fetched.",
        ) from error
    for task_name, task in tasks["tasks"].items():
        if task.OUTPUT_TYPE not in ASKED:
            raise RecipeError(
                f"{KEY}: {task_name} asks for {task.OUTPUT_TYPE}, which scores text without a chat template.",
                remedy="Take a task with choices or written answers, or rows of your own with kind: perplexity.",
            )
        task.set_config(key="num_fewshot", value=benchmark.shots or task.get_config("num_fewshot") or 0)
        task.set_fewshot_seed(seed=seed)
    return tasks


def _score(benchmark: Benchmark, tasks: dict[str, Any], found: dict[str, Any], seed: int) -> BenchmarkScore:
    """Of the first metric of each task, over the questions of all of them."""
    values: list[float] = []
    named: set[str] = set()
    for name, task in tasks.items():
        metric = str(next(iter(task._metric_fn_list)))
        samples = found["samples"][name]
        first = samples[0]["filter"] if samples else ""
        for sample in (one for one in samples if one["filter"] == first):
            value = sample.get(metric)
            if not isinstance(value, int | float | np.number):
                raise RecipeError(
                    f"{KEY}: {name} gives no {metric} for a single question.", remedy="Take another task."
                )
            values.append(float(value))
        named.add(metric)
    higher = all(next(iter(task.higher_is_better().values()), True) for task in tasks.values())
    others = {
        metric.partition(",")[0]: float(value)
        for name in tasks
        for metric, value in found["results"][name].items()
        if len(tasks) == 1 and isinstance(value, int | float) and "_stderr" not in metric and "," in metric
    }
    metric = named.pop() if len(named) == 1 else "score"
    others.pop(metric, None)
    return BenchmarkScore.of(
        benchmark.name, metric, np.array(values), seed, higher_is_better=bool(higher), others=others
    )


def _asked_model(generator: Generator, name: str, progress: ProgressSink) -> Any:
    """Our generator as a model of the harness."""
    from lm_eval.api.model import LM

    class Asked(LM):  # type: ignore[misc]
        @property
        def tokenizer_name(self) -> str:
            return "slmops"

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "slmops"

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return json.dumps([{"role": one["role"], "content": one["content"]} for one in chat_history])

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asked = [(messages_of(context), answer.strip()) for context, answer in (one.args for one in requests)]
            found: list[tuple[float, bool]] = []
            try:
                for start in range(0, len(asked), BATCH):
                    # Only tasks with choices come here, and they do not look at whether it is the greedy answer.
                    found += [(one.logprob, False) for one in generator.score(asked[start : start + BATCH])]
                    progress(Progress(name, len(found), len(asked)))
            except NotImplementedError as error:
                raise ModelError(
                    f"The benchmark {name} asks how likely given answers are, which this model's engine does not tell: "
                    f"{error}",
                    remedy="Ask the form as trained, or a task of written answers.",
                ) from error
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            raise NotImplementedError("raw text is not scored")

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            asked = [request_of(*one.args) for one in requests]
            found: list[str] = []
            for start in range(0, len(asked), BATCH):
                found += [answer.text for answer in generator.generate(asked[start : start + BATCH])]
                progress(Progress(name, len(found), len(asked)))
            return found

    return Asked()


def messages_of(context: str) -> tuple[Message, ...]:
    """The chat that :meth:`apply_chat_template` wrote."""
    return tuple(Message(one["role"], one["content"]) for one in json.loads(context))


def request_of(context: str, settings: dict[str, Any]) -> GenerationRequest:
    """A request with the limits and stop texts that the task asks for."""
    stops = settings.get("until") or []
    tokens = settings.get("max_gen_toks") or settings.get("max_new_tokens") or MOST_NEW_TOKENS
    sampled = bool(settings.get("do_sample")) and float(settings.get("temperature") or 0) > 0
    return GenerationRequest(
        messages_of(context),
        max_tokens=int(tokens),
        temperature=float(settings["temperature"]) if sampled else 0.0,
        seed=0,
        stop=tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop),
    )


@contextlib.contextmanager
def _kept_here(*, offline: bool) -> Iterator[None]:
    """No telemetry, no metrics fetched as code; ``offline``: no hub at all, while this lasts."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
    os.environ["HF_EVALUATE_OFFLINE"] = "1"
    import datasets
    from huggingface_hub import constants

    places = ((datasets.config, "HF_HUB_OFFLINE"), (constants, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        for module, name in places if offline else ():
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """The harness draws bars and warns of its defaults; progress is ours to show."""
    import datasets
    from lm_eval.api import task

    drawn, level = task.tqdm, logging.getLogger("lm_eval").level
    shown = datasets.is_progress_bar_enabled()
    task.tqdm = lambda items, **_: items
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        task.tqdm = drawn
        logging.getLogger("lm_eval").setLevel(level)
        if shown:
            datasets.enable_progress_bars()
