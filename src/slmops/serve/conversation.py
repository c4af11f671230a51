"""What a conversation asks of a model beside text: functions, a schema, log-probabilities; and what it may not hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer, ToolFormat
from slmops.errors import ContextLengthError
from slmops.runtime import Constraint
from slmops.serve.errors import ApiError
from slmops.serve.response_requests import NamedResponseTool
from slmops.serve.schema import json_constraint
from slmops.serve.tools import Function, NamedTool, ToolChoice, tools_constraint


@runtime_checkable
class HasChat(Protocol):
    """A generator that shows its tokenizer and template."""

    @property
    def chat(self) -> ChatTokenizer: ...


@dataclass(frozen=True)
class Wish:
    """What a conversation asks of the model beside text: functions, what forces them, a schema, log-probabilities."""

    functions: Sequence[Function] = ()
    choice: ToolChoice = "none"
    parallel: bool = True
    schema: Mapping[str, Any] | None = None
    schema_param: str = "response_format"
    top_logprobs: int | None = None

    @property
    def offered(self) -> Sequence[Function]:
        """The functions that the model is told of."""
        return () if self.choice == "none" else self.functions


def constraint_of(wish: Wish, form: ToolFormat) -> Constraint | None:
    """What the answer has to keep to. Takes a moment for a large schema.

    Raises:
        ApiError: a schema is refused.
    """
    if wish.offered:
        return tools_constraint(
            wish.functions, wish.choice, form, parallel=wish.parallel, schema=wish.schema, param=wish.schema_param
        )
    return None if wish.schema is None else json_constraint(wish.schema, wish.schema_param)


def choice_of(
    asked: ToolChoice | NamedTool | NamedResponseTool | None, functions: list[Function]
) -> tuple[ToolChoice, list[Function]]:
    """What forces a call, and the functions that may be called: a named one is the only one."""
    match asked:
        case None:
            return ("auto" if functions else "none"), functions
        case NamedTool():
            return "required", [one for one in functions if one.name == asked.function.name]
        case NamedResponseTool():
            return "required", [one for one in functions if one.name == asked.name]
        case _:
            return asked, functions


def as_told(function: Function) -> dict[str, Any]:
    """A function as templates read it."""
    told: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        told["description"] = function.description
    return {
        "type": "function",
        "function": {**told, "parameters": function.parameters or {"type": "object", "properties": {}}},
    }


def check_controls(model: object, messages: Sequence[Message], functions: Sequence[Function], param: str) -> ToolFormat:
    """How ``model`` writes calls; refuses texts that would be read as its control tokens. ``param``: where the messages
    stood.

    Raises:
        ApiError: a message or a function spells a control token.
    """
    if not isinstance(model, HasChat):
        return ToolFormat("none")
    for index, message in enumerate(messages):
        own = message.role == "assistant"
        parts = (message.content, *(call.arguments for call in message.tool_calls))
        token = next(filter(None, (model.chat.control_text(part, of_the_model=own) for part in parts)), None)
        if token is not None:
            raise _control_text(token, f"a message of the {message.role} (number {index})", param)
    for function in functions:
        if token := model.chat.control_text(function.model_dump_json()):
            raise _control_text(token, f"the function {function.name}", "tools")
    return model.chat.tool_format


def _control_text(token: str, where: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"{where[:1].upper()}{where[1:]} contains {token!r}, which is a control token of this model and would not be "
        "read as text. Take it out, or write it in another way.",
        param=param,
        code="control_token",
    )


def check_room(
    prompt_tokens: int, max_tokens: int, context_tokens: int, param: str, limit_param: str = "max_tokens"
) -> None:
    """Refuse an answer that was asked for at a length for which there is no room. ``param``: where the prompt stood,
    ``limit_param``: where its length did.

    Raises:
        ApiError: with the numbers, and the parameter to change.
    """
    if prompt_tokens + max_tokens > context_tokens:
        raise ApiError(
            400,
            f"The model's context holds {context_tokens} tokens; {prompt_tokens + max_tokens} were asked for: "
            f"{prompt_tokens} in the {param} and {max_tokens} to be written.",
            param=limit_param if prompt_tokens < context_tokens else param,
            code="context_length_exceeded",
        )


@contextmanager
def room_for(param: str) -> Iterator[None]:
    """A text that does not fit in the context is the fault of ``param``.

    Raises:
        ApiError: in place of :class:`ContextLengthError`.
    """
    try:
        yield
    except ContextLengthError as error:
        raise ApiError(400, str(error), param=param, code="context_length_exceeded") from None
