"""Functions that a caller offers: their bodies, what forces a call, and calls read out of a running answer.

Guarantees: with ``tool_choice`` ``required`` or a name, the answer is nothing but calls whose arguments keep to their
schemas, held to it token by token; with ``auto`` the same holds for every call as soon as one function says
``strict``. Without ``strict``, a schema that cannot be kept to in full is replaced by any JSON object. A call that
cannot be read, or names no function of the request, stays text.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from pydantic import field_validator

from slmops.chat import ToolFormat, read_calls
from slmops.runtime import Constraint
from slmops.runtime.constraint import WHITESPACE
from slmops.runtime.stops import overlap
from slmops.serve.body import Body
from slmops.serve.errors import ApiError
from slmops.serve.schema import ANY_OBJECT, Name, json_constraint

MAX_TOOLS = 128


class Function(Body):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"]


def distinct(tools: list[Tool]) -> list[Tool]:
    """Raises :class:`ValueError` where two functions have one name, or there are too many."""
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two functions are named {twice!r}")
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"at most {MAX_TOOLS} functions")
    return tools


class CallName(Body):
    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, arguments: str) -> str:
        try:
            value = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError("a JSON object, as text")
        return arguments or "{}"


class Call(Body):
    """A call in an assistant's turn of the past."""

    id: str
    type: Literal["function"]
    function: CallName


# What an answer has to keep to


def tools_constraint(
    functions: Sequence[Function],
    choice: ToolChoice,
    form: ToolFormat,
    *,
    parallel: bool,
    schema: Mapping[str, Any] | None,
    param: str = "response_format",
) -> Constraint | None:
    """What the answer has to keep to; None where it is free. ``schema``: of an answer that is no call, given as
    ``param``.

    Raises:
        ApiError: a schema is refused.
    """
    if choice == "auto" and schema is None and not any(function.strict for function in functions):
        return None
    checked = [_parameters(function, index) for index, function in enumerate(functions)]
    if schema is not None:
        json_constraint(schema, param)
    return calls_grammar(
        [(function.name, parameters) for function, parameters in zip(functions, checked, strict=True)],
        form,
        parallel=parallel,
        otherwise=None if choice == "required" else "text" if schema is None else schema,
    )


def _parameters(function: Function, index: int) -> Mapping[str, Any]:
    """The schema of the arguments, as far as it can be kept to."""
    if not function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    schema = _closed({"type": "object", **function.parameters})
    try:
        json_constraint(schema, f"tools[{index}].function.parameters")
    except ApiError:
        if function.strict:
            raise
        return ANY_OBJECT
    return schema


def _closed(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without properties that the function does not name, unless it speaks of them: a small model would go on with
    ever more of them."""
    if "properties" not in schema or schema.keys() & _OPEN:
        return schema
    return {**schema, "additionalProperties": False}


_OPEN = frozenset({"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"})


def calls_grammar(
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    form: ToolFormat,
    *,
    parallel: bool,
    otherwise: Mapping[str, Any] | Literal["text"] | None,
) -> Constraint:
    """The grammar of calls as ``form`` writes them; ``otherwise``: what may come in their place. Pure."""
    heads = [f'{{"name": {json.dumps(name)}, "{form.arguments}": ' for name, _ in functions]
    rules = [
        f"call{index}: {_quoted(head)} %json {json.dumps(_spaced(schema))} {_quoted('}')}"
        for index, (head, (_, schema)) in enumerate(zip(heads, functions, strict=True))
    ]
    one = f"call: {' | '.join(f'call{index}' for index in range(len(rules)))}"
    gap = _quoted(form.gap)
    tags: tuple[str, ...] = (form.opener, form.closer) if form.opener else ()
    if not tags:
        body = "body: call"
    elif form.as_list:
        more = f"({_quoted(', ')} call)*" if parallel else ""
        body = f"body: {gap} {_quoted('[')} call {more} {_quoted(']')} {gap} tag1"
    else:
        more = f"({_quoted(chr(10))} tag0 {gap} call {gap} tag1)*" if parallel else ""
        body = f"body: {gap} call {gap} tag1 {more}"
    opened = "tag0 body" if tags else "body"
    match otherwise:
        case None:
            start = [f"start: {opened}"]
        case "text":
            free = "(until0 body)? TEXT" if tags else "body | PLAIN"
            start = [f"start: {free}", *(() if tags else (r"PLAIN: /([^{\s](.|\n)*)?/",))]
        case schema:
            start = [f"start: {opened} | answer", f"answer: %json {json.dumps(_spaced(schema))}"]
    return Constraint("grammar", "\n".join([*start, body, one, *rules]), tags)


def _spaced(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": {"whitespace_pattern": WHITESPACE}}


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


# Out of an answer


class CallScanner:
    """Text in pieces; out come text and calls, in their order. Text is held back only while it may become a call."""

    def __init__(self, form: ToolFormat, names: Collection[str]) -> None:
        self._form, self._names = form, names
        self._tags = [(form.opener, form.closer)] if form.opener else []
        self._held = ""
        self._within: str | None = None  # the closer that is waited for; "" up to the end
        self._begun = False
        self._called = False

    def push(self, piece: str) -> list[str | tuple[str, str]]:
        """What is certain now: text, and calls as name and arguments."""
        self._held += piece
        found: list[str | tuple[str, str]] = []
        while self._step(found):
            pass
        return found

    def finish(self) -> list[str | tuple[str, str]]:
        """What was held back, at the end of the answer: a call whose end was not written, or text."""
        held, self._held = self._held, ""
        if self._within is None:
            return [held] if held and (held.strip() or not self._called) else []
        body = held.removeprefix(self._form.opener).removesuffix(self._form.closer) if self._form.opener else held
        calls = read_calls(body, self._names)
        return list(calls) if calls is not None else [held]

    def _step(self, found: list[str | tuple[str, str]]) -> bool:
        """Go on with what is held; whether there may be more to do."""
        if self._within is None:
            return self._outside(found)
        if not self._within:
            return False  # bare JSON ends where the answer does
        head, closed, rest = self._held.partition(self._within)
        if not closed:
            return False
        calls = read_calls(head.removeprefix(self._form.opener), self._names)
        found += calls if calls is not None else [head + closed]
        self._begun, self._called = True, self._called or calls is not None
        self._held, self._within = rest, None
        return bool(rest)

    def _outside(self, found: list[str | tuple[str, str]]) -> bool:
        text = self._held.lstrip()
        if not self._begun and text[:1] in ("{", "["):
            # Where tags are tokens that are no text, or the family has none, the answer is bare JSON.
            self._held, self._within = text, ""
            return False
        if opener := self._form.opener:
            at = self._held.find(opener)
            if at >= 0:
                before = self._held[:at]
                if before.strip():
                    found.append(before.rstrip())
                self._held, self._within = self._held[at:], self._form.closer
                return True
        self._show(found, overlap(self._held, opener) if opener else 0)
        return False

    def _show(self, found: list[str | tuple[str, str]], keep: int) -> None:
        """Let text out, but for its last ``keep`` characters and the white space before them."""
        cut = len(self._held[: len(self._held) - keep].rstrip())
        if cut:
            found.append(self._held[:cut])
            self._begun = True
            self._held = self._held[cut:]
