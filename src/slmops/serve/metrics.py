"""Prometheus metrics of a server: counts and histograms by version and adapter, none by caller or text.

============================================ =========== ========================================================
``slmops_requests_total``                    counter     by path, status, version, adapter
``slmops_request_seconds``                   histogram   arrival to the last byte, by path, version, adapter
``slmops_queue_seconds``                     histogram   until the model began, by version, adapter
``slmops_time_to_first_token_seconds``       histogram   arrival to the first text, by version, adapter
``slmops_time_per_token_seconds``            histogram   mean of one answer after its first token, likewise
``slmops_tokens_total``                      counter     by kind (prompt, completion), version, adapter
``slmops_routed_total``                      counter     answers judged for a teacher, by outcome (own, teacher,
                                                         teacher_failed), version
``slmops_requests_at_hand``                  gauge       running or waiting now
``slmops_connections``                       gauge       open connections
``slmops_reloads_total``                     counter     by result (switched, refused)
``slmops_version_info``                      gauge       1 for the version that answers, by version, model
============================================ =========== ========================================================
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import choose_encoder

from slmops.serve.watch import Watch

M = TypeVar("M", Counter, Histogram)
WHOLE_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
QUEUE_S = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TOKEN_S = (0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5)
SERIES = ("version", "adapter")


class Metrics:
    """See the module. An observer of requests; its registry is its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self._children: dict[tuple[Any, tuple[str, ...]], Any] = {}
        ProcessCollector(registry=registry)
        self.requests = Counter("slmops_requests", "Requests answered", ("path", "status", *SERIES), registry=registry)
        self.whole = _histogram("slmops_request_seconds", "Arrival to the last byte", WHOLE_S, self, "path")
        self.queue = _histogram("slmops_queue_seconds", "Waiting for the model", QUEUE_S, self)
        self.first = _histogram("slmops_time_to_first_token_seconds", "Arrival to the first text", WHOLE_S, self)
        self.token = _histogram("slmops_time_per_token_seconds", "A token after the first", TOKEN_S, self)
        self.tokens = Counter("slmops_tokens", "Tokens read and written", ("kind", *SERIES), registry=registry)
        self.routed = Counter(
            "slmops_routed", "Answers judged by their confidence", ("outcome", "version"), registry=registry
        )
        self.at_hand = Gauge("slmops_requests_at_hand", "Requests running or waiting", registry=registry)
        self.connections = Gauge("slmops_connections", "Open connections", registry=registry)
        self.reloads = Counter("slmops_reloads", "Reloads by result", ("result",), registry=registry)
        self.version = Gauge("slmops_version_info", "The version that answers", ("version", "model"), registry=registry)

    def __call__(self, watch: Watch) -> None:
        """Count a request that has ended."""
        series = (watch.version, watch.adapter)
        self._at(self.requests, watch.path, str(watch.status), *series).inc()
        self._at(self.whole, watch.path, *series).observe(watch.spent_s)
        if watch.queued_s is not None:
            self._at(self.queue, *series).observe(watch.queued_s)
        if watch.first_s is not None:
            self._at(self.first, *series).observe(watch.first_s)
        if (per_token_s := watch.per_token_s) is not None:
            self._at(self.token, *series).observe(per_token_s)
        if watch.prompt_tokens or watch.completion_tokens:
            self._at(self.tokens, "prompt", *series).inc(watch.prompt_tokens)
            self._at(self.tokens, "completion", *series).inc(watch.completion_tokens)

    def _at(self, metric: M, *labels: str) -> M:
        """The metric's child for these labels; the library takes ten times as long to find it."""
        found = self._children.get((metric, labels))
        if found is None:
            found = self._children[metric, labels] = metric.labels(*labels)
        return cast("M", found)

    def now_answers(self, version: str, model: str) -> None:
        """``version`` has taken over."""
        self.version.clear()
        self.version.labels(version, model).set(1)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the form that ``accept`` asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def _histogram(name: str, what: str, buckets: tuple[float, ...], metrics: Metrics, *labels: str) -> Histogram:
    return Histogram(name, what, (*labels, *SERIES), buckets=buckets, registry=metrics.registry)
