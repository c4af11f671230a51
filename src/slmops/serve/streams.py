"""Answers while they are written: server-sent events, and callers that go away.

A caller that hangs up while a text is written for it stops the model: before the first piece through
:func:`unless_gone`, later because the stream of events is closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse

from slmops.serve.answers import Envelope, event, usage_of
from slmops.serve.errors import from_error
from slmops.serve.pieces import Choice, Piece, after
from slmops.serve.responses import EventWriter

log = logging.getLogger(__name__)
T = TypeVar("T")
Found = AsyncGenerator[tuple[int, Piece], None]


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the caller hangs up.

    Raises:
        ClientGoneError: the caller has gone; nobody reads the answer.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()


class ClientGoneError(ConnectionError):
    """Nobody waits for this answer any more."""


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def text_events(
    envelope: Envelope, first: tuple[int, Piece], rest: Found, each: int, *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The chunks of an answer. Closing this stops the model: a caller that hangs up costs no more than one token."""
    choices: dict[int, Choice] = {}
    async with aclosing(rest):
        try:
            async for index, piece in after(first, rest):
                for chunk in _chunks(envelope, index, piece, choices):
                    yield event(chunk)
            if include_usage:
                yield event(envelope.counts(usage_of([choices[index] for index in sorted(choices)], each)))
            yield event("[DONE]")
        except Exception as error:  # noqa: BLE001 (the status is sent already: the error goes into the stream)
            log.error("%s within a stream", type(error).__name__)
            yield event(from_error(error).to_json())


def _chunks(envelope: Envelope, index: int, piece: Piece, choices: dict[int, Choice]) -> list[dict[str, Any]]:
    """What one piece is told by; the reason for the end comes in a chunk of its own."""
    before, told = choices.setdefault(index, Choice()), []
    first, before.begun = not before.begun, True
    reason = piece.finish_reason
    if piece.text or piece.calls or piece.tokens or first:
        told.append(envelope.piece(index, replace(piece, finish_reason=None), before, first=first))
    before.take(piece)
    if reason:
        told.append(envelope.piece(index, Piece(finish_reason=reason), before))
    return told


async def response_events(writer: EventWriter, first: tuple[int, Piece], rest: Found) -> AsyncIterator[bytes]:
    """The events of a response. Closing this stops the model."""
    async with aclosing(rest):
        try:
            for one in writer.begin():
                yield event(one, name=one["type"])
            async for _, piece in after(first, rest):
                for one in writer.take(piece):
                    yield event(one, name=one["type"])
        except Exception as error:  # noqa: BLE001 (as in text_events)
            log.error("%s within a stream", type(error).__name__)
            told = writer.failed(from_error(error).to_json()["error"])
            yield event(told, name=told["type"])


def event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    # No buffering by a proxy in between: a token that waits is no stream.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
