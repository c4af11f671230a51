"""Failures in OpenAI's form: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from slmops.errors import ContextLengthError, DataError, ModelError, SlmopsError
from slmops.runtime.constraint import ConstraintError
from slmops.serve.body import OF_A_FIELD
from slmops.serve.engine import BusyError

UNSUPPORTED = "unsupported_parameter"


class ApiError(HTTPException):
    """An answer that is an error. ``param`` names the field of the request that is at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code

    def to_json(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


_NO_MEMORY = "Nothing is kept between requests: send the whole conversation each time."
REASONS: Mapping[str, str] = {
    "store": _NO_MEMORY,
    "previous_response_id": _NO_MEMORY,
    "conversation": _NO_MEMORY,
    "background": "An answer comes with its own request.",
    "functions": "Send them as tools.",
    "function_call": "Send it as tool_choice.",
    "json_schema": "A schema goes into response_format.",
    "schema": 'A schema is wrapped: {"type": "json_schema", "json_schema": {"name": "...", "schema": {...}}}.',
    "dimensions": "Vectors have the width of the model.",
}
"""Why some parameters are refused, and what to send instead."""


def unsupported(param: str, why: str = "") -> ApiError:
    """A parameter that this server does not know how to honour: refused, so that nobody thinks it had an effect."""
    why = why or REASONS.get(param.rpartition(".")[2], "Leave it out.")
    message = f"Unsupported parameter: '{param}'. {why}"
    return ApiError(400, message, param=param, code=UNSUPPORTED)


def from_error(error: Exception) -> ApiError:
    """What a caller is told of an error. Of a bug no more than that there was one."""
    match error:
        case ApiError():
            return error
        case BusyError():
            headers = {"Retry-After": str(error.retry_after_s)}
            return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", headers=headers)
        case ContextLengthError():
            return ApiError(400, str(error), param="messages", code="context_length_exceeded")
        case ConstraintError():
            return ApiError(400, str(error), param="response_format", code="invalid_schema")
        case ModelError() | DataError():  # the chat template refuses the conversation
            return ApiError(400, str(error), param="messages")
        case SlmopsError():
            return ApiError(500, str(error), kind="server_error")
        case _:
            return ApiError(500, "The server failed; its log says where.", kind="server_error", code="internal_error")


def _is_field(part: str) -> bool:
    """Whether a part of a location is a field's name, and not one of a type."""
    return part.isidentifier() and part != "str" and not part[0].isupper()


def from_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The most telling of pydantic's problems with a body, in a sentence with the field's name and value."""
    # The alternative that came furthest; a wrong kind of thing tells more than what such a thing would need.
    problem = max(problems, key=lambda problem: (len(problem["loc"]), problem["type"] != "missing"))
    # Alternatives of a union appear in the location under the names of their types: they are no part of the path.
    path = [part for part in problem["loc"][1:] if isinstance(part, int) or _is_field(part)]
    if problem["type"] == OF_A_FIELD:
        path.append(problem["ctx"]["field"])
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or None
    match problem["type"]:
        case "json_invalid":
            reason = (problem.get("ctx") or {}).get("error", "")
            return ApiError(
                400, f"The body is not JSON: {reason} at character {problem['loc'][-1]}.", code="invalid_json"
            )
        case "extra_forbidden":
            return unsupported(param or "?")
        case "missing" if param is None:
            return ApiError(400, "The body is empty.", code="invalid_json")
        case "missing":
            return ApiError(
                400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter"
            )
        case "value_error" if param is None:  # two parameters that do not go together
            return ApiError(400, f"{str(problem['msg']).removeprefix('Value error, ')}.", code="invalid_value")
        case _ if problem["type"] == OF_A_FIELD:
            return ApiError(400, f"Invalid '{param}': {problem['msg']}.", param=param, code="invalid_value")
        case _ if param is None:
            return ApiError(400, "The body must be a JSON object, sent as application/json.", code="invalid_json")
        case _:
            value = repr(problem.get("input"))
            value = value if len(value) <= 60 else f"{value[:57]}..."
            said = str(problem["msg"]).removeprefix("Value error, ")
            return ApiError(400, f"Invalid '{param}': {said} (got {value}).", param=param, code="invalid_value")
