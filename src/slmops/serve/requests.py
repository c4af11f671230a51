"""The bodies that callers send, checked as a whole.

A parameter that has no effect here is refused by name, never ignored: see :mod:`slmops.serve.body`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from slmops.artifacts import ChatRole, Message, ToolCall
from slmops.serve.body import NEUTRAL, Body, wrong
from slmops.serve.schema import ResponseFormat
from slmops.serve.tools import Call, Function, NamedTool, Tool, ToolChoice, distinct

__all__ = [
    "NEUTRAL",
    "Body",
    "ChatMessage",
    "ChatRequest",
    "ClassifyRequest",
    "CompletionRequest",
    "EmbeddingRequest",
    "Sampling",
    "TextPart",
]

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
Texts = Annotated[list[str], Field(min_length=1, max_length=1024)]


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """``content`` may be missing where an assistant only calls; ``name`` is for the turn of a tool."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: Annotated[list[Call], Field(min_length=1)] | None = None
    tool_call_id: str | None = None
    name: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _of_its_role(self) -> ChatMessage:
        if self.content is None and not self.tool_calls:
            raise wrong("content", f"it is missing in the turn of the {self.role}")
        if self.tool_calls and self.role != "assistant":
            raise wrong("tool_calls", f"these are an assistant's, not of the {self.role}")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise wrong("tool_call_id", "it is for the role tool, and needed there")
        if self.name is not None and self.role != "tool":
            raise wrong("name", "it is for the role tool alone: the model is not told who speaks")
        return self

    @property
    def text(self) -> str:
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)

    def to_message(self) -> Message:
        role: ChatRole = "system" if self.role == "developer" else self.role
        calls = tuple(ToolCall(one.id, one.function.name, one.function.arguments) for one in self.tool_calls or ())
        return Message(role, self.text, calls, self.tool_call_id, self.name)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class About(Body):
    """What a caller says of himself. It changes nothing in the answer."""

    user: str | None = Field(None, description="recorded as a hash, where answers are recorded")
    safety_identifier: str | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description="recorded, where answers are, for figures by group"
    )
    prompt_cache_key: str | None = Field(None, description="beginnings of prompts are found again without it")


class Sampling(About):
    """What both kinds of completion share. ``temperature`` is 0 unless given: served as it was measured."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @field_validator("stop")
    @classmethod
    def _few_whole_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        if stop == "" or (isinstance(stop, list) and ("" in stop or len(stop) > 4)):
            raise ValueError("give at most 4 texts, none of them empty")
        return stop

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "it is only for stream: true")
        return self


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: ToolChoice | NamedTool | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None

    @field_validator("tools")
    @classmethod
    def _distinct(cls, tools: list[Tool]) -> list[Tool]:
        return distinct(tools)

    @model_validator(mode="after")
    def _what_goes_together(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("top_logprobs", "it needs logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise wrong("tool_choice", "it needs tools")
        if isinstance(self.tool_choice, NamedTool):
            check_named(self.tool_choice.function.name, self.functions)
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        return tuple(message.to_message() for message in self.messages)

    @property
    def functions(self) -> list[Function]:
        return [tool.function for tool in self.tools]

    @property
    def token_limit(self) -> int | None:
        """The smaller of the two names that the API has for it."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)


def check_named(name: str, functions: list[Function]) -> None:
    """Raises an error about ``tool_choice`` where no function has the name."""
    if name not in {function.name for function in functions}:
        raise wrong("tool_choice", f"it names {name!r}, which is none of the tools")


class CompletionRequest(Sampling):
    prompt: str | Texts
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ClassifyRequest(About):
    """``threshold``: below this confidence the answer is told to be an abstention; the bundle's own unless given."""

    input: str | Texts
    model: str | None = None
    threshold: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class EmbeddingRequest(About):
    model: str
    input: str | Texts
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input
