"""All that is known of a window of traffic, as one plain JSON object: what the report draws and ``--json`` prints."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.monitor.drift import ALPHA, drift, label_counts
from slmops.monitor.log import EventLog, Window
from slmops.monitor.quality import by_group, figures, quantile
from slmops.monitor.reference import Reference, Sample, reference_from_events, sample_of

SCHEMA = 1
BINS = 20
STEPS = 48
"""Points of a curve over time at most."""
LABELS_SHOWN = 15
DRIFT_ROWS = 500
"""The newest requests that are compared with the reference."""
EARLIER_ROWS = 1000
FIGURED = (
    *("id", "at", "kind", "model", "version", "adapter", "status", "latency_ms", "first_ms", "prompt_tokens"),
    *("completion_tokens", "confidence", "format_ok", "finish_reason", "slices"),
)
COMPARED = (
    *("at", "status", "novelty", "sketch", "input_chars", "output_chars", "confidence", "format_ok", "label"),
    "finish_reason",
)
"""Columns that are read: texts never are."""


def watched(
    log: EventLog,
    window: Window,
    *,
    reference: Reference | None = None,
    alpha: float = ALPHA,
    drift_rows: int = DRIFT_ROWS,
) -> dict[str, Any]:
    """Figures, groups, drift, curves and gaps of a window.

    ``reference``: the bundle's; None: the first requests of the window's model and version, as far as there are enough.
    """
    events = log.events(window, *FIGURED)
    feedback, judgements = log.feedback(window), log.judgements(window)
    latest = log.events(replace(window, newest=2 * drift_rows), *COMPARED)
    newest = [row for row in latest if row["status"] < 400][-drift_rows:]
    compared = reference or _earlier(log, window, newest)
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "made_at": time.time(),
        "window": {
            "since": events[0]["at"] if events else window.since,
            "until": events[-1]["at"] if events else window.until,
            "models": sorted({row["model"] for row in events}),
            "versions": sorted({row["version"] for row in events}),
        },
        "figures": figures(events, feedback, judgements),
        "groups": by_group(events, feedback, judgements),
        "drift": None if compared is None else drift(compared, sample_of(newest), alpha=alpha).to_json(),
        "over_time": over_time(events),
        "labels": [] if compared is None else label_shares(compared.sample, sample_of(newest)),
        "histograms": {} if compared is None else histograms(compared.sample, sample_of(newest)),
        "feedback": said(feedback),
        "gaps": log.gaps(window.since or 0.0),
        "sessions": log.sessions()[-20:],
        "versions": log.versions(),
    }
    return content


def measured(content: Mapping[str, Any]) -> dict[str, Any]:
    """What alert rules speak of: the figures, and three more."""
    alarms = [view for view in (content["drift"] or {"views": ()})["views"] if view["alarm"]]
    lost = sum(gap["lost"] or 0 for gap in content["gaps"])
    return {**content["figures"], "drift": len(alarms), "lost": lost, "gaps": len(content["gaps"])}


def over_time(events: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Up to :data:`STEPS` equal parts of the window's time."""
    if not events:
        return []
    first, last = events[0]["at"], events[-1]["at"]
    step = max((last - first) / STEPS, 1.0)
    parts: dict[int, list[Mapping[str, Any]]] = {}
    for row in events:
        parts.setdefault(min(STEPS - 1, int((row["at"] - first) / step)), []).append(row)
    return [_point(first + number * step, parts.get(number, [])) for number in range(max(parts) + 1)]


def _point(at: float, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    good = [row for row in rows if row["status"] < 400]
    sure = [row["confidence"] for row in good if row["confidence"] is not None]
    latencies = [row["latency_ms"] for row in good]
    return {
        "at": at,
        "requests": len(rows),
        "errors": len(rows) - len(good),
        "latency_ms_p50": quantile(latencies, 0.5),
        "latency_ms_p95": quantile(latencies, 0.95),
        "confidence": sum(sure) / len(sure) if sure else None,
    }


def label_shares(reference: Sample, window: Sample) -> list[dict[str, Any]]:
    """The labels whose shares have moved most: ``label``, ``now``, ``was``."""
    was, now = label_counts(reference), label_counts(window)
    if not was or not now:
        return []
    shares = {
        name: (now.get(name, 0) / sum(now.values()), was.get(name, 0) / sum(was.values()))
        for name in sorted(set(was) | set(now))
    }
    most = sorted(shares, key=lambda name: -abs(shares[name][0] - shares[name][1]))[:LABELS_SHOWN]
    return [{"label": name, "now": shares[name][0], "was": shares[name][1]} for name in most]


def histograms(reference: Sample, window: Sample) -> dict[str, dict[str, list[float]]]:
    """Shares of rows in equal bins: ``edges`` ``[BINS + 1]``, ``now`` and ``was`` ``[BINS]``."""
    found = {}
    for name in ("confidence", "novelty", "input_chars", "output_chars"):
        was, now = (_known(getattr(sample, name)) for sample in (reference, window))
        if not len(was) or not len(now) or (name == "output_chars" and window.names):
            continue
        both = np.concatenate([was, now])
        # One text of a book's length must not make all others one bar.
        low, high = (0.0, 1.0) if name == "confidence" else (float(both.min()), float(np.quantile(both, 0.99)))
        edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
        counts = [np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] / len(part) for part in (now, was)]
        found[name] = {"edges": edges.tolist(), "now": counts[0].tolist(), "was": counts[1].tolist()}
    return found


def said(feedback: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How much of what."""
    scores = [row["score"] for row in feedback if row["score"] is not None]
    return {
        "answers": len({row["event"] for row in feedback}),
        "good": sum(score >= 0.5 for score in scores),
        "bad": sum(score < 0.5 for score in scores),
        "corrections": sum(row["correction"] is not None for row in feedback),
        "comments": sum(row["comment"] is not None for row in feedback),
    }


def _earlier(log: EventLog, window: Window, newest: Sequence[Mapping[str, Any]]) -> Reference | None:
    """The first requests of this model and version, before the newest."""
    if not newest:
        return None
    before = Window(until=newest[0]["at"], model=window.model, version=window.version, adapter=window.adapter)
    of_it = log.events(before, *COMPARED)
    rows = [row for row in of_it if row["status"] < 400][:EARLIER_ROWS]
    return reference_from_events(rows) if rows else None


def _known(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return values[~np.isnan(values)]
