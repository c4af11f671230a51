"""The part of a recipe, and words that several parts share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Task = Literal["classification", "nli", "conversation", "qa", "math", "summarization", "extraction", "generation"]
Precision = Literal["fp32", "fp16", "int8", "int4"]
CLOSED_TASKS: frozenset[str] = frozenset({"classification", "nli"})
"""Tasks whose answer is one of a fixed set of labels: one forward pass, no decoding."""


class Section(BaseModel):
    """A part of the recipe: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
