"""OpenTelemetry traces: one span a request, with figures and no text. Off unless asked for.

Where spans go is said by OpenTelemetry's standard variables, ``OTEL_EXPORTER_OTLP_ENDPOINT`` first of all; without one
nothing is opened. A caller's ``traceparent`` becomes the span's parent. Sending is done by a thread of its own, in
batches: a collector that is slow or gone costs spans and no request.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from slmops import __version__
from slmops.errors import MissingExtraError, UsageError
from slmops.serve.watch import Watch

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracer:
    """An observer of requests; see the module."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("slmops", __version__)
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def open(cls, environment: Mapping[str, str] = os.environ) -> Tracer:
        """Ready to send to where the variables say.

        Raises:
            UsageError: no endpoint is named.
            MissingExtraError: the extra ``otel`` is not installed.
        """
        if not any(environment.get(name) for name in ENDPOINT_VARIABLES):
            raise UsageError(
                "--otel was given, and no variable says where traces go.",
                remedy=f"Set {ENDPOINT_VARIABLES[1]}, for example to http://localhost:4318.",
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError:
            raise MissingExtraError("--otel", "otel") from None
        named = {} if environment.get("OTEL_SERVICE_NAME") else {"service.name": "slmops"}
        provider = TracerProvider(resource=Resource.create(named))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        return cls(provider)

    def __call__(self, watch: Watch) -> None:
        """Record a request that has ended."""
        parent = self._propagator.extract({"traceparent": watch.traceparent}) if watch.traceparent else None
        span = self._tracer.start_span(
            f"{watch.method} {watch.path}",
            context=parent,
            kind=_server_kind(),
            start_time=watch.started_ns,
            attributes=attributes(watch),
        )
        for name, after_s in (("model began", watch.queued_s), ("first token", watch.first_s)):
            if after_s is not None:
                span.add_event(name, timestamp=watch.started_ns + int(1e9 * after_s))
        if watch.status >= 500:
            span.set_status(_error_status())
        span.end(end_time=watch.started_ns + int(1e9 * watch.spent_s))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def attributes(watch: Watch) -> dict[str, str | int | float]:
    """A span's attributes, named as OpenTelemetry's conventions name them where they have a name."""
    told: dict[str, str | int | float | None] = {
        "http.request.method": watch.method,
        "http.route": watch.path,
        "http.response.status_code": watch.status,
        "slmops.request_id": watch.id,
        "slmops.version": watch.version or None,
        "slmops.adapter": watch.adapter or None,
        "slmops.queue_s": watch.queued_s,
        "gen_ai.usage.input_tokens": watch.prompt_tokens or None,
        "gen_ai.usage.output_tokens": watch.completion_tokens or None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _server_kind() -> Any:
    from opentelemetry.trace import SpanKind

    return SpanKind.SERVER


def _error_status() -> Any:
    from opentelemetry.trace import Status, StatusCode

    return Status(StatusCode.ERROR)
