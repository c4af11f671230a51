"""The application: OpenAI's paths over one model folder.

========================== ==========================================================================================
``GET /health``            alive; and ready, or 503 once it is closing; ``/health/live`` and ``/health/ready`` alone
``GET /v1/models``         the one model; ``GET /v1/models/{name}`` alike
``POST /v1/chat/completions``  a conversation to an answer, whole or streamed; a classifier answers with the label
``POST /v1/completions``   plain text to its continuation; a classifier answers with the label
``POST /v1/responses``     a conversation to an answer, in the newer form; without a memory
``POST /v1/embeddings``    text(s) to vectors, where the model's graph gives its states
``POST /v1/classify``      text(s) to label, calibrated confidence, abstention and the five likeliest labels
``POST /v1/feedback``      what people say of an answer, where a recorder keeps it
``GET /openapi.json``      all this as a schema
``GET /v1/routing``        how much went to the teacher, and the blended cost; only with a teacher
========================== ==========================================================================================

Guarantees: the event loop never waits for the model; every failure is in OpenAI's form; a parameter that would have no
effect is refused by name; nothing that a caller wrote is logged, or kept unless a recorder is given.
Not covered: keys, metrics and reloading (:mod:`slmops.serve.operate` stands around this).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from slmops.errors import SlmopsError
from slmops.serve.answers import PlainJSON
from slmops.serve.engine import Engine
from slmops.serve.errors import ApiError, from_error, from_validation
from slmops.serve.feedback import add_feedback
from slmops.serve.limits import MAX_BODY_BYTES, Limits
from slmops.serve.openapi import (
    ChatCompletion,
    Classification,
    Completion,
    Embeddings,
    Health,
    Live,
    Model,
    Models,
    ResponseObject,
    Routing,
    answers_with,
    describe,
)
from slmops.serve.recording import Recorder, Recording
from slmops.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest, EmbeddingRequest
from slmops.serve.response_requests import ResponsesRequest
from slmops.serve.service import Service

UNREADABLE = "There was an error parsing the body"
"""What fastapi says of a body for which its parser raised anything but a complaint about JSON."""


def create_app(
    model_folder: Path,
    *,
    name: str,
    engine: Engine | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_new_tokens: int | None = None,
    recorder: Recorder | None = None,
) -> FastAPI:
    """The application for the model in ``model_folder``, called ``name`` by its callers. The model is loaded here, so
    that a server which listens can answer; ``engine`` gives one that is loaded already. ``recorder`` is told of every
    answer; whoever opened it closes it.

    Raises:
        SlmopsError: the model cannot be opened.
    """
    engine = engine or Engine.open(model_folder)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.get_running_loop().run_in_executor(None, engine.close)

    # No pages for people: they load their scripts from elsewhere.
    app = FastAPI(title=f"slmops: {name}", docs_url=None, redoc_url=None, lifespan=lifespan)
    if recorder is not None:
        app.add_middleware(Recording, recorder=recorder)
    app.add_middleware(Limits, max_body_bytes=max_body_bytes)
    _answer_errors(app)
    _add_paths(app, Service(engine, name, max_new_tokens=max_new_tokens))
    add_feedback(app, recorder)
    describe(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    def as_response(error: ApiError) -> Response:
        return PlainJSON(error.to_json(), error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return as_response(from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400 and error.detail == UNREADABLE:  # no UTF-8, or brackets without end
            return as_response(ApiError(400, "The body is not JSON.", code="invalid_json"))
        what = {404: "There is nothing at this path.", 405: f"{request.method} is not for this path."}
        message = what.get(error.status_code, str(error.detail))
        return as_response(ApiError(error.status_code, message, code="not_found" if error.status_code == 404 else None))

    @app.exception_handler(ApiError)
    async def _ours(_: Request, error: ApiError) -> Response:
        return as_response(error)

    @app.exception_handler(SlmopsError)
    async def _users(_: Request, error: SlmopsError) -> Response:
        return as_response(from_error(error))


def _add_paths(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=answers_with(Health, 503))
    async def health() -> Response:
        return service.health()

    @app.get("/health/live", responses=answers_with(Live))
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/health/ready", responses=answers_with(Health, 503))
    async def ready() -> Response:
        return service.health()

    @app.get("/v1/models", responses=answers_with(Models))
    async def models() -> Response:
        return PlainJSON({"object": "list", "data": service.models()})

    @app.get("/v1/models/{model:path}", responses=answers_with(Model, 404))
    async def model(model: str) -> Response:
        service.check_model(model)
        return PlainJSON({**service.model(), "id": model})

    if (router := service.engine.router) is not None:

        @app.get("/v1/routing", responses=answers_with(Routing))
        async def routing() -> Response:
            return PlainJSON(router.told())

    @app.post("/v1/chat/completions", responses=answers_with(ChatCompletion, *REFUSALS, streams=True))
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions", responses=answers_with(Completion, *REFUSALS, streams=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.completions(body, request)

    @app.post("/v1/responses", responses=answers_with(ResponseObject, *REFUSALS, streams=True))
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await service.responses(body, request)

    @app.post("/v1/embeddings", responses=answers_with(Embeddings, *REFUSALS))
    async def embeddings(body: EmbeddingRequest) -> Response:
        return await service.embeddings(body)

    @app.post("/v1/classify", responses=answers_with(Classification, *REFUSALS))
    async def classify(body: ClassifyRequest) -> Response:
        return PlainJSON(await service.classify(body))


REFUSALS = (400, 404, 413, 429, 500)
