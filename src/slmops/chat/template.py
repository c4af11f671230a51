"""A chat template: messages to text, as transformers renders it, without transformers.

Guarantees
    The text equals that of transformers' ``apply_chat_template(tokenize=False)`` for the same messages, options and
    date. A template is somebody else's program: it runs in jinja's immutable sandbox and sees only plain values.
    The same messages give the same text on every day: ``strftime_now`` answers with the date that the template was
    opened with, :data:`TEMPLATE_DATE` unless told otherwise. (Llama 3 and SmolLM 3 write today's date into the
    system turn; a student that is taught on one day and asked on another would meet a prompt it never saw.)

Differs from transformers on purpose
    A leading system message for a template that refuses it (Gemma 2) or leaves it out without a word (Phi 3's first
    template) is put before the text of the first user turn, with an empty line between: Gemma's own practice since
    version 3. An instruction never gets lost.
    ``enable_thinking`` is False unless told otherwise (Qwen 3, SmolLM 3): the models here are taught plain answers,
    and with it the prompt is the exact beginning of the training text.

    Functions, calls of them and their results are told by the template where it tells of them (as ``tools``, as
    SmolLM 3's ``xml_tools``, or within the system message as Phi-4 does), and otherwise by :mod:`slmops.chat.tools`.

Not covered: documents, images.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from slmops.artifacts import Message, ToolCall
from slmops.chat.tools import ToolFormat, Tools, format_of, results_as_user, with_instruction, written_calls
from slmops.errors import DataError, ModelError

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""The day that templates are told: the one that Llama 3's template falls back to when nobody tells it any."""

DEFAULT_OPTIONS: Mapping[str, Any] = {"enable_thinking": False}
"""Variables given to every template; one that does not know a variable ignores it."""

_PROBE = "\ue000probe\ue001"
"""Private-use characters: no template looks for them, none trims them."""

_NAME = "qzprobezq"
"""A function's name: one that is written the same in JSON and in Python."""

_QUESTION = Message("user", "x")
_ToolsWay = Literal["variable", "system"]
"""Functions are a variable of the template, or a field of the system message."""


class ChatTemplate:
    """One compiled template. ``special_tokens``: the variables ``bos_token``, ``eos_token``, ... that it may read."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        options: Mapping[str, Any] | None = None,
        date: datetime.date = TEMPLATE_DATE,
    ) -> None:
        self.source = source
        self._variables = {**special_tokens, **(DEFAULT_OPTIONS if options is None else options)}
        self._template = _compile(source, date)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Tools = ()) -> str:
        """The text of the conversation; ``add_generation_prompt`` opens the assistant's next turn, ``tools`` are the
        functions that it may call.

        Raises:
            DataError: no messages.
            ModelError: the template refuses the conversation; carries the template's own words.
        """
        if not messages:
            raise DataError("There is no message to render.", remedy="Give at least one user message.")
        if any(message.tool_calls for message in messages) and self._loses_calls:
            messages = written_calls(messages, self.tool_format)
        if any(message.role == "tool" for message in messages) and self._loses_results:
            messages = results_as_user(messages)
        if tools and self._tells_tools is None:
            messages, tools = with_instruction(messages, tools, self.tool_format), ()
        if self._loses_system and messages[0].role == "system":
            messages = fold_system(messages)
        return self._render(messages, add_generation_prompt, tools, self._tells_tools if tools else None)

    @cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes calls of functions."""
        return format_of(self.source)

    @cached_property
    def _tells_tools(self) -> _ToolsWay | None:
        """Where the template tells of functions, if it does."""
        tool = {"type": "function", "function": {"name": _NAME, "description": "x", "parameters": {"type": "object"}}}
        ways: tuple[_ToolsWay, ...] = ("variable", "system")
        return next((way for way in ways if self._shows(_NAME, (_QUESTION,), [tool], way)), None)

    @cached_property
    def _loses_calls(self) -> bool:
        call = Message("assistant", "", tool_calls=(ToolCall("abcdefghi", _NAME, "{}"),))
        return not self._shows(_NAME, (_QUESTION, call))

    @cached_property
    def _loses_results(self) -> bool:
        call = Message("assistant", "", tool_calls=(ToolCall("abcdefghi", "x", "{}"),))
        turns: tuple[Message, ...] = (call,)
        if self._loses_calls:
            turns = written_calls(turns, self.tool_format)
        return not self._shows(_PROBE, (_QUESTION, *turns, Message("tool", _PROBE, tool_call_id="abcdefghi", name="x")))

    def _shows(self, probe: str, messages: Sequence[Message], tools: Tools = (), way: _ToolsWay = "variable") -> bool:
        try:
            return probe in self._render(messages, True, tools, way)
        except ModelError:
            return False

    @cached_property
    def _loses_system(self) -> bool:
        """Whether the template refuses a leading system message, or leaves it out."""
        try:
            self._render((_QUESTION,), True)
        except ModelError:
            return False  # It fails on any conversation: its own words must reach the user.
        return not self._shows(_PROBE, (Message("system", _PROBE), _QUESTION))

    def _render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Tools = (),
        way: _ToolsWay | None = "variable",
    ) -> str:
        from jinja2.exceptions import TemplateError

        raw = [message.to_json() for message in messages]
        listed = [dict(tool) for tool in tools] or None
        if listed and way == "system":
            raw, listed = _within_system(raw, listed), None
        try:
            return self._template.render(
                messages=raw,
                tools=listed,
                xml_tools=listed,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except TemplateError as error:
            said = error.message or type(error).__name__
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
            # A template's expressions raise what Python raises: adding None to a text, an index out of range.
            said = f"{type(error).__name__}: {error}"
        roles = ", ".join(message.role for message in messages)
        raise ModelError(
            f"The model's chat template refuses this conversation ({roles}): {said}",
            remedy="Give turns in the order that the model knows: user and assistant by turns, user first.",
        )


def _within_system(raw: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the functions as a field of the system message, as JSON text."""
    told = {"tools": json.dumps([tool["function"] for tool in tools], ensure_ascii=False)}
    if raw and raw[0]["role"] == "system":
        return [{**raw[0], **told}, *raw[1:]]
    return [{"role": "system", "content": "", **told}, *raw]


def fold_system(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The leading system messages put before the text of the first user turn that follows them directly."""
    head = 0
    while head < len(messages) and messages[head].role == "system":
        head += 1
    if head == 0 or head == len(messages) or messages[head].role != "user":
        return tuple(messages)
    text = "\n\n".join(message.content for message in messages[: head + 1])
    return (Message("user", text), *messages[head + 1 :])


def _compile(source: str, date: datetime.date) -> Template:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """``{% generation %}`` marks the answer for others' loss masks; here it only shows what it encloses."""

        tags = {"generation"}  # noqa: RUF012 (jinja's own declaration)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A scope, as the tag has one in transformers: what is set inside is not seen outside.
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime(date)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"The model's chat template cannot be read: line {error.lineno}: {error.message}",
            remedy="Take chat_template.jinja from the model's publisher again.",
        ) from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime(date: datetime.date) -> Callable[[str], str]:
    midnight = datetime.datetime.combine(date, datetime.time())
    return midnight.strftime
