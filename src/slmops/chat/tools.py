"""Functions that a model may call: how each family writes a call, and how it is told of functions and results.

Guarantees: where a model's template tells of functions, calls or results, it does so itself; what it leaves out is
written into the turns around it, in the form that the family was taught, so that nothing gets lost. What a model wrote
is read back leniently (one call or a list, within its tags or bare), and what cannot be read stays text.
Pure: knows templates by what they say, renders nothing.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slmops.artifacts import Message, ToolCall

Tools = Sequence[Mapping[str, Any]]
"""As in OpenAI's chat completions: ``{"type": "function", "function": {"name", "description", "parameters"}}``."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family writes calls.

    ``opener``, ``closer``  around a call; empty where a call is bare JSON and the whole answer
    ``gap``                 white space between a tag and the JSON
    ``as_list``             all calls in one list within one pair of tags; otherwise each has a pair of its own
    ``arguments``           the key of the arguments
    """

    name: str
    opener: str = ""
    closer: str = ""
    gap: str = ""
    as_list: bool = False
    arguments: str = "arguments"

    def write(self, calls: Sequence[ToolCall]) -> str:
        """The calls as the model itself would write them."""
        bodies = [
            f'{{"name": {json.dumps(call.name, ensure_ascii=False)}, "{self.arguments}": {call.arguments or "{}"}}}'
            for call in calls
        ]
        if self.as_list:
            return f"{self.opener}{self.gap}[{', '.join(bodies)}]{self.gap}{self.closer}"
        return "\n".join(f"{self.opener}{self.gap}{body}{self.gap}{self.closer}" for body in bodies)


HERMES = ToolFormat("hermes", "<tool_call>", "</tool_call>", gap="\n")
"""Qwen 2.5 and 3, SmolLM 3, and whatever learnt from Hermes' data."""
LLAMA = ToolFormat("llama", arguments="parameters")
"""Llama 3.1 and later: the answer is the call."""
PHI = ToolFormat("phi", "<|tool_call|>", "<|/tool_call|>", as_list=True)
"""Phi-4 mini."""
SMOLLM = ToolFormat("smollm", "<tool_call>", "</tool_call>", as_list=True)
"""SmolLM 2, and every model whose template knows nothing of functions."""


def format_of(template: str) -> ToolFormat:
    """The form of the family that a chat template belongs to."""
    if "<|tool_call|>" in template or "<|tool|>" in template:
        return PHI
    if "<tool_call>" in template:
        return HERMES
    if "tools" in template and ("<|python_tag|>" in template or "<|start_header_id|>" in template):
        return LLAMA
    return SMOLLM


# To the model


def with_instruction(messages: Sequence[Message], tools: Tools, form: ToolFormat) -> tuple[Message, ...]:
    """The conversation with the functions told in its system message, for a template that does not tell of them."""
    text = instruction(tools, form)
    if messages and messages[0].role == "system":
        return (replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)


def instruction(tools: Tools, form: ToolFormat) -> str:
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    example = form.write([ToolCall("", "NAME", '{"ARGUMENT": "VALUE"}')])
    return (
        f"You can call functions. These are known, one a line:\n{listed}\n\n"
        f"To call one, answer in this form and write nothing else:\n{example}\n"
        "Where no function helps, answer in words."
    )


def written_calls(messages: Sequence[Message], form: ToolFormat) -> tuple[Message, ...]:
    """Each turn's calls as a part of its text, for a template that leaves calls out."""
    return tuple(
        Message("assistant", "\n".join(filter(None, (message.content, form.write(message.tool_calls)))))
        if message.tool_calls
        else message
        for message in messages
    )


def results_as_user(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Results as turns of the user, those that follow one another in one, for a template without a turn for them."""
    turns: list[Message] = []
    within = False
    for message in messages:
        if message.role != "tool":
            turns.append(message)
            within = False
            continue
        text = f"<tool_response>\n{message.content}\n</tool_response>"
        if within:
            turns[-1] = Message("user", f"{turns[-1].content}\n{text}")
        else:
            turns.append(Message("user", text))
        within = True
    return tuple(turns)


# From the model


def read_calls(text: str, names: Collection[str]) -> list[tuple[str, str]] | None:
    """Names and arguments (JSON text) of the calls that ``text``, without its tags, consists of; None where it is not
    all calls of known functions."""
    found = _values(text)
    if not found:
        return None
    calls = [_call(raw, names) for value in found for raw in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call is not None] if calls and None not in calls else None


def _values(text: str) -> list[Any]:
    """The JSON values that ``text`` consists of, with white space, commas or semicolons in between; none where other
    text is among them."""
    decoder, at = json.JSONDecoder(), 0
    found: list[Any] = []
    while True:
        while at < len(text) and (text[at].isspace() or (found and text[at] in ",;")):
            at += 1
        if at == len(text):
            return found
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        found.append(value)


def _call(raw: Any, names: Collection[str]) -> tuple[str, str] | None:
    if not isinstance(raw, Mapping):
        return None
    name = raw.get("name")
    if not isinstance(name, str) or name not in names:
        return None
    arguments: Any = next((raw[key] for key in ("arguments", "parameters") if key in raw), {})
    if isinstance(arguments, str):  # some models write the object as a text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (name, json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, Mapping) else None
