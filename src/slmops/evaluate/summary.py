"""``report.json``: what a run has shown, in keys that others rely on.

Guarantees: the keys of :data:`REQUIRED_KEYS` and their shapes stay as they are while ``schema`` is 1 (others may be
added); every number is finite, unknown ones are null; the same inputs give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slmops.evaluate.gates import Gate, retention
from slmops.evaluate.measure import Measurement
from slmops.evaluate.scores import Scores
from slmops.evaluate.significance import PairedTest

SCHEMA = 1
REQUIRED_KEYS = (
    "name",
    "task",
    "schema",
    "machine",
    "metric",
    "teacher",
    "student",
    "variants",
    "baselines",
    "retention",
    "reductions",
    "gates",
    "verdict",
    "bundle",
    "wall_s",
)


@dataclass(frozen=True)
class ModelEntry:
    """One measured model. What cannot be known of it (a remote teacher's size) is None.

    ``id``        the variant's name, for example ``student-int8``
    ``artifact``  digest of the artifact that was measured
    ``extra``     further facts for the report, as plain JSON
    """

    id: str
    scores: Scores
    parameters: int | None = None
    size_bytes: int | None = None
    measurement: Measurement | None = None
    cost_per_1000: float | None = None
    runtime: str = ""
    precision: str | None = None
    artifact: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        measured = self.measurement
        return {
            **self.extra,
            "id": self.id,
            "artifact": self.artifact,
            "score": self.scores.summary(),
            "metrics": dict(self.scores.others),
            "measures": measures_of(self.scores),
            "parameters": self.parameters,
            "size_bytes": self.size_bytes,
            "memory_bytes_peak": measured.memory_bytes_peak if measured else None,
            "latency_ms": dict(measured.latency_ms) if measured else {"p50": None, "p95": None},
            "throughput_per_s": measured.throughput_per_s if measured else None,
            "cost_per_1000": self.cost_per_1000,
            "runtime": self.runtime,
            "precision": self.precision,
            "measurement": measured.to_json() if measured else None,
        }


@dataclass(frozen=True)
class BaselineEntry:
    """Something simpler on the same rows. ``size_bytes`` and ``latency_ms_p50`` where they were measured."""

    scores: Scores
    description: str
    size_bytes: int | None = None
    latency_ms_p50: float | None = None
    artifact: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "description": self.description,
            "score": self.scores.summary(),
            "metrics": dict(self.scores.others),
            "measures": measures_of(self.scores),
            "size_bytes": self.size_bytes,
            "latency_ms": {"p50": self.latency_ms_p50},
            "artifact": self.artifact,
        }


def measures_of(scores: Scores) -> dict[str, Any]:
    """The user's own measures: name -> ``{"value", "ci95"}``; no interval for a figure of all rows together."""
    return {name: measure.to_json() for name, measure in scores.measures.items()}


def reduction(teacher: float | None, student: float | None) -> float | None:
    """0.95: the student needs 95 % less than the teacher. Below 0: it needs more. None where either is not known."""
    if teacher is None or student is None or teacher <= 0:
        return None
    return 1 - student / teacher


def reductions(teacher: ModelEntry, student: ModelEntry) -> dict[str, float | None]:
    """``latency`` (p50), ``memory`` (peak), ``size`` (files), ``cost`` (per 1,000)."""

    def p50(entry: ModelEntry) -> float | None:
        return entry.measurement.latency_ms["p50"] if entry.measurement else None

    def peak(entry: ModelEntry) -> float | None:
        return entry.measurement.memory_bytes_peak if entry.measurement else None

    return {
        "latency": reduction(p50(teacher), p50(student)),
        "memory": reduction(peak(teacher), peak(student)),
        "size": reduction(teacher.size_bytes, student.size_bytes),
        "cost": reduction(teacher.cost_per_1000, student.cost_per_1000),
    }


def build_report(
    *,
    name: str,
    task: str,
    machine: Mapping[str, Any],
    teacher: ModelEntry,
    student: ModelEntry,
    variants: Sequence[ModelEntry],
    baselines: Mapping[str, BaselineEntry],
    gates: Sequence[Gate],
    verdict: str,
    bundle: str,
    wall_s: Mapping[str, float],
    comparisons: Mapping[str, PairedTest] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The report as plain JSON.

    ``bundle``       path of the bundle; empty where none was written
    ``wall_s``       stage -> seconds of work
    ``comparisons``  name -> paired test, for example ``student_vs_untaught``
    ``extra``        further keys; they never replace those of the report

    Raises:
        ValueError: models scored by different metrics.
    """
    metric = student.scores.metric
    scored = (teacher.scores, *(v.scores for v in variants), *(b.scores for b in baselines.values()))
    if others := {scores.metric for scores in scored} - {metric}:
        raise ValueError(f"the student was scored by {metric}, others by {', '.join(sorted(others))}")
    report = {
        **(extra or {}),
        "name": name,
        "task": task,
        "schema": SCHEMA,
        "machine": dict(machine),
        "metric": metric,
        "teacher": teacher.to_json(),
        "student": student.to_json(),
        "variants": [variant.to_json() for variant in variants],
        "baselines": {key: baseline.to_json() for key, baseline in baselines.items()},
        "retention": retention(student.scores, teacher.scores),
        "reductions": reductions(teacher, student),
        "gates": [gate.to_json() for gate in gates],
        "passed": all(gate.passed for gate in gates),
        "verdict": verdict,
        "bundle": bundle,
        "wall_s": dict(wall_s),
        "comparisons": {key: test.to_json() for key, test in (comparisons or {}).items()},
        "classes": [score.to_json() for score in student.scores.classes],
        "confusions": [confusion.to_json() for confusion in student.scores.confusions],
    }
    plain: dict[str, Any] = _plain(report)
    return plain


def _plain(value: Any) -> Any:
    """``value`` with tuples as lists and numbers that JSON cannot carry (NaN, infinity) as null."""
    match value:
        case Mapping():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
        case float():
            return float(value) if math.isfinite(value) else None
        case _:
            return value
