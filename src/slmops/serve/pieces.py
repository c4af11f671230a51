"""Answers on their way: the engine's pieces with the calls read out of them, several choices side by side."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from slmops.artifacts import ToolCall
from slmops.runtime import Delta, TokenLogprob
from slmops.serve.tools import CallScanner


@dataclass(frozen=True)
class Piece:
    """A part of one choice. The last one has a ``finish_reason`` and the counts."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Choice:
    """One choice as it fills up. ``text`` is what is no call; ``text_first``: it began before the calls. ``begun``:
    a stream has told of it."""

    begun: bool = False
    text: str = ""
    text_first: bool = False
    calls: tuple[ToolCall, ...] = ()
    tokens: tuple[TokenLogprob, ...] = ()
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def take(self, piece: Piece) -> None:
        self.text_first = self.text_first or bool(piece.text and not self.calls)
        self.text += piece.text
        self.calls += piece.calls
        self.tokens += piece.tokens
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.prompt_tokens += piece.prompt_tokens
        self.completion_tokens += piece.completion_tokens


async def pieces(
    deltas: AsyncGenerator[Delta, None], scanner: CallScanner | None = None
) -> AsyncGenerator[Piece, None]:
    """The engine's deltas as pieces; with ``scanner``, calls are taken out of the text. Ends with one that has a
    finish reason: ``tool_calls`` where there were calls and the model ended by itself."""
    called = False
    async with aclosing(deltas):
        async for delta in deltas:
            found = [delta.text] if scanner is None else scanner.push(delta.text)
            if scanner is not None and delta.finish_reason:
                found += scanner.finish()
            texts = [part for part in found if isinstance(part, str)]
            calls = tuple(_call(*part) for part in found if not isinstance(part, str))
            called = called or bool(calls)
            reason: str | None = delta.finish_reason
            if reason == "stop" and called:
                reason = "tool_calls"
            yield Piece("".join(texts), calls, delta.tokens, reason, delta.prompt_tokens, delta.completion_tokens)


def _call(name: str, arguments: str) -> ToolCall:
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, arguments)


async def side_by_side(choices: Sequence[AsyncGenerator[Piece, None]]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of all choices as they come, each with its choice's number. Closing this stops all of them."""
    if len(choices) == 1:
        async with aclosing(choices[0]):
            async for piece in choices[0]:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def drain(index: int, choice: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(choice):
                async for piece in choice:
                    queue.put_nowait((index, piece))
            queue.put_nowait((index, None))
        except Exception as error:  # noqa: BLE001 (raised again by whoever reads)
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(drain(index, choice)) for index, choice in enumerate(choices)]
    left = len(tasks)
    try:
        while left:
            index, came = await queue.get()
            if came is None:
                left -= 1
            elif isinstance(came, BaseException):
                raise came
            else:
                yield index, came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def gathered(found: AsyncGenerator[tuple[int, Piece], None], count: int) -> list[Choice]:
    """All choices, whole."""
    choices = [Choice() for _ in range(count)]
    async with aclosing(found):
        async for index, piece in found:
            choices[index].take(piece)
    return choices


async def as_pieces(piece: Piece) -> AsyncGenerator[Piece, None]:
    """A choice that is known already."""
    yield piece


async def after(
    first: tuple[int, Piece], rest: AsyncGenerator[tuple[int, Piece], None]
) -> AsyncIterator[tuple[int, Piece]]:
    """``first``, then the rest; closing this closes the rest."""
    async with aclosing(rest):
        yield first
        async for one in rest:
            yield one
