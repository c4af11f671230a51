"""The bodies that callers send, checked as a whole.

A parameter that has no effect here is refused by name, never ignored; its neutral value (``n: 1``, ``tools: []``, null)
is taken, because clients send those without meaning anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from slmops.artifacts import ChatRole, Message

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""Values that ask for nothing beyond what the server does anyway."""

Texts = Annotated[list[str], Field(min_length=1, max_length=1024)]


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


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def to_message(self) -> Message:
        role: ChatRole = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role, text)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Sampling(Body):
    """What both kinds of completion share. ``temperature`` is 0 unless given: served as it was measured."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="about the caller, not about the answer; recorded as a hash, if at all")
    metadata: dict[str, str] | None = Field(None, description="recorded, for figures by group; not used otherwise")

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
            raise ValueError("stream_options is only for stream: true")
        return self


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def conversation(self) -> tuple[Message, ...]:
        return tuple(message.to_message() for message in self.messages)

    @property
    def token_limit(self) -> int | None:
        """The smaller of the two names that the API has for it."""
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        return min(limits, default=None)


class CompletionRequest(Sampling):
    prompt: str | Texts

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class ClassifyRequest(Body):
    input: str | Texts
    model: str | None = None
    user: str | None = Field(None, description="as in the other requests")
    metadata: dict[str, str] | None = Field(None, description="as in the other requests")

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input
