"""``response_format``: what an answer has to look like, checked before a model is asked.

A schema is refused by name where it is no schema, where it is recursive (a small model rarely ends such an answer),
where it points elsewhere, where it is too large, and where it says what cannot be kept to token by token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import Field, model_validator

from slmops.runtime import Constraint
from slmops.runtime.constraint import ConstraintError, check_constraint
from slmops.serve.body import Body
from slmops.serve.errors import ApiError

MAX_SCHEMA_BYTES = 100_000
MAX_SCHEMA_DEPTH = 100  # brackets within brackets
MAX_PROPERTIES = 1000
MAX_REFERENCES = 500  # different ones
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class NamedSchema(Body):
    """``strict`` is taken either way: an answer always keeps to its schema."""

    name: Name
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The form of ``chat.completions``: ``{"type": "json_schema", "json_schema": {"name": ..., "schema": {...}}}``."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _wrapped(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("type") == "json_schema":
            inner = raw.get("json_schema")
            if inner is None or (isinstance(inner, dict) and "schema" not in inner):
                raise ValueError(WRAPPED)
        elif isinstance(raw, dict) and raw.get("type") not in ("text", "json_object"):
            raise ValueError(
                f"its type is 'text', 'json_object' or 'json_schema'; a plain schema is not known: {WRAPPED}"
            )
        return raw

    @model_validator(mode="after")
    def _only_with_its_type(self) -> ResponseFormat:
        if self.json_schema is not None and self.type != "json_schema":
            raise ValueError(f"json_schema is only for the type 'json_schema', not for {self.type!r}")
        return self

    @property
    def schema_wanted(self) -> Mapping[str, Any] | None:
        return wanted(self.type, self.json_schema.schema_ if self.json_schema else None)


WRAPPED = 'wrap the schema: {"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}'


class TextFormat(Body):
    """The form of ``responses``: as :class:`ResponseFormat`, with name and schema beside the type."""

    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    description: str | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _whole(self) -> TextFormat:
        if (self.type == "json_schema") != (self.name is not None and self.schema_ is not None):
            raise ValueError('name and schema are for the type "json_schema", which needs both')
        return self

    @property
    def schema_wanted(self) -> Mapping[str, Any] | None:
        return wanted(self.type, self.schema_)


def wanted(kind: str, schema: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The schema that an answer has to keep to, or None where any text will do."""
    return None if kind == "text" else ANY_OBJECT if kind == "json_object" else schema


def json_constraint(schema: Mapping[str, Any], param: str) -> Constraint:
    """The schema as a constraint.

    Raises:
        ApiError: it is refused; ``param`` is where it stood.
    """
    problem = schema_problem(schema)
    constraint = Constraint("json_schema", json.dumps(schema))
    if problem is None:
        try:
            check_constraint(constraint)
        except ConstraintError as error:
            problem = error.message
    if problem is not None:
        raise ApiError(400, f"The schema in '{param}' cannot be kept to: {problem}", param=param, code="invalid_schema")
    return constraint


def schema_problem(schema: Mapping[str, Any]) -> str | None:
    """Why a schema is too large, recursive, or points to what is not there; None where it is none of these. Pure."""
    size_bytes = len(json.dumps(schema))
    if size_bytes > MAX_SCHEMA_BYTES:
        return f"it has {size_bytes:,} bytes, and {MAX_SCHEMA_BYTES:,} is the most."
    depth, properties = _size(schema)
    if depth > MAX_SCHEMA_DEPTH:
        return f"it is {depth} levels deep, and {MAX_SCHEMA_DEPTH} is the most."
    if properties > MAX_PROPERTIES:
        return f"it has {properties:,} properties, and {MAX_PROPERTIES:,} is the most."
    return _reference_problem(schema)


def _size(schema: Mapping[str, Any]) -> tuple[int, int]:
    """Levels, and properties in all of them together."""
    deepest = properties = 0
    below: list[tuple[Any, int]] = [(schema, 1)]
    while below:
        node, level = below.pop()
        deepest = max(deepest, level)
        if isinstance(node, Mapping):
            known = node.get("properties")
            properties += len(known) if isinstance(known, Mapping) else 0
            below += [(child, level + 1) for child in node.values() if isinstance(child, Mapping | list)]
        else:
            below += [(child, level + 1) for child in node if isinstance(child, Mapping | list)]
    return deepest, properties


def _reference_problem(schema: Mapping[str, Any]) -> str | None:
    """Follow every ``$ref``, each once: one that leads back to itself, or nowhere, is told."""
    done: set[str] = set()

    def follow(node: Any, way: tuple[str, ...]) -> str | None:
        for reference in _references(node):
            if not reference.startswith("#"):
                return f"it points to {reference!r}, and only what is inside of it is read."
            if reference in way:
                return f"it is recursive: {reference!r} leads back to itself."
            if reference in done:
                continue
            try:
                target = _at(schema, reference)
            except (KeyError, IndexError, ValueError, TypeError):
                return f"it points to {reference!r}, and there is nothing."
            if len(way) + len(done) >= MAX_REFERENCES:
                return f"it has more than {MAX_REFERENCES} different references."
            if problem := follow(target, (*way, reference)):
                return problem
            done.add(reference)
        return None

    return follow(schema, ())


_DATA = frozenset({"enum", "const", "default", "examples"})
"""Keywords whose values are no schemas."""


def _references(node: Any) -> Iterator[str]:
    """Every ``$ref`` in ``node``."""
    below = [node]
    while below:
        one = below.pop()
        if isinstance(one, Mapping):
            if isinstance(one.get("$ref"), str):
                yield one["$ref"]
            below += [child for key, child in one.items() if key not in _DATA]
        elif isinstance(one, list):
            below += one


def _at(schema: Any, reference: str) -> Any:
    """What a JSON pointer such as ``#/$defs/x`` leads to."""
    if reference != "#" and not reference.startswith("#/"):
        raise KeyError(reference)
    node = schema
    for part in unquote(reference[1:]).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node
