"""The search for the student's values: every trial is the student's own stage, with the recipe that it would have.

So the best trial's student is found done when the run goes on with it, a trial that was killed goes on from its
checkpoint, and two trials with the same values cost one. Students of beaten trials are deleted again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from slmops.artifacts import Checkpoint, Dataset
from slmops.errors import ModelError, RecipeError
from slmops.pipeline.context import Context
from slmops.pipeline.teach import ask_for_answers, make_student, make_teacher, prepare_data
from slmops.progress import Progress, ProgressSink
from slmops.recipe import Recipe, SearchConfig, recipe_json, with_values
from slmops.store import code_version
from slmops.trust import digest_json

if TYPE_CHECKING:
    from optuna import Study

    from slmops.train.search import Evaluated, Observe, SearchPlace

NAME = "search"
POLL_S = 0.5
HOW = {"trials", "timeout_s", "processes"}
"""What may change between two calls that go on with the same search."""


@dataclass(frozen=True)
class Found:
    """``recipe``: the best trial's, without a search. ``summary``: see :func:`slmops.train.search.summarize`."""

    recipe: Recipe
    summary: Mapping[str, Any]
    reused: bool
    wall_s: float


def find_best(context: Context, data: Dataset, answers: Dataset, teacher: Checkpoint | None) -> Found:
    """Do the trials of ``recipe.search`` that are not done yet, and choose.

    Raises:
        MissingExtraError: optuna is not installed.
        RecipeError: another process is at this search.
        ModelError: no trial came to its end, or a worker process broke.
    """
    from slmops.train.search import finished_trials, open_search, run_trials, summarize, take_up, wall_seconds

    config = _config(context.recipe)
    place = search_place(context, answers)
    lock = FileLock(context.store.root / "locks" / f"{place.study}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(
            f"Another process is at the search of {context.recipe.name}.", remedy="Wait for it, then run again."
        ) from None
    try:
        study = open_search(place, config)
        take_up(study)
        before = finished_trials(study)
        deadline_s = None if config.timeout_s is None else time.time() + config.timeout_s
        if before < config.trials:
            if config.processes == 1:
                evaluate = trial_of(context, data, answers, teacher)
                run_trials(
                    study,
                    place,
                    config,
                    evaluate,
                    deadline_s=deadline_s,
                    on_trial=lambda: _after(context, study, config),
                )
            else:
                _run_workers(context, study, config, deadline_s)
        summary = summarize(study, config)
        reused = finished_trials(study) == before
        if reused:
            context.progress(Progress(NAME, before, before, "trials", "done before"))
        return Found(with_values(context.recipe, summary["values"]), summary, reused, wall_seconds(study))
    finally:
        lock.release()


def search_place(context: Context, answers: Dataset) -> SearchPlace:
    """One study for each thing that could change what a trial gives."""
    from slmops.train.search import SearchPlace

    recipe = context.recipe
    raw = recipe_json(recipe)
    search = {key: value for key, value in raw["search"].items() if key not in HOW}
    model = context.named_student or context.base
    key = digest_json(
        {
            "answers": answers.digest,
            "model": model.digest,
            "search": search,
            "recipe": {section: raw[section] for section in ("student", "distill", "train")},
            "code": code_version(f"slmops.train.{context.form}.student", "slmops.train.search"),
        }
    )
    name = f"{NAME}-{key[:16]}"
    return SearchPlace(context.store.root / "searches" / f"{name}.db", name, recipe.seed)


def trial_of(
    context: Context, data: Dataset, answers: Dataset, teacher: Checkpoint | None
) -> Callable[[Mapping[str, Any], Observe], Evaluated]:
    """What one trial does: train the student of the recipe with these values; its validation loss."""
    from slmops.train.search import Evaluated

    def evaluate(values: Mapping[str, Any], observe: Observe) -> Evaluated:
        recipe = with_values(context.recipe, values)
        trial = replace(context, recipe=recipe, progress=_observed(context.progress, observe), wall_s={}, reused=True)
        same_answers = recipe.distill.transfer_rows == context.recipe.distill.transfer_rows
        used = answers if same_answers else ask_for_answers(trial, data, teacher)
        trial.reused = True
        student = make_student(trial, "student", used, taught=True, teacher=teacher, data=data)
        return Evaluated(validation_loss(student, recipe), None if trial.reused else student.path)

    return evaluate


