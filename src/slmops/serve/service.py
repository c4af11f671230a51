"""What the paths do: a checked body in, a response out.

A caller that hangs up while a text is written for it stops the model: before the first piece through
:func:`unless_gone`, later because the stream of events is closed.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from slmops.runtime.base import Delta, GenerationRequest, Probabilities
from slmops.serve.answers import Envelope, Kind, event, usage
from slmops.serve.engine import ContinuesText, Engine, KnowsContext
from slmops.serve.errors import ApiError, from_error, unsupported
from slmops.serve.recording import note
from slmops.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, Sampling

log = logging.getLogger(__name__)
T = TypeVar("T")
DEFAULT_MAX_TOKENS = 512
"""New tokens where the caller names no limit: the cache is allocated for them."""
TOP_LABELS = 5


class Service:
    """What the paths do."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.created = int(time.time())

    def health(self) -> Response:
        ready = not self.engine.closed
        body = {"status": "ok" if ready else "closing", "live": True, "ready": ready, "model": self.name}
        return JSONResponse({**body, "at_hand": self.engine.at_hand}, 200 if ready else 503)

    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "slmops"}

    def models(self) -> list[dict[str, Any]]:
        """The model, and each of its adapters as one of its own: ``NAME:ADAPTER``."""
        names = [self.name, *(f"{self.name}:{adapter}" for adapter in self.engine.description.adapters)]
        return [{**self.model(), "id": name} for name in names]

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a caller's ``model`` names; None where it names none. Raises as :meth:`check_model`."""
        self.check_model(model)
        return None if model is None or model == self.name else model.removeprefix(f"{self.name}:")

    def check_model(self, model: str | None) -> None:
        """Raises :class:`ApiError` for a name that is not in :meth:`models`."""
        if model is not None and model not in (names := [one["id"] for one in self.models()]):
            does = f"'{names[0]}' does" if len(names) == 1 else "these do: " + ", ".join(map(repr, names))
            raise ApiError(
                404,
                f"The model '{model}' does not exist here; {does}.",
                param="model",
                code="model_not_found",
            )

    async def classify(self, body: ClassifyRequest) -> list[dict[str, Any]]:
        self.check_model(body.model)
        if not self.engine.is_classifier:
            raise ApiError(
                400, f"'{self.name}' writes text and has no labels. Ask /v1/chat/completions.", param="model"
            )
        probabilities, tokens = await self.engine.classify(body.texts)
        note(prompt_tokens=tokens, completion_tokens=len(probabilities))
        return [ranking(self.engine.classifier.labels, row) for row in probabilities]

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        if self.engine.is_classifier:
            users = [message.content for message in body.conversation if message.role == "user"]
            if not users:
                raise ApiError(400, "A classifier reads the last user message, and there is none.", param="messages")
            return await self._labels("chat", body, users[-1:])
        messages = self.engine.description.conversation(body.conversation)
        adapter = self.adapter_of(body.model)
        wanted = GenerationRequest(messages, adapter=adapter, **_sampling(body, body.token_limit))
        model = self.engine.generator

        def start() -> Iterator[Delta]:
            if body.token_limit is not None and isinstance(model, KnowsContext):
                check_room(model.count_tokens(messages), body.token_limit, model.context_tokens, "messages")
            return model.stream(wanted)

        return await self._texts("chat", body, request, [start])

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        if body.stream and len(body.prompts) > 1:
            raise unsupported("stream", "Several prompts cannot be streamed: send one, or leave it out.")
        if self.engine.is_classifier:
            return await self._labels("text", body, body.prompts)
        model = self.engine.model
        if not isinstance(model, ContinuesText):
            raise unsupported("prompt", "This model's engine knows conversations alone. Ask /v1/chat/completions.")
        adapter = self.adapter_of(body.model)
        wanted = GenerationRequest((), adapter=adapter, **_sampling(body, body.max_tokens))

        def start(prompt: str) -> Iterator[Delta]:
            ids = model.encode_text(prompt)
            if not ids:
                raise ApiError(400, "The prompt is empty: there is nothing to go on from.", param="prompt")
            if body.max_tokens is not None and isinstance(model, KnowsContext):
                check_room(len(ids), body.max_tokens, model.context_tokens, "prompt")
            return model.stream_ids(ids, wanted)

        return await self._texts("text", body, request, [partial(start, prompt) for prompt in body.prompts])

    async def _labels(self, kind: Kind, body: Sampling, texts: list[str]) -> Response:
        """A classifier's answer in the shape of a completion: the likeliest label of each text."""
        if body.temperature:
            raise unsupported("temperature", "This model chooses a label and does not sample: leave it out, or send 0.")
        if body.stops:
            raise unsupported("stop", "This model answers with one label.")
        probabilities, tokens = await self.engine.classify(texts)
        labels = [self.engine.classifier.labels[int(row.argmax())] for row in probabilities]
        note(confidences=[float(row.max()) for row in probabilities])
        counts = usage(tokens, len(labels))
        envelope = self._envelope(kind)
        if not body.stream:
            return JSONResponse(envelope.whole([(label, "stop") for label in labels], counts))
        return _event_stream(_label_events(envelope, labels[0], counts if body.include_usage else None))

    async def _texts(
        self, kind: Kind, body: Sampling, request: Request, starts: Sequence[Callable[[], Iterator[Delta]]]
    ) -> Response:
        envelope = self._envelope(kind)
        if body.stream:
            deltas = self.engine.stream(starts[0])
            # The first piece is waited for here: what goes wrong until then still gets its own status.
            first = await unless_gone(request, anext(deltas))
            return _event_stream(_text_events(envelope, first, deltas, include_usage=body.include_usage))
        texts: list[tuple[str, str]] = []
        prompt_tokens = completion_tokens = 0
        for start in starts:
            pieces, last = await unless_gone(request, self._whole(start))
            texts.append((pieces, last.finish_reason or "stop"))
            prompt_tokens += last.prompt_tokens
            completion_tokens += last.completion_tokens
        return JSONResponse(envelope.whole(texts, usage(prompt_tokens, completion_tokens)))

    async def _whole(self, start: Callable[[], Iterator[Delta]]) -> tuple[str, Delta]:
        async with aclosing(self.engine.stream(start)) as deltas:
            pieces = [delta async for delta in deltas]
        return "".join(piece.text for piece in pieces), pieces[-1]

    def _envelope(self, kind: Kind) -> Envelope:
        return Envelope(kind, self.name, unique=uuid.uuid4().hex, created=int(time.time()))


