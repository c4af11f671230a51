"""The search for the smallest student that passes: shapes and efforts, each in every variant, under a budget.

Candidates whose layers alone are too large are never trained; the others are trained a little, exported, scored on
validation rows and measured; those that could still be worth it are trained longer (:mod:`slmops.compress.fit`). Every
training, export, score and measurement is a stage of its own, so a search that was stopped goes on where it was, and
the run that follows finds the chosen student done. The test rows are not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slmops.artifacts import Checkpoint, Dataset
from slmops.compress.fit import (
    Point,
    bytes_at_least,
    candidates,
    efforts,
    fewest_bits,
    fronts,
    layer_parameters,
    promoted,
    seats,
    with_effort,
)
from slmops.errors import ModelError, RecipeError
from slmops.evaluate.choose import Candidate, choose, gates_of
from slmops.evaluate.gates import MB, Gate
from slmops.evaluate.scores import Scores
from slmops.evaluate.significance import compare
from slmops.models import model_facts
from slmops.pipeline.context import Context
from slmops.pipeline.prove import as_trained, estimate_variants, measure_variants, score_variant, student_variants
from slmops.pipeline.prune import make_learnt
from slmops.pipeline.search import Found
from slmops.pipeline.teach import ask_for_answers
from slmops.progress import Progress, ProgressSink
from slmops.recipe import Recipe, SearchConfig, with_values

NAME = "search"
VALIDATION = "validation"


@dataclass
class _Trial:
    """One set of values. ``judged``: its variants by name, at the most effort so far."""

    number: int
    values: Mapping[str, Any]
    recipe: Recipe
    rung: int = -1
    epochs: float = 0.0
    judged: dict[str, tuple[Candidate, list[Gate]]] = field(default_factory=dict)
    why: str = ""

    def id_of(self, variant: str) -> str:
        return f"{self.number}-{variant}"


def find_smallest(context: Context, data: Dataset, answers: Dataset, teacher: Checkpoint | None) -> Found:
    """Do the search of ``recipe.search`` (its goal is the budget), and choose.

    Raises:
        RecipeError: there is no local teacher to be compared with.
        ModelError: no candidate came so far that it could be measured.
    """
    if teacher is None:
        raise RecipeError(
            "search.goal is budget, which needs a teacher on this machine: the students are compared with it on the "
            "validation rows.",
            remedy="Set search.goal: loss, or let a local model teach.",
        )
    return _Search(context, data, answers, teacher).run()


class _Search:
    def __init__(self, context: Context, data: Dataset, answers: Dataset, teacher: Checkpoint) -> None:
        assert context.recipe.search is not None
        self.context, self.data, self.answers, self.teacher = context, data, answers, teacher
        self.config: SearchConfig = context.recipe.search
        self.bits = fewest_bits(context.recipe.compress)
        self.started_s = time.monotonic()
        self.reused = True
        self.timed_out = False
        self.trainings = 0
        found = candidates(self.config.space, self.config.trials, context.recipe.seed)
        self.trials = [
            _Trial(number, values, with_values(context.recipe, values)) for number, values in enumerate(found)
        ]

    def run(self) -> Found:
        recipe = self.context.recipe
        variant = as_trained(self.context, "teacher", self.teacher)
        self.reference = score_variant(
            self.context, "teacher", variant, self.data, split=VALIDATION, most_rows=self.config.rows
        )
        going = [trial for trial in self.trials if self._possible(trial)]
        self.expected = sum(seats(len(going), self.config.rungs)) if going else 0
        for rung, (effort, places) in enumerate(
            zip(efforts(self.config.rungs), seats(len(going), self.config.rungs), strict=True)
        ):
            going = self._best(going, places) if rung else going
            for trial in going:
                if self._late():
                    break
                self._train(trial, rung, effort)
            going = [trial for trial in going if trial.rung == rung]
            if self.timed_out or not going:
                break
        judged = [trial for trial in self.trials if trial.judged]
        if not judged:
            raise ModelError(
                "No candidate of the search came so far that it could be measured."
                + (f" The first: {self.trials[0].why}" if self.trials and self.trials[0].why else ""),
                remedy="Widen search.space to smaller students, raise the budget, or raise search.timeout_s.",
            )
        furthest = max(trial.rung for trial in judged)
        finalists = [pair for trial in judged if trial.rung == furthest for pair in trial.judged.values()]
        chosen, gates = choose(finalists)
        best = next(trial for trial in judged if any(pair[0].id == chosen.id for pair in trial.judged.values()))
        summary = self._summary(best, chosen, gates)
        return Found(with_values(recipe, best.values), summary, self.reused, time.monotonic() - self.started_s)

    # --- one candidate ------------------------------------------------------------------------------------------

    def _possible(self, trial: _Trial) -> bool:
        """Whether the layers alone would fit, before anything is trained."""
        limit = trial.recipe.budget.with_device().size_mb
        least = self._bytes_at_least(trial.recipe)
        if limit is None or least <= limit * MB:
            return True
        trial.why = f"its layers alone take {least / MB:.3g} MB (estimated), and the budget is {limit:g} MB"
        return False

    def _bytes_at_least(self, recipe: Recipe) -> int:
        if recipe.student.model is not None or recipe.compress.prune is not None:
            return 0
        facts = model_facts(self.context.base.path)
        if recipe.closed:
            from slmops.train.classifier.student import student_shape

            shape = student_shape(recipe.student)
            hidden, inner = shape.hidden_size, shape.intermediate_size
            return bytes_at_least(shape.layers, layer_parameters(hidden, inner, hidden, hidden), self.bits)
        from slmops.train.generator.student import LAYERS

        each = layer_parameters(facts.hidden_size, facts.intermediate_size, facts.attention_size, facts.key_value_size)
        return bytes_at_least(recipe.student.layers or LAYERS, each, self.bits)

    def _train(self, trial: _Trial, rung: int, effort: float) -> None:
        """Train at this effort, export, score, measure; a student that cannot be trained is noted and left."""
        epochs = with_effort(trial.recipe.train.epochs or whole_epochs(trial.recipe), effort)
        recipe = trial.recipe
        if effort < 1:
            recipe = with_values(recipe, {"train.epochs": epochs, **_shorter_recovery(recipe, effort)})
        context = replace(
            self.context, recipe=recipe, progress=_within(self.context.progress, trial.number), wall_s={}, reused=True
        )
        self.trainings += 1
        try:
            same = recipe.distill.transfer_rows == self.context.recipe.distill.transfer_rows
            answers = self.answers if same else ask_for_answers(context, self.data, self.teacher)
            _, student = make_learnt(context, self.data, answers, self.teacher)
            trial.judged = self._judge(context, trial, student, answers)
        except ModelError as error:
            trial.why = str(error)
            return
        finally:
            self.reused &= context.reused
            self.context.progress(
                Progress(NAME, self.trainings, max(self.expected, self.trainings), "students", self._so_far())
            )
        trial.rung, trial.epochs = rung, epochs

    def _judge(
        self, context: Context, trial: _Trial, student: Checkpoint, answers: Dataset
    ) -> dict[str, tuple[Candidate, list[Gate]]]:
        variants = student_variants(context, student, answers)
        named = {trial.id_of(name): variant for name, variant in variants.items()}
        measured = measure_variants(context, named, self.data)
        estimates = estimate_variants(context, named, measured)
        judged: dict[str, tuple[Candidate, list[Gate]]] = {}
        for name, variant in variants.items():
            number = trial.id_of(name)
            scores = score_variant(
                context, f"student-{name}", variant, self.data, split=VALIDATION, most_rows=self.config.rows
            )
            candidate = Candidate(number, variant.model_bytes, scores, measured[number], estimates.get(number))
            way = [candidate]
            if name != "fp32" and "fp32" in judged:
                way.insert(0, judged["fp32"][0])
            recipe = context.recipe
            judged[name] = candidate, gates_of(way, self.reference, recipe.gates, recipe.budget, recipe.seed)
        return judged

    # --- among candidates ---------------------------------------------------------------------------------------

    def _best(self, trials: Sequence[_Trial], places: int) -> list[_Trial]:
        points = [_point(candidate) for trial in trials for candidate, _ in trial.judged.values()]
        fitting = [
            candidate.id
            for trial in trials
            for candidate, gates in trial.judged.values()
            if all(gate.passed for gate in gates if gate.name in BUDGET_GATES)
        ]
        owner = {trial.id_of(name): trial for trial in trials for name in trial.judged}
        kept: list[_Trial] = []
        for count in range(1, len(points) + 1):
            kept = list({id(owner[name]): owner[name] for name in promoted(points, fitting, count)}.values())
            if len(kept) >= places:
                break
        return sorted(kept[:places], key=lambda trial: trial.number)

    def _late(self) -> bool:
        limit = self.config.timeout_s
        self.timed_out |= limit is not None and time.monotonic() - self.started_s > limit
        return self.timed_out

    def _so_far(self) -> str:
        passing = [
            candidate
            for trial in self.trials
            for candidate, gates in trial.judged.values()
            if all(gate.passed for gate in gates)
        ]
        if not passing:
            return "none passes yet"
        best = min(passing, key=lambda candidate: candidate.cost)
        return f"{best.size_bytes / MB:.3g} MB pass"

    def _summary(self, best: _Trial, chosen: Candidate, gates: Sequence[Gate]) -> dict[str, Any]:
        judged = [
            (trial, name, candidate, own) for trial in self.trials for name, (candidate, own) in trial.judged.items()
        ]
        front = {point.id for point in fronts([_point(candidate) for _, _, candidate, _ in judged])[0]}
        leader = max((candidate for _, _, candidate, _ in judged), key=lambda one: (one.scores.value, -one.size_bytes))
        return {
            "goal": "budget",
            "values": dict(best.values),
            "chosen": chosen.id,
            "passed": all(gate.passed for gate in gates),
            "leader": leader.id,
            "metric": chosen.scores.metric,
            "teacher": self.reference.summary(),
            "rungs": self.config.rungs,
            "timed_out": self.timed_out,
            "candidates": [
                _told(trial, name, candidate, own, front, leader.scores, self.context.recipe.seed)
                for trial, name, candidate, own in judged
            ],
            "left_out": [
                {"number": trial.number, "values": dict(trial.values), "why": trial.why or "the time was up"}
                for trial in self.trials
                if not trial.judged
            ],
        }


BUDGET_GATES = frozenset({"size_mb", "memory_mb", "latency_ms_p95", "tokens_per_s"})
"""Names of gates that training longer does not change."""


def whole_epochs(recipe: Recipe) -> float:
    """What a student of this recipe is trained for where the recipe does not say."""
    if not recipe.closed:
        from slmops.train.generator.student import EPOCHS as OPEN_EPOCHS

        return OPEN_EPOCHS
    from slmops.train.classifier.student import EPOCHS, NAMED_EPOCHS

    return EPOCHS if recipe.student.model is None else NAMED_EPOCHS


def _shorter_recovery(recipe: Recipe, effort: float) -> dict[str, float]:
    prune = recipe.compress.prune
    if prune is None or prune.recover is None:
        return {}
    from slmops.train.classifier.student import RECOVERY_EPOCHS
    from slmops.train.generator.recover import EPOCHS as OPEN_RECOVERY_EPOCHS

    whole = prune.recover.epochs or (RECOVERY_EPOCHS if recipe.closed else OPEN_RECOVERY_EPOCHS)
    return {"compress.prune.recover.epochs": with_effort(whole, effort)}


def _point(candidate: Candidate) -> Point:
    measured = candidate.measurement
    # To two digits: what was measured a moment apart differs in the third.
    noisy = (float(f"{value:.2g}") for value in (measured.latency_ms["p50"], measured.memory_bytes_peak))
    return Point(candidate.id, candidate.scores.value, (float(candidate.size_bytes), *noisy))


def _told(
    trial: _Trial,
    variant: str,
    candidate: Candidate,
    gates: Sequence[Gate],
    front: set[str],
    leader: Scores,
    seed: int,
) -> dict[str, Any]:
    test = compare(leader.per_row, candidate.scores.per_row, seed=seed)
    return {
        "id": candidate.id,
        "number": trial.number,
        "values": dict(trial.values),
        "variant": variant,
        "rung": trial.rung,
        "epochs": trial.epochs,
        "score": candidate.scores.summary(),
        "size_bytes": candidate.size_bytes,
        "memory_bytes_peak": candidate.measurement.memory_bytes_peak,
        "latency_ms": candidate.measurement.latency_ms,
        "failed_gates": [gate.name for gate in gates if not gate.passed],
        "front": candidate.id in front,
        "behind_leader": test.to_json(),
        "within_noise_of_leader": not test.significant,
    }


def _within(progress: ProgressSink, number: int) -> ProgressSink:
    def sink(event: Progress) -> None:
        progress(replace(event, task=f"{event.task} {number}"))

    return sink


def finalists(summary: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The candidates of a summary that got the most effort."""
    furthest = max(one["rung"] for one in summary["candidates"])
    yield from (one for one in summary["candidates"] if one["rung"] == furthest)