def validation_loss(student: Checkpoint, recipe: Recipe) -> float:
    """Of the weights that were kept: the best ones where training looked for them, else the last.

    Raises:
        ModelError: it was never validated.
    """
    history = json.loads((student.path / "history.json").read_text("utf-8"))
    losses = [point["validation_loss"] for point in history if point.get("validation_loss") is not None]
    if not losses:
        raise ModelError("The student was trained without a validation loss to compare by.")
    return float(min(losses) if recipe.train.patience is not None else losses[-1])


def _observed(progress: ProgressSink, observe: Observe) -> ProgressSink:
    def sink(event: Progress) -> None:
        progress(event)
        loss = event.figures.get("validation_loss")
        if loss is not None and event.total:
            observe(event.done / event.total, loss)

    return sink


def _after(context: Context, study: Study, config: SearchConfig) -> None:
    from slmops.train.search import beaten_places, finished_trials

    for path in beaten_places(study):
        if path.is_relative_to(context.store.root):
            shutil.rmtree(path, ignore_errors=True)
    done = finished_trials(study)
    context.progress(Progress(NAME, done, config.trials, "trials", _best_so_far(study)))


def _best_so_far(study: Study) -> str:
    try:
        return f"best loss {study.best_value:.3f}"
    except ValueError:
        return ""


# --- several processes ------------------------------------------------------------------------------------------


def _run_workers(context: Context, study: Study, config: SearchConfig, deadline_s: float | None) -> None:
    """Children of this process that share the study; it only looks on.

    Raises:
        ModelError: one of them ended without having finished.
    """
    request = {
        "recipe": recipe_json(context.recipe),
        "store": str(context.store.root),
        "offline": context.offline,
        "deadline_s": deadline_s,
    }
    threads = str(max(1, (os.cpu_count() or 1) // config.processes))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "request.json"
        file.write_text(json.dumps(request), "utf-8")
        logs = [Path(folder) / f"{number}.log" for number in range(config.processes)]
        workers = []
        try:
            for log in logs:
                with log.open("wb") as output:
                    workers.append(
                        subprocess.Popen(
                            [sys.executable, "-P", "-m", "slmops.pipeline.search_child", str(file)],
                            stdin=subprocess.PIPE,  # closes when this process ends, however it ends
                            stdout=output,
                            stderr=subprocess.STDOUT,
                            env={"OMP_NUM_THREADS": threads, **os.environ},
                        )
                    )
            told = -1
            while any(worker.poll() is None for worker in workers):
                if any(worker.returncode for worker in workers):
                    break
                time.sleep(POLL_S)
                from slmops.train.search import finished_trials

                if (done := finished_trials(study)) != told:
                    told = done
                    context.progress(Progress(NAME, done, config.trials, "trials", _best_so_far(study)))
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.terminate()
                worker.wait()
                if worker.stdin:
                    worker.stdin.close()
        for worker, log in zip(workers, logs, strict=True):
            if worker.returncode > 0 or (worker.returncode < 0 and not any(w.returncode > 0 for w in workers)):
                raise ModelError(
                    f"A worker process of the search ended with code {worker.returncode}: {_last_line(log)}",
                    remedy="Run again to go on, with search.processes: 1 to see more.",
                )


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def work(request: Mapping[str, Any], context: Context) -> None:
    """What a worker process does: the stages before are found done, then trials until there are enough."""
    from slmops.train.search import open_search, run_trials

    config = _config(context.recipe)
    data = prepare_data(context)
    teacher = make_teacher(context, data)
    answers = ask_for_answers(context, data, teacher)
    place = search_place(context, answers)
    study = open_search(place, config)
    run_trials(
        study,
        place,
        config,
        trial_of(context, data, answers, teacher),
        deadline_s=request["deadline_s"],
        on_trial=lambda: _after(context, study, config),
    )


def _config(recipe: Recipe) -> SearchConfig:
    if recipe.search is None:
        raise RecipeError("The recipe has no search.", remedy="Give it search.space.")
    return recipe.search
