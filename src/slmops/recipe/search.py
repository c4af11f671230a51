"""``search``: which keys are tried with which values, and for how long."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from slmops.recipe.section import Section


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
