"""The application: OpenAI's paths over one model folder.

========================== ==========================================================================================
``GET /health``            alive; and ready, or 503 once it is closing
``GET /v1/models``         the one model; ``GET /v1/models/{name}`` alike
``POST /v1/chat/completions``  a conversation to an answer, whole or streamed; a classifier answers with the label
``POST /v1/completions``   plain text to its continuation; a classifier answers with the label
``GET /v1/routing``        how much went to the teacher, and the blended cost; only with a teacher
``POST /v1/classify``      text(s) to label, confidence and the five likeliest labels
========================== ==========================================================================================

Guarantees: the event loop never waits for the model; every failure is in OpenAI's form; a parameter that would have no
effect is refused by name; nothing that a caller wrote is logged or kept.
Not covered: authentication (bind to loopback, or put a proxy in front), tools, constrained output, log-probabilities.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from slmops.errors import SlmopsError
from slmops.serve.engine import Engine
from slmops.serve.errors import ApiError, from_error, from_validation
from slmops.serve.limits import MAX_BODY_BYTES, Limits
from slmops.serve.requests import ChatRequest, ClassifyRequest, CompletionRequest
from slmops.serve.service import Service


def create_app(
    model_folder: Path, *, name: str, engine: Engine | None = None, max_body_bytes: int = MAX_BODY_BYTES
) -> FastAPI:
    """The application for the model in ``model_folder``, called ``name`` by its callers. The model is loaded here, so
    that a server which listens can answer; ``engine`` gives one that is loaded already.

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
    app.add_middleware(Limits, max_body_bytes=max_body_bytes)
    _answer_errors(app)
    _add_paths(app, Service(engine, name))
    return app


def _answer_errors(app: FastAPI) -> None:
    def as_response(error: ApiError) -> Response:
        return JSONResponse(error.to_json(), error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return as_response(from_validation(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
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
    @app.get("/health")
    async def health() -> Response:
        return service.health()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.check_model(model)
        return {**service.model(), "id": model}

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.chat(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.completions(body, request)

    if (router := service.engine.router) is not None:

        @app.get("/v1/routing")
        async def routing() -> dict[str, Any]:
            return router.told()

    @app.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> list[dict[str, Any]]:
        return await service.classify(body)
