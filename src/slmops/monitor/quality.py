"""Figures of a window of traffic: how fast, how sure, how well formed, what people and judges say. Pure.

Every figure comes with the rows that it is made of, so that nobody reads an average of three. Shares have Wilson's
interval. None stands for "not known", never for zero.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Z95 = 1.959964
BY = ("version", "adapter", "kind")


def figures(events: Sequence[Row], feedback: Sequence[Row] = (), judgements: Sequence[Row] = ()) -> dict[str, Any]:
    """Name -> value, or a mapping with ``value`` and ``rows``."""
    good = [row for row in events if row["status"] < 400]
    latencies = [row["latency_ms"] for row in good]
    formed = [bool(row["format_ok"]) for row in good if row["format_ok"] is not None]
    sure = [row["confidence"] for row in good if row["confidence"] is not None]
    scores = [row["score"] for row in feedback if row["score"] is not None]
    judged = [row["score"] for row in judgements]
    reasons = Counter(row["finish_reason"] for row in good if row["finish_reason"])
    return {
        "requests": len(events),
        "error_share": share(len(events) - len(good), len(events)),
        "latency_ms_p50": number(quantile(latencies, 0.5), len(latencies)),
        "latency_ms_p95": number(quantile(latencies, 0.95), len(latencies)),
        "latency_ms_p99": number(quantile(latencies, 0.99), len(latencies)),
        "first_ms_p95": _quantile_of(good, "first_ms", 0.95),
        "prompt_tokens": sum(row["prompt_tokens"] or 0 for row in good),
        "completion_tokens": sum(row["completion_tokens"] or 0 for row in good),
        "confidence_mean": number(_mean(sure), len(sure)),
        "format_valid": share(sum(formed), len(formed)),
        "length_stops": share(reasons["length"], sum(reasons.values())),
        "feedback_score": number(_mean(scores), len(scores)),
        "corrected_share": share(len({row["event"] for row in feedback if row["correction"]}), len(good)),
        "judge_score": number(_mean(judged), len(judged)),
    }


def by_group(events: Sequence[Row], feedback: Sequence[Row], judgements: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Figures by version, adapter and kind where there are several, and by each slice: ``"slice tenant=acme"``."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in events:
        for name in BY:
            groups[f"{name} {row[name] or '-'}"].append(row)
        for key, value in json.loads(row["slices"]).items():
            groups[f"slice {key}={value}"].append(row)
    found: dict[str, dict[str, Any]] = {}
    for name, rows in sorted(groups.items()):
        if len(rows) < len(events):
            ids = {row["id"] for row in rows}
            found[name] = figures(
                rows,
                [row for row in feedback if row["event"] in ids],
                [row for row in judgements if row["event"] in ids],
            )
    return found


def value_of(figure: Any) -> tuple[float | None, int]:
    """A figure's value and its rows, whichever form it has."""
    if isinstance(figure, Mapping):
        return figure["value"], figure["rows"]
    return (None, 0) if figure is None else (float(figure), int(figure))


def share(hits: int, rows: int) -> dict[str, Any]:
    """A share with its interval of 95 % (Wilson, 1927)."""
    if not rows:
        return {"value": None, "rows": 0, "ci95": None}
    center, wide = (
        hits / rows + Z95**2 / (2 * rows),
        Z95 * math.sqrt(hits / rows * (1 - hits / rows) / rows + Z95**2 / (4 * rows**2)),
    )
    scale = 1 + Z95**2 / rows
    low = max(0.0, (center - wide) / scale) if hits else 0.0
    high = min(1.0, (center + wide) / scale) if hits < rows else 1.0
    return {"value": hits / rows, "rows": rows, "ci95": [low, high]}


def number(value: float | None, rows: int) -> dict[str, Any]:
    return {"value": value, "rows": rows}


def quantile(values: Iterable[float], level: float) -> float | None:
    """Linear between the two nearest; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    at = level * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (at - low) * (ordered[high] - ordered[low]))


def _quantile_of(rows: Sequence[Row], column: str, level: float) -> dict[str, Any]:
    values = [row[column] for row in rows if row[column] is not None]
    return number(quantile(values, level), len(values))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
