"""What is wrong with a recipe, in words, and on which line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from slmops.recipe.search import Range
from slmops.recipe.whole import Recipe

Location = tuple[str | int, ...]
TAGS = frozenset({"range", "choices"})
"""What pydantic puts into a location to say which of several types it tried."""
TEMPLATES: frozenset[Location] = frozenset({("data", "input"), ("data", "target"), ("data", "text")})
"""Texts that start with a brace, which YAML takes for a mapping where they are not quoted."""


def in_words(problem: Mapping[str, Any], location: Location) -> str:
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


def remedy_for(problem: Mapping[str, Any], location: Location) -> str | None:
    if problem["type"] == "extra_forbidden":
        section = Range if "range" in problem["loc"] else _section_at(location[:-1])
        known = [field.alias or name for name, field in section.model_fields.items()]
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"Did you mean {near[0]}?" if near else f"Known keys here: {', '.join(known)}."
    if problem["type"] == "string_type" and location in TEMPLATES and isinstance(problem["input"], dict):
        return f'Put it in quotes, for example {location[-1]}: "{{text}}".'
    return None


def _section_at(location: Location) -> type[BaseModel]:
    section: type[BaseModel] = Recipe
    for name in location:
        for field_name, field in section.model_fields.items():
            if (field.alias or field_name) != name:
                continue
            for kind in (field.annotation, *get_args(field.annotation)):  # a section, or one or None
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    section = kind
    return section


def line_of(location: Location, lines: Mapping[Location, int]) -> int | None:
    """The line of a key, or of the closest section around it."""
    for end in range(len(location), -1, -1):
        if location[:end] in lines:
            return lines[location[:end]]
    return None


def line_numbers(node: yaml.Node | None, location: Location = ()) -> dict[Location, int]:
    lines: dict[Location, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*location, key.value)
            lines[below] = key.start_mark.line + 1
            lines.update(line_numbers(value, below))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*location, index)] = value.start_mark.line + 1
            lines.update(line_numbers(value, (*location, index)))
    return lines
