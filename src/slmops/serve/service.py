"""What the paths do: a checked body in, a response out."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from slmops.artifacts import Message
from slmops.chat import ToolFormat
from slmops.runtime import Ability, Constraint, Delta, Embeds, GenerationRequest, Probabilities, abilities_of
from slmops.serve.answers import Envelope, Kind, PlainJSON, usage_of
from slmops.serve.conversation import Wish, as_told, check_controls, check_room, choice_of, constraint_of, room_for
from slmops.serve.embeddings import embeddings_body
from slmops.serve.engine import ContinuesText, Engine, KnowsContext
from slmops.serve.errors import ApiError, unsupported
from slmops.serve.pieces import Piece, as_pieces, gathered, pieces, side_by_side
from slmops.serve.recording import note
from slmops.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest, Sampling
from slmops.serve.response_requests import ResponsesRequest
from slmops.serve.responses import EventWriter, ResponseBody
from slmops.serve.streams import event_stream, response_events, text_events, unless_gone
from slmops.serve.tools import CallScanner
from slmops.serve.watch import watching

DEFAULT_MAX_TOKENS = 512
"""New tokens where the caller names no limit: the cache is allocated for them."""
TOP_LABELS = 5
LONG_CHARACTERS = 50_000


class Service:
    """What the paths do."""

    def __init__(self, engine: Engine, name: str, *, max_new_tokens: int | None = None) -> None:
        self.engine = engine
        self.name = name
        self.max_new_tokens = max_new_tokens
        self.created = int(time.time())

    def health(self) -> Response:
        ready = self.engine.ready
        body = {"status": "ok" if ready else "closing", "live": True, "ready": ready, "model": self.name}
        return PlainJSON({**body, "at_hand": self.engine.at_hand}, 200 if ready else 503)

    def model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "slmops"}

    def models(self) -> list[dict[str, Any]]:
        """The model, and each of its adapters as one of its own: ``NAME:ADAPTER``."""
        names = [self.name, *(f"{self.name}:{adapter}" for adapter in self.engine.description.adapters)]
        return [{**self.model(), "id": name} for name in names]

    def adapter_of(self, model: str | None) -> str | None:
        """The adapter that a caller's ``model`` names; None where it names none. Raises as :meth:`check_model`."""
        self.check_model(model)
        adapter = None if model is None or model == self.name else model.removeprefix(f"{self.name}:")
        watching().adapter = self.engine.description.adapter_of(adapter)
        return adapter

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
        probabilities, _ = await self.engine.classify(body.texts)
        note(completion_tokens=len(probabilities))
        threshold = self.engine.description.threshold if body.threshold is None else body.threshold
        rows = [ranking(self.engine.classifier.labels, row, threshold) for row in probabilities]
        taught = await self.engine.second_opinion(body.texts, [row["confidence"] for row in rows])
        return [row if label is None else by_teacher(row, label) for row, label in zip(rows, taught, strict=True)]

    async def embeddings(self, body: EmbeddingRequest) -> Response:
        self.check_model(body.model)
        model = self.engine.model
        if not isinstance(model, Embeds):
            raise _no_states(self.name, classifier=self.engine.is_classifier)
        try:
            with room_for("input"):
                states, tokens = await self.engine.call(lambda: model.embed(body.texts))
        except NotImplementedError:
            raise _no_states(self.name, classifier=self.engine.is_classifier) from None
        return PlainJSON(embeddings_body(states, tokens, self.name, body.encoding_format))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        self.check_model(body.model)
        if self.engine.is_classifier:
            _refuse_for_labels(body, {"tools": body.tools, "response_format": body.response_format})
            _refuse_for_labels(body, {"logprobs": body.logprobs})
            return await self._labels("chat", body, _last_user(body.conversation, "messages"))
        choice, functions = choice_of(body.tool_choice, body.functions)
        wish = Wish(
            functions,
            choice,
            body.parallel_tool_calls,
            None if body.response_format is None else body.response_format.schema_wanted,
            top_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        found = await self._conversation(body, body.conversation, wish, "messages", body.token_limit)
        return await self._texts("chat", body, request, found, 1, logprobs=body.logprobs)

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        self.check_model(body.model)
        if self.engine.is_classifier:
            _refuse_for_labels(body, {"logprobs": body.logprobs is not None})
            return await self._labels("text", body, body.prompts)
        model = self.engine.model
        if not isinstance(model, ContinuesText):
            raise unsupported("prompt", "This model's engine knows conversations alone. Ask /v1/chat/completions.")
        if body.logprobs is not None:
            self._need("logprobs", "logprobs")
        adapter = self.adapter_of(body.model)
        wanted = GenerationRequest(
            (), adapter=adapter, top_logprobs=body.logprobs, **self._sampling(body, body.max_tokens)
        )

        def start(prompt: str, wanted: GenerationRequest) -> Iterator[Delta]:
            ids = model.encode_text(prompt)
            if not ids:
                raise ApiError(400, "The prompt is empty: there is nothing to go on from.", param="prompt")
            if body.max_tokens is not None and isinstance(model, KnowsContext):
                check_room(len(ids), body.max_tokens, model.context_tokens, "prompt")
            with room_for("prompt"):
                return model.stream_ids(ids, wanted)

        found = [
            pieces(self.engine.stream(partial(start, prompt, one)))
            for prompt in body.prompts
            for one in _several(wanted, body.n)
        ]
        return await self._texts("text", body, request, found, len(body.prompts), logprobs=body.logprobs is not None)

    async def responses(self, body: ResponsesRequest, request: Request) -> Response:
        self.check_model(body.model)
        asked = Sampling(
            model=body.model, max_tokens=body.max_output_tokens, temperature=body.temperature, top_p=body.top_p
        )
        wanted = body.text.format.schema_wanted if body.text and body.text.format else None
        if self.engine.is_classifier:
            _refuse_for_labels(asked, {"tools": body.tools, "text": wanted, "top_logprobs": body.logprobs is not None})
            found = await self._label_pieces(_last_user(body.conversation, "input"))
        else:
            choice, functions = choice_of(body.tool_choice, body.functions)
            wish = Wish(functions, choice, body.parallel_tool_calls, wanted, "text", body.logprobs)
            found = await self._conversation(asked, body.conversation, wish, "input", body.max_output_tokens)
        made = ResponseBody(body, self.name, unique=uuid.uuid4().hex, created=int(time.time()))
        if not body.stream:
            (answer,) = await unless_gone(request, gathered(side_by_side(found), 1))
            return PlainJSON(made.whole(answer))
        rest = side_by_side(found)
        first = await unless_gone(request, anext(rest))
        return event_stream(response_events(EventWriter(made), first, rest))

    async def _conversation(
        self, body: Sampling, messages: Sequence[Message], wish: Wish, param: str, token_limit: int | None
    ) -> list[AsyncGenerator[Piece, None]]:
        """The choices of an answer to a conversation, not begun yet."""
        told = self.engine.description.conversation(messages)
        if wish.offered or any(message.role == "tool" or message.tool_calls for message in told):
            self._need("tools", "tools" if wish.offered else param)
        if wish.top_logprobs is not None:
            self._need("logprobs", "logprobs" if param == "messages" else "top_logprobs")
        form, constraint = await self._planned(told, wish, param)
        if constraint is not None:
            self._need(constraint.kind, "tool_choice" if wish.schema is None else wish.schema_param)
        wanted = GenerationRequest(
            told,
            adapter=self.adapter_of(body.model),
            tools=tuple(as_told(function) for function in wish.offered),
            constraint=constraint,
            top_logprobs=wish.top_logprobs,
            **self._sampling(body, token_limit),
        )
        names = frozenset(function.name for function in wish.offered)
        model = self.engine.generator

        def start(wanted: GenerationRequest) -> Iterator[Delta]:
            if token_limit is not None and isinstance(model, KnowsContext):
                prompt_tokens = model.count_tokens(told, wanted.tools)
                limit_param = "max_output_tokens" if param == "input" else "max_tokens"
                check_room(prompt_tokens, token_limit, model.context_tokens, param, limit_param)
            with room_for(param):
                return model.stream(wanted)

        return [
            pieces(self.engine.stream(partial(start, one)), CallScanner(form, names) if names else None)
            for one in _several(wanted, body.n)
        ]

    async def _planned(
        self, messages: Sequence[Message], wish: Wish, param: str
    ) -> tuple[ToolFormat, Constraint | None]:
        """How calls are written, and what the answer has to keep to. Long texts and schemas are not looked at on the
        event loop."""

        def plan() -> tuple[ToolFormat, Constraint | None]:
            form = check_controls(self.engine.model, messages, wish.offered, param)
            return form, constraint_of(wish, form)

        long = sum(len(message.content) for message in messages) > LONG_CHARACTERS
        return await asyncio.to_thread(plan) if long or wish.offered or wish.schema is not None else plan()

    def _need(self, ability: Ability, param: str) -> None:
        """Raises :class:`ApiError` where the engine has not got ``ability``."""
        if ability not in abilities_of(self.engine.model):
            raise unsupported(param, f"The engine of '{self.name}' ({self.engine.description.runtime}) cannot do this.")

    async def _labels(self, kind: Kind, body: Sampling, texts: list[str]) -> Response:
        """A classifier's answer in the shape of a completion: the likeliest label of each text."""
        _refuse_for_labels(body, {})
        found = await self._label_pieces(texts)
        envelope = self._envelope(kind)
        if body.stream:
            rest = side_by_side(found)
            return event_stream(text_events(envelope, await anext(rest), rest, 1, include_usage=body.include_usage))
        choices = await gathered(side_by_side(found), len(found))
        return PlainJSON(envelope.whole(choices, usage_of(choices)))

    async def _label_pieces(self, texts: list[str]) -> list[AsyncGenerator[Piece, None]]:
        probabilities, tokens = await self.engine.classify(texts)
        own = [self.engine.classifier.labels[int(row.argmax())] for row in probabilities]
        confidences = [float(row.max()) for row in probabilities]
        note(confidences=confidences)
        taught = await self.engine.second_opinion(texts, confidences)
        labels = [label or mine for label, mine in zip(taught, own, strict=True)]
        return [
            as_pieces(Piece(label, finish_reason="stop", prompt_tokens=0 if index else tokens, completion_tokens=1))
            for index, label in enumerate(labels)
        ]

    async def _texts(
        self,
        kind: Kind,
        body: Sampling,
        request: Request,
        found: list[AsyncGenerator[Piece, None]],
        prompts: int,
        *,
        logprobs: bool,
    ) -> Response:
        envelope = self._envelope(kind, logprobs=logprobs)
        each = len(found) // prompts
        if body.stream:
            rest = side_by_side(found)
            # The first piece is waited for here: what goes wrong until then still gets its own status.
            first = await unless_gone(request, anext(rest))
            return event_stream(text_events(envelope, first, rest, each, include_usage=body.include_usage))
        choices = await unless_gone(request, gathered(side_by_side(found), len(found)))
        return PlainJSON(envelope.whole(choices, usage_of(choices, each)))

    def _sampling(self, body: Sampling, max_tokens: int | None) -> dict[str, Any]:
        cap = self.max_new_tokens
        if cap is not None and (max_tokens or 0) > cap:
            raise ApiError(
                400,
                f"This server writes at most {cap} tokens; {max_tokens} were asked for.",
                param="max_tokens",
                code="max_tokens_exceeded",
            )
        return {
            "max_tokens": max_tokens or min(DEFAULT_MAX_TOKENS, cap or DEFAULT_MAX_TOKENS),
            "temperature": body.temperature,
            "top_p": body.top_p,
            "seed": body.seed,
            "stop": body.stops,
        }

    def _envelope(self, kind: Kind, *, logprobs: bool = False) -> Envelope:
        return Envelope(kind, self.name, unique=uuid.uuid4().hex, created=int(time.time()), logprobs=logprobs)


def by_teacher(row: dict[str, Any], label: str) -> dict[str, Any]:
    """A classifier's answer with the teacher's label in its place. ``confidence`` stays the classifier's in its own."""
    return {**row, "label": label, "abstain": False, "answered_by": "teacher"}


def ranking(labels: tuple[str, ...], row: Probabilities, threshold: float | None = None) -> dict[str, Any]:
    """The likeliest label, how sure it is, and the five likeliest with their probabilities, best first. ``abstain``
    tells that the confidence is below ``threshold``: the answer should not be acted on."""
    best = row.argsort()[::-1][:TOP_LABELS]
    top = {labels[index]: round(float(row[index]), 6) for index in best}
    label = labels[best[0]]
    abstain = threshold is not None and float(row[best[0]]) < threshold
    return {"label": label, "confidence": top[label], "abstain": abstain, "probabilities": top}


def _several(wanted: GenerationRequest, count: int) -> list[GenerationRequest]:
    """One request a choice; with a seed, each has its own, so that they differ and can be had again."""
    if wanted.seed is None:
        return [wanted] * count
    return [replace(wanted, seed=(wanted.seed + index) % 2**63) for index in range(count)]


def _last_user(messages: Sequence[Message], param: str) -> list[str]:
    """Raises :class:`ApiError` where no user speaks."""
    users = [message.content for message in messages if message.role == "user"]
    if not users:
        raise ApiError(400, "A classifier reads the last user message, and there is none.", param=param)
    return users[-1:]


def _refuse_for_labels(body: Sampling, more: Mapping[str, object]) -> None:
    """Raises :class:`ApiError` for what has no effect on a label."""
    if body.temperature:
        raise unsupported("temperature", "This model chooses a label and does not sample: leave it out, or send 0.")
    if body.stops:
        raise unsupported("stop", "This model answers with one label.")
    if body.n > 1:
        raise unsupported("n", "This model has one answer.")
    for name, value in more.items():
        if value:
            raise unsupported(name, "This model answers with one label. /v1/classify tells how sure it is.")


def _no_states(name: str, *, classifier: bool) -> ApiError:
    how = "Run its recipe again" if classifier else "Run its recipe again with compress.embeddings: true, in ONNX"
    return ApiError(
        400,
        f"'{name}' gives no embeddings: its graph was made without its states. {how}.",
        param="model",
        code="unsupported_model",
    )
