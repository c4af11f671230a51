"""What callers of ``POST /v1/responses`` send: the whole conversation each time, for nothing is kept between requests.

``store: true``, ``previous_response_id``, ``conversation`` and ``background`` would need a memory, and are refused by
name. What came back last time is taken as input again.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from slmops.artifacts import ChatRole, Message, ToolCall
from slmops.serve.body import Body, wrong
from slmops.serve.requests import MAX_TOP_LOGPROBS, About, StreamOptions, check_named
from slmops.serve.schema import TextFormat
from slmops.serve.tools import MAX_TOOLS, CallName, Function, ToolChoice

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """A part of a message; ``output_text`` is one of an answer that comes back."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[Any] | None = None


class InputMessage(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: Status | None = None
    phase: str | None = None

    def to_message(self) -> Message:
        role: ChatRole = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, text)


class CallItem(CallName):
    """A call that the model wrote before."""

    type: Literal["function_call"]
    call_id: str
    id: str | None = None
    status: Status | None = None

    def to_call(self) -> ToolCall:
        return ToolCall(self.call_id, self.name, self.arguments)


class CallOutput(Body):
    """What a function gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: Status | None = None

    @property
    def text(self) -> str:
        return self.output if isinstance(self.output, str) else "".join(part.text for part in self.output)


_TAGS = {"function_call": "CallItem", "function_call_output": "CallOutput"}


def _item_kind(raw: Any) -> str:
    kind = raw.get("type") if isinstance(raw, dict) else getattr(raw, "type", None)
    return _TAGS.get(kind, "InputMessage") if isinstance(kind, str) else "InputMessage"


Item = Annotated[
    Annotated[InputMessage, Tag("InputMessage")]
    | Annotated[CallItem, Tag("CallItem")]
    | Annotated[CallOutput, Tag("CallOutput")],
    Discriminator(_item_kind),
]


class ResponseTool(Function):
    """A function, with its fields beside its type."""

    type: Literal["function"]

    @property
    def function(self) -> Function:
        return Function(name=self.name, description=self.description, parameters=self.parameters, strict=self.strict)


class NamedResponseTool(Body):
    type: Literal["function"]
    name: str


class TextConfig(Body):
    format: TextFormat | None = None


class ResponsesRequest(About):
    """``temperature`` is 0 unless given: served as it was measured."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list)
    text: TextConfig | None = None
    tools: Annotated[list[ResponseTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | NamedResponseTool | None = None
    parallel_tool_calls: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("tools")
    @classmethod
    def _distinct(cls, tools: list[ResponseTool]) -> list[ResponseTool]:
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError("two functions have the same name")
        return tools

    @model_validator(mode="after")
    def _what_goes_together(self) -> ResponsesRequest:
        if self.tool_choice not in (None, "none") and not self.tools:
            raise wrong("tool_choice", "it needs tools")
        if isinstance(self.tool_choice, NamedResponseTool):
            check_named(self.tool_choice.name, self.functions)
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it is only for stream: true")
        if self.stream_options is not None and self.stream_options.include_usage:
            raise wrong("stream_options", "include_usage is not of this path: usage is in the last event")
        return self

    @property
    def functions(self) -> list[Function]:
        return [tool.function for tool in self.tools]

    @property
    def logprobs(self) -> int | None:
        """How many of the likeliest tokens are told beside each; None where nothing is."""
        return (self.top_logprobs or 0) if self.include or self.top_logprobs else None

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The input as turns. Calls that follow one another, or an assistant's text, are one turn."""
        turns = [Message("system", self.instructions)] if self.instructions is not None else []
        if isinstance(self.input, str):
            return (*turns, Message("user", self.input))
        names = {item.call_id: item.name for item in self.input if isinstance(item, CallItem)}
        for item in self.input:
            match item:
                case InputMessage():
                    turns.append(item.to_message())
                case CallItem():
                    text, calls = "", tuple[ToolCall, ...]()
                    if turns and turns[-1].role == "assistant":
                        last = turns.pop()
                        text, calls = last.content, last.tool_calls
                    turns.append(Message("assistant", text, (*calls, item.to_call())))
                case CallOutput():
                    turns.append(Message("tool", item.text, (), item.call_id, names.get(item.call_id)))
        return tuple(turns)
