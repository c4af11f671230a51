"""A server as it is operated: limits, keys, metrics and versions around the application.

From outside in: :class:`Limits` (bounds, and one report a request), :class:`Access` (keys), :class:`Operations` (the
paths below), :class:`Switch` (the version that answers).

====================== ========================================================================================
``GET /health/live``   the process runs; open to all
``GET /health/ready``  a version answers, or 503 while the server drains; open to all
``GET /metrics``       for Prometheus
``POST /admin/reload`` go over to ``{"bundle": PATH}``, or read the same path anew; answers when it is done
``GET /admin/status``  the version that answers, and those that drain
====================== ========================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from slmops.errors import SlmopsError
from slmops.serve.access import Access
from slmops.serve.app import create_app
from slmops.serve.candidate.pair import Pair
from slmops.serve.candidate.rollout import Rollout
from slmops.serve.engine import Engine
from slmops.serve.errors import ApiError
from slmops.serve.keys import KeyRing
from slmops.serve.limits import MAX_BODY_BYTES, Limits, log_line, respond_json
from slmops.serve.metrics import Metrics
from slmops.serve.recording import Recorder
from slmops.serve.reload import Loader, OnTrialError, ReloadBusyError, Result, Switch, Version
from slmops.serve.watch import Observer


@dataclass(frozen=True)
class ServeOptions:
    """
    ``name``            what callers name the model, whichever version answers
    ``keys``            file of keys; None: no key is asked for, and administration is shut
    ``max_new_tokens``  of one answer; None: what the model's context holds
    """

    name: str
    keys: Path | None = None
    max_body_bytes: int = MAX_BODY_BYTES
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Operated:
    """The application, and the parts of it that whoever runs it must reach."""

    app: ASGIApp
    switch: Switch
    metrics: Metrics


class Operations:
    """The paths of an operator, in front of the switch."""

    def __init__(self, switch: Switch, metrics: Metrics) -> None:
        self.switch = switch
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.switch(scope, receive, send)
            return
        match scope["path"], scope["method"]:
            case "/health/live", "GET" | "HEAD":
                await respond_json(200, {"live": True}, send)
            case "/health/ready", "GET" | "HEAD":
                await self._ready(send)
            case "/metrics", "GET":
                await self._metrics(Request(scope), send)
            case "/admin/status", "GET":
                await respond_json(200, self.switch.told(), send)
            case "/admin/reload", "POST":
                await self._reload(Request(scope, receive), send)
            case ("/metrics" | "/admin/status" | "/admin/reload") as path, method:
                raise ApiError(405, f"{method} is not for {path}.")
            case _:
                await self.switch(scope, receive, send)

    async def _ready(self, send: Send) -> None:
        ready = not self.switch.closing and self.switch.current.engine.ready
        await respond_json(200 if ready else 503, {"ready": ready, "at_hand": self.switch.at_hand}, send)

    async def _metrics(self, request: Request, send: Send) -> None:
        page, content_type = self.metrics.page(request.headers.get("accept", ""))
        headers = [(b"content-type", content_type.encode()), (b"content-length", str(len(page)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": page})

    async def _reload(self, request: Request, send: Send) -> None:
        source = _source(await request.body())
        try:
            await self.switch.reload(source)
        except OnTrialError as error:
            raise ApiError(409, str(error), code="on_trial") from None
        except ReloadBusyError as error:
            raise ApiError(409, str(error), code="reload_under_way") from None
        except SlmopsError as error:
            raise ApiError(422, f"Nothing was changed. {error}", param="bundle", code="version_refused") from None
        await respond_json(200, self.switch.told(), send)


def operate(
    source: str,
    load: Loader,
    options: ServeOptions,
    *,
    first: tuple[Version, Engine] | None = None,
    beside: tuple[Rollout, Version, Engine] | None = None,
    observers: Sequence[Observer] = (),
    request_log: Observer = log_line,
    recorder: Recorder | None = None,
    extend: Callable[[FastAPI, Version], None] = lambda *_: None,
) -> Operated:
    """The whole application over what ``source`` names.

    ``first``      the version to begin with, opened already
    ``beside``     a candidate beside ``first``, and the rollout that decides between them
    ``observers``  are told of every request, beside ``request_log`` and metrics
    ``recorder``   is told of every answer of every version; whoever opened it closes it
    ``extend``     adds paths to each version's application

    Raises:
        SlmopsError: the version cannot be opened, or the keys cannot be read.
    """
    keys = None if options.keys is None else KeyRing(options.keys)
    metrics = Metrics()

    pair: Pair | None = None

    def build(version: Version, engine: Engine) -> FastAPI:
        nonlocal pair
        app = one(version, engine)
        if beside is None or pair is not None:
            return app
        rollout, candidate, its_engine = beside
        pair = Pair(app, one(candidate, its_engine), rollout)
        return pair.hosted()

    def one(version: Version, engine: Engine) -> FastAPI:
        app = create_app(
            version.folder,
            name=options.name,
            engine=engine,
            max_body_bytes=options.max_body_bytes,
            max_new_tokens=options.max_new_tokens,
            recorder=recorder,
        )
        extend(app, version)
        if engine.router is not None:
            engine.router.on_answer = lambda outcome: metrics.routed.labels(outcome, version.label).inc()
        return app

    def reloaded(result: Result, version: Version) -> None:
        metrics.reloads.labels(result).inc()
        metrics.now_answers(version.label, options.name)

    def on_trial() -> bool:
        return pair is not None and pair.running

    switch = Switch(source, load, build, first=first, on_reload=reloaded, held=on_trial)
    metrics.now_answers(switch.current.version.label, options.name)
    metrics.at_hand.set_function(lambda: switch.at_hand)
    gate = Access(Operations(switch, metrics), keys)
    app = Limits(gate, max_body_bytes=options.max_body_bytes, observers=(request_log, metrics, gate.spent, *observers))
    return Operated(app, switch, metrics)


def _source(body: bytes) -> str | None:
    if not body.strip():
        return None
    try:
        asked: Any = json.loads(body)
    except ValueError as error:
        raise ApiError(400, f"The body is not JSON: {error}.", code="invalid_json") from None
    if not isinstance(asked, dict) or set(asked) - {"bundle"} or not isinstance(asked.get("bundle", ""), str):
        raise ApiError(400, 'The body must be {"bundle": PATH}, or empty.', param="bundle", code="invalid_value")
    return asked.get("bundle") or None
