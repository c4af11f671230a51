"""Templates over columns: ``"Premise: {premise}\\nHypothesis: {hypothesis}"``.

``{name}`` is a column, ``{a.b}`` a key inside a nested value (a column that is itself called ``a.b`` wins),
``{name|other}`` says what to write where the value is missing or empty; ``{{`` and ``}}`` are literal braces.
Guarantees: a rendered template never holds a missing value, and equal values render equally. Not covered: expressions,
loops, formats.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slmops.errors import RecipeError

ABSENT = object()
"""What :func:`lookup` answers where there is no such column (a column that holds null answers None)."""


class MissingValueError(Exception):
    """A row lacks a value that the template needs. The message is the reason for the quarantine."""


@dataclass(frozen=True)
class Slot:
    name: str
    fallback: str | None = None


@dataclass(frozen=True)
class Template:
    """A parsed template: literal text and slots, in order."""

    source: str
    parts: tuple[str | Slot, ...]

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that must be there, each once, in order of first use."""
        return tuple(dict.fromkeys(part.name for part in self.parts if isinstance(part, Slot)))

    def render(self, values: Mapping[str, Any]) -> str:
        """The template with the row's values.

        Raises:
            MissingValueError: a value is missing, null or blank, and has no fallback.
        """
        return "".join(part if isinstance(part, str) else _fill(part, values) for part in self.parts)


def parse_template(source: str, *, key: str = "data.input") -> Template:
    """Parse ``source``; ``key`` is the recipe's key, for the message.

    Raises:
        RecipeError: a brace without its partner, or an empty pair.
    """
    parts: list[str | Slot] = []
    literal = ""
    position = 0
    while position < len(source):
        pair, character = source[position : position + 2], source[position]
        if pair in {"{{", "}}"}:
            literal += character
            position += 2
        elif character == "{":
            end = source.find("}", position)
            name, separator, fallback = source[position + 1 : end].partition("|")
            if end < 0 or not name.strip() or "{" in name:
                raise _brace_error(source, position, key)
            if literal:
                parts.append(literal)
                literal = ""
            parts.append(Slot(name.strip(), fallback if separator else None))
            position = end + 1
        elif character == "}":
            raise _brace_error(source, position, key)
        else:
            literal += character
            position += 1
    if literal:
        parts.append(literal)
    return Template(source, tuple(parts))


def lookup(values: Mapping[str, Any], name: str) -> Any:
    """The value of a column or of a dotted path into it; :data:`ABSENT` where there is none."""
    if name in values:
        return values[name]
    found: Any = values
    for step in name.split("."):
        if not isinstance(found, Mapping) or step not in found:
            return ABSENT
        found = found[step]
    return found


def to_text(value: Any) -> str | None:
    """A value as text, or None where it says nothing (null, NaN, blank).

    JSON's ``true`` is ``"true"``; lists and objects become compact JSON; text stays as it is.
    """
    if value is None or value is ABSENT:
        return None
    if isinstance(value, str):
        return value if value.strip() else None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return None if math.isnan(value) else json.dumps(value)
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, separators=(", ", ": "), default=str)
    return str(value)


def _fill(slot: Slot, values: Mapping[str, Any]) -> str:
    value = lookup(values, slot.name)
    if isinstance(value, bytes):
        raise MissingValueError(f"column {slot.name} holds binary data")
    text = to_text(value)
    if text is not None:
        return text
    if slot.fallback is not None:
        return slot.fallback
    raise MissingValueError(f"column {slot.name} is {'missing' if value is ABSENT else 'empty'}")


def _brace_error(source: str, position: int, key: str) -> RecipeError:
    return RecipeError(
        f"{key} is {source!r}: the brace at character {position + 1} names no column.",
        remedy="Write {column}; double a brace that is meant as it is: {{ or }}.",
    )
