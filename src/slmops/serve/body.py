"""What every body that a caller sends has in common.

A parameter that has no effect here is refused by name, never ignored; its neutral value (``echo: false``, null) is
taken, because clients send those without meaning anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"],),
    "store": (False,),
    "background": (False,),
    "truncation": ("disabled",),
    "service_tier": ("auto", "default"),
}
"""Values that ask for nothing beyond what the server does anyway."""


OF_A_FIELD = "of_a_field"


def wrong(field: str, said: str) -> PydanticCustomError:
    """The error of a check of several fields that is about one of them, named ``field``."""
    return PydanticCustomError(OF_A_FIELD, "{said}", {"said": said, "field": field})


class Body(BaseModel):
    """Null and neutral values count as absent; unknown names are errors; types are exact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {name: value for name, value in raw.items() if value is not None and not _is_neutral(name, value)}


def _is_neutral(name: str, value: Any) -> bool:
    # type() as well: in Python True == 1, and "n": true is a mistake.
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL.get(name, ())
    )
