"""What ``POST /v1/responses`` answers: one body, or its events while it is written. Pure: pieces in, plain JSON out."""

from __future__ import annotations

from typing import Any

from slmops.artifacts import ToolCall
from slmops.serve.answers import token_bodies
from slmops.serve.pieces import Choice, Piece
from slmops.serve.response_requests import NamedResponseTool, ResponsesRequest, Status


class ResponseBody:
    """The body of one response, as far as it has come. ``unique`` makes its ids, ``created`` is its time."""

    def __init__(self, asked: ResponsesRequest, model: str, *, unique: str, created: int) -> None:
        self._asked, self._model = asked, model
        self._unique, self._created = unique, created
        self._logprobs = asked.logprobs is not None

    def whole(self, choice: Choice, *, finished: bool = True) -> dict[str, Any]:
        """All of it, with the output so far."""
        cut = choice.finish_reason == "length"
        status = "in_progress" if not finished else "incomplete" if cut else "completed"
        return {
            "id": f"resp_{self._unique}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if finished and cut else None,
            **self._echoed(),
            "model": self._model,
            "output": self.output(choice) if finished else [],
            "usage": _usage(choice) if finished else None,
        }

    def output(self, choice: Choice) -> list[dict[str, Any]]:
        """A message where there is text, and the calls, in the order in which they began."""
        cut = choice.finish_reason == "length"
        message = [self.message(choice, "incomplete" if cut and not choice.calls else "completed")]
        calls = [self.call(call, "completed") for call in choice.calls]
        if not choice.text:
            return calls or message
        return [*message, *calls] if choice.text_first else [*calls, *message]

    def message(self, choice: Choice, status: Status) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self.part(choice)]
        return {"id": self.message_id, "type": "message", "role": "assistant", "status": status, "content": content}

    @property
    def message_id(self) -> str:
        return f"msg_{self._unique}"

    def part(self, choice: Choice) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": choice.text,
            "annotations": [],
            "logprobs": self.told(choice),
        }

    def told(self, choice: Choice | Piece) -> list[dict[str, Any]]:
        return token_bodies(choice.tokens) if self._logprobs else []

    def call(self, call: ToolCall, status: Status) -> dict[str, Any]:
        return {
            "id": f"fc_{call.id.removeprefix('call_')}",
            "type": "function_call",
            "call_id": call.id,
            "name": call.name,
            "arguments": "" if status == "in_progress" else call.arguments,
            "status": status,
        }

    def _echoed(self) -> dict[str, Any]:
        asked = self._asked
        choice = asked.tool_choice
        wanted = asked.text.format if asked.text and asked.text.format else None
        form = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
        return {
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": form},
            "tool_choice": choice.model_dump() if isinstance(choice, NamedResponseTool) else choice or "auto",
            "tools": [tool.model_dump() for tool in asked.tools],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "user": asked.user,
        }


def _usage(choice: Choice) -> dict[str, Any]:
    return {
        "input_tokens": choice.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": choice.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": choice.prompt_tokens + choice.completion_tokens,
    }


class EventWriter:
    """The events of a streamed response, in their order and numbered. Pure: pieces in, events out."""

    def __init__(self, body: ResponseBody) -> None:
        self._body = body
        self._choice = Choice()
        self._number = 0
        self._items = 0  # output items that were opened
        self._text_at: int | None = None  # the message's place in the output, while it is open

    def begin(self) -> list[dict[str, Any]]:
        made = self._body.whole(self._choice, finished=False)
        return [self._event(f"response.{name}", response=made) for name in ("created", "in_progress")]

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        """The events of one piece; of the last one, the end as well."""
        events: list[dict[str, Any]] = []
        if piece.text:
            if self._text_at is None:
                events += self._open_message()
            events.append(self._text_event("delta", delta=piece.text, logprobs=self._body.told(piece)))
        self._choice.take(piece)
        for call in piece.calls:
            events += self._whole_call(call)
        if piece.finish_reason:
            events += self._end()
        return events

    def failed(self, error: dict[str, Any]) -> dict[str, Any]:
        """The event of an error, which is the last one."""
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _end(self) -> list[dict[str, Any]]:
        opened = [] if self._items else self._open_message()  # an answer of no text is a message all the same
        made = self._body.whole(self._choice)
        return [*opened, *self._close_message(), self._event(f"response.{made['status']}", response=made)]

    def _open_message(self) -> list[dict[str, Any]]:
        self._text_at = self._items
        self._items += 1
        empty = Choice()
        item = self._body.message(empty, "in_progress")
        return [
            self._event("response.output_item.added", output_index=self._text_at, item=item),
            self._part_event("added", self._body.part(empty)),
        ]

    def _close_message(self) -> list[dict[str, Any]]:
        if self._text_at is None:
            return []
        cut = self._choice.finish_reason == "length" and not self._choice.calls
        item = self._body.message(self._choice, "incomplete" if cut else "completed")
        events = [
            self._text_event("done", text=self._choice.text, logprobs=self._body.told(self._choice)),
            self._part_event("done", self._body.part(self._choice)),
            self._event("response.output_item.done", output_index=self._text_at, item=item),
        ]
        self._text_at = None
        return events

    def _whole_call(self, call: ToolCall) -> list[dict[str, Any]]:
        at, done = self._items, self._body.call(call, "completed")
        self._items += 1
        where = {"item_id": done["id"], "output_index": at}
        opened = self._body.call(call, "in_progress")
        return [
            self._event("response.output_item.added", output_index=at, item=opened),
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self._event("response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=at, item=done),
        ]

    def _text_event(self, name: str, **more: Any) -> dict[str, Any]:
        where = {"item_id": self._body.message_id, "output_index": self._text_at, "content_index": 0}
        return self._event(f"response.output_text.{name}", **where, **more)

    def _part_event(self, name: str, part: dict[str, Any]) -> dict[str, Any]:
        where = {"item_id": self._body.message_id, "output_index": self._text_at, "content_index": 0}
        return self._event(f"response.content_part.{name}", **where, part=part)

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **more}
