"""What the paths answer with, as types: for the schema at ``/openapi.json``, and for those who test against it.

The bodies are made in :mod:`slmops.serve.answers` and its neighbours; nothing is validated here at run time.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, RootModel

import slmops


class _Told(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_Told):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Told):
    error: ErrorDetail


class Health(_Told):
    status: Literal["ok", "closing"]
    live: bool
    ready: bool
    model: str
    at_hand: int


class Model(_Told):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(_Told):
    object: Literal["list"]
    data: list[Model]


class Usage(_Told):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class LikelyToken(_Told):
    token: str
    logprob: float
    bytes: list[int]


class ToldToken(LikelyToken):
    top_logprobs: list[LikelyToken]


class ChatLogprobs(_Told):
    content: list[ToldToken]
    refusal: None


class CalledFunction(_Told):
    name: str
    arguments: str


class CalledTool(_Told):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(_Told):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[CalledTool] = []


class ChatChoice(_Told):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Told):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(_Told):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(_Told):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Told):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class OutputText(_Told):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[ToldToken]


class OutputMessage(_Told):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]


class OutputCall(_Told):
    id: str
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    status: Literal["in_progress", "completed", "incomplete"]


class InputDetails(_Told):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(_Told):
    reasoning_tokens: int


class ResponseUsage(_Told):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(_Told):
    reason: Literal["max_output_tokens"]


class ResponseObject(_Told):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class Embedding(_Told):
    """``embedding``: numbers, or base64 of their float32 in little-endian order."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(_Told):
    prompt_tokens: int
    total_tokens: int


class Embeddings(_Told):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Classified(_Told):
    """``confidence``: calibrated. ``abstain``: it is below the threshold. ``probabilities``: of the likeliest labels,
    best first. ``answered_by``: the teacher, where it was asked instead."""

    label: str
    confidence: float
    abstain: bool
    probabilities: dict[str, float]
    answered_by: Literal["teacher"] | None = None


class FeedbackTaken(_Told):
    """``id``: of the answer that was spoken of."""

    object: Literal["feedback"]
    id: str


class Live(_Told):
    live: bool


class Routing(_Told):
    """How much went to the teacher, and what that costs."""

    threshold: float
    requests: int
    to_teacher: int
    teacher_failed: int
    share: float
    own_cost_per_1000: float
    teacher_cost_per_1000: float
    blended_cost_per_1000: float


class Classification(RootModel[list[Classified]]):
    """One a text, in the order of the texts."""


def answers_with(body: type[BaseModel], *refusals: int, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """The answers of a path for the schema. A body of its own for 200, and the form of errors for ``refusals``."""
    good: dict[str, Any] = {"model": body, "description": "The answer."}
    if streams:
        good["content"] = {"text/event-stream": {"schema": _EVENT}}
    same = Health if body is Health else Error
    return {200: good, **{status: {"model": same, "description": _WHAT[status]} for status in refusals}}


_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "A chunk of the answer as JSON; or an error; at the end [DONE]."},
    },
    "required": ["data"],
}

_WHAT = {
    400: "The request is not understood, or asks for what this model cannot do.",
    404: "There is no such thing here.",
    413: "The body is too large.",
    429: "Too much is at hand: come again after Retry-After.",
    500: "A fault of the server.",
    503: "Closing, or not ready yet.",
}


def describe(app: FastAPI) -> None:
    """Let ``/openapi.json`` say what the paths really answer: a body that is not understood is 400, never 422."""

    def made() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=slmops.__version__, routes=app.routes)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = made  # type: ignore[method-assign] # fastapi's own way