def ranking(labels: tuple[str, ...], row: Probabilities) -> dict[str, Any]:
    """The likeliest label, how sure it is, and the five likeliest with their probabilities, best first."""
    best = row.argsort()[::-1][:TOP_LABELS]
    top = {labels[index]: round(float(row[index]), 6) for index in best}
    label = labels[best[0]]
    return {"label": label, "confidence": top[label], "probabilities": top}


def _sampling(body: Sampling, max_tokens: int | None) -> dict[str, Any]:
    return {
        "max_tokens": max_tokens or DEFAULT_MAX_TOKENS,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "seed": body.seed,
        "stop": body.stops,
    }


def check_room(prompt_tokens: int, max_tokens: int, context_tokens: int, param: str) -> None:
    """Refuse an answer that was asked for at a length for which there is no room.

    Raises:
        ApiError: with the numbers, and the parameter to change.
    """
    if prompt_tokens + max_tokens > context_tokens:
        raise ApiError(
            400,
            f"The model's context holds {context_tokens} tokens; {prompt_tokens + max_tokens} were asked for: "
            f"{prompt_tokens} in the {param} and {max_tokens} to be written.",
            param="max_tokens" if prompt_tokens < context_tokens else param,
            code="context_length_exceeded",
        )


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


async def _label_events(envelope: Envelope, label: str, counts: dict[str, int] | None) -> AsyncIterator[bytes]:
    yield event(envelope.piece(label, first=True))
    yield event(envelope.piece("", "stop"))
    if counts:
        yield event(envelope.counts(counts))
    yield event("[DONE]")


async def _text_events(
    envelope: Envelope, first: Delta, rest: AsyncGenerator[Delta, None], *, include_usage: bool
) -> AsyncIterator[bytes]:
    """The chunks of an answer. Closing this stops the model: a caller that hangs up costs no more than one token."""
    async with aclosing(rest):
        try:
            yield event(envelope.piece(first.text, first=True))
            last = first
            if not first.finish_reason:
                async for delta in rest:
                    last = delta
                    if delta.text:
                        yield event(envelope.piece(delta.text))
            note(prompt_tokens=last.prompt_tokens, completion_tokens=last.completion_tokens)
            yield event(envelope.piece("", last.finish_reason))
            if include_usage:
                yield event(envelope.counts(usage(last.prompt_tokens, last.completion_tokens)))
            yield event("[DONE]")
        except Exception as error:  # noqa: BLE001 (the status is sent already: the error goes into the stream)
            log.error("%s within a stream", type(error).__name__)
            yield event(from_error(error).to_json())


def _event_stream(events: AsyncIterator[bytes]) -> StreamingResponse:
    # No buffering by a proxy in between: a token that waits is no stream.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)
