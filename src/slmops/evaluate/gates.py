"""Does it hold: quality floors, parity after a transformation, the device's budget, and the verdict in one sentence.

Pure: scores and measurements in, gates out. A gate that cannot be judged (no measurement) is not made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slmops.evaluate.estimate import DeviceEstimate, Estimate
from slmops.evaluate.measure import Measurement
from slmops.evaluate.scores import Scores
from slmops.evaluate.significance import PairedTest, compare
from slmops.recipe import BudgetConfig, Floor

MB = 1_000_000  # bytes; a budget's megabytes are decimal, as a disk's label has them
ROUNDING = 1e-9  # a floor of 0.9 must not fail 0.9 for the last bit of a division

Direction = Literal["at_least", "at_most"]


@dataclass(frozen=True)
class Gate:
    """``value`` must be ``direction`` ``limit``. ``note`` says in words what the numbers alone do not."""

    name: str
    value: float
    limit: float
    passed: bool
    unit: str
    direction: Direction
    note: str = ""
    test: PairedTest | None = None

    def to_json(self) -> dict[str, Any]:
        raw: dict[str, Any] = {
            "name": self.name,
            "value": self.value,
            "limit": self.limit,
            "passed": self.passed,
            "unit": self.unit,
            "direction": self.direction,
            "note": self.note,
        }
        return {**raw, "test": self.test.to_json()} if self.test else raw


def at_least(name: str, value: float, limit: float, unit: str = "", note: str = "") -> Gate:
    return Gate(name, value, limit, value >= limit - ROUNDING * max(1.0, abs(limit)), unit, "at_least", note)


def at_most(name: str, value: float, limit: float, unit: str = "", note: str = "") -> Gate:
    return Gate(name, value, limit, value <= limit + ROUNDING * max(1.0, abs(limit)), unit, "at_most", note)


def retention(student: Scores, teacher: Scores) -> float:
    """Student's score / teacher's score. Of a teacher that scores 0: 1 if the student scores more, else 0."""
    if teacher.value > 0:
        return student.value / teacher.value
    return 1.0 if student.value > 0 else 0.0


def retention_gate(student: Scores, teacher: Scores, limit: float) -> Gate:
    note = "" if teacher.value > 0 else f"The teacher's {teacher.metric} is 0, so there was nothing to retain."
    return at_least("retention", retention(student, teacher), limit, "share", note)


def format_gate(student: Scores, limit: float) -> Gate:
    """The share of answers in the form that their reader needs.

    Raises:
        ValueError: the scores have no ``format_valid``.
    """
    if "format_valid" not in student.others:
        raise ValueError("these scores do not say how many answers had a valid form")
    return at_least("format_valid", student.others["format_valid"], limit, "share")


def measure_gates(scores: Scores, limits: Mapping[str, str]) -> list[Gate]:
    """One gate for each limit of ``gates.metrics``.

    Raises:
        ValueError: the scores have no such figure (checked before work by :func:`slmops.pipeline.judge.check_metrics`).
    """
    gates = []
    for name, text in limits.items():
        value, own = scores.figure(name), scores.measures.get(name)
        if value is None:
            raise ValueError(f"these scores have no {name}")
        note = "" if own is None or own.ci95 is None else f"95 % interval {own.ci95[0]:.3g} to {own.ci95[1]:.3g}."
        gates.append(floor_gate(name, value, text, note=note))
    return gates


def floor_gate(name: str, value: float, limit: str, *, note: str = "") -> Gate:
    """``limit`` as the recipe writes it: ``">= 3"``."""
    floor = Floor.parse(limit)
    return (at_least if floor.direction == "at_least" else at_most)(name, value, floor.limit, note=note)


def parity_gate(before: Scores, after: Scores, allowed_share: float, *, name: str = "parity", seed: int = 0) -> Gate:
    """A transformation may cost ``allowed_share`` of the score before it; more fails, whether or not it is noise.

    The paired test says whether the change is beyond noise.

    Raises:
        ValueError: the two were not scored by one metric on the same number of rows.
    """
    if before.metric != after.metric:
        raise ValueError(f"{before.metric} before and {after.metric} after cannot be compared")
    test = compare(before.per_row, after.per_row, seed=seed)
    gate = at_least(name, after.value, before.value * (1 - allowed_share), before.metric)
    return Gate(**{**vars(gate), "note": _change_in_words(test), "test": test})


def _change_in_words(test: PairedTest) -> str:
    if test.a_only == test.b_only == 0:
        return "No row changed."
    change = f"{100 * abs(test.difference):.2f} points {'lost' if test.difference < 0 else 'gained'}"
    if test.difference == 0:
        return f"As many rows won as lost ({test.a_only})."
    noise = "beyond noise" if test.significant else "within noise"
    return f"{change}, {noise} ({p_in_words(test.p_value)})."


def budget_gates(
    budget: BudgetConfig, size_bytes: int, measurement: Measurement, estimate: DeviceEstimate | None = None
) -> list[Gate]:
    """One gate for each limit that the budget states, or that its device sets.

    ``estimate``  the model on the budget's device: latency and tokens a second are then judged by it, and say so
    """
    budget = budget.with_device()
    latency, latency_note = _moved(
        measurement.latency_ms["p95"], estimate.latency_ms["p95"] if estimate else None, estimate
    )
    gates = []
    if budget.size_mb is not None:
        gates.append(at_most("size_mb", size_bytes / MB, budget.size_mb, "MB"))
    if budget.memory_mb is not None:
        gates.append(
            at_most(
                "memory_mb",
                measurement.memory_bytes_peak / MB,
                budget.memory_mb,
                "MB",
                _held_memory(measurement.limits),
            )
        )
    if budget.latency_ms_p95 is not None:
        gates.append(at_most("latency_ms_p95", latency, budget.latency_ms_p95, "ms", latency_note))
    if budget.tokens_per_s is not None and measurement.tokens_per_s is not None:
        speed, note = _moved(measurement.tokens_per_s, estimate.tokens_per_s if estimate else None, estimate)
        gates.append(at_least("tokens_per_s", speed, budget.tokens_per_s, "tokens/s", note))
    return gates


def _moved(here: float, there: Estimate | None, estimate: DeviceEstimate | None) -> tuple[float, str]:
    """The figure that is judged, and in words where it is from."""
    if there is None or estimate is None:
        return here, ""
    return there.value, (
        f"Estimate for {estimate.device}, expected from {there.low:.3g} to {there.high:.3g}; measured here {here:.3g}."
    )


def _held_memory(limits: Mapping[str, Any] | None) -> str:
    if not limits or not limits.get("memory_bytes"):
        return ""
    held = f"{limits['memory_bytes'] / MB:,.0f} MB"
    if limits.get("fits") is False:
        return f"It did not run in {held}; measured without that limit."
    return f"Measured in a process held to {held}."


def p_in_words(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}" if p_value < 0.1 else f"p = {p_value:.2f}"


def verdict(
    student: Scores,
    teacher: Scores,
    *,
    gates: Sequence[Gate] = (),
    baselines: Mapping[str, Scores] | None = None,
    seed: int = 0,
) -> str:
    """One plain sentence: what was kept, which gates hold, and whether something simpler does as well.

    ``baselines``  display name -> scores on the same rows, for example ``{"TF-IDF with a linear model": ...}``
    """
    return f"{_kept(student, teacher, seed)}; {_held(gates)}; {_simpler(student, baselines or {}, seed)}."


def _kept(student: Scores, teacher: Scores, seed: int) -> str:
    metric = _METRIC_WORDS.get(student.metric, student.metric)
    figures = f"{_percent(student.value)} against {_percent(teacher.value)}"
    if teacher.value <= 0:
        return f"The teacher's {metric} is 0, so there was nothing to keep (the student's is {_percent(student.value)})"
    test = _paired(teacher, student, seed)
    apart = "" if test is None else f", {_beyond(test)}"
    return f"The student keeps {_percent(retention(student, teacher))} of the teacher's {metric} ({figures}{apart})"


def _held(gates: Sequence[Gate]) -> str:
    failed = [gate.name for gate in gates if not gate.passed]
    if not gates:
        return "no gate was set"
    if not failed:
        return "the one gate holds" if len(gates) == 1 else f"all {len(gates)} gates hold"
    return f"{len(failed)} of {len(gates)} gates {'fails' if len(failed) == 1 else 'fail'} ({', '.join(failed)})"


def _simpler(student: Scores, baselines: Mapping[str, Scores], seed: int) -> str:
    if not baselines:
        return "no baseline was measured"
    name, best = max(baselines.items(), key=lambda pair: pair[1].value)
    test = _paired(student, best, seed)
    apart = "" if test is None else f", {_beyond(test)}"
    points = f"{100 * abs(best.value - student.value):.1f} points"
    if best.value > student.value:
        return f"a baseline is better: {name} reaches {_percent(best.value)}, {points} more{apart}"
    if best.value == student.value:
        return f"a baseline is as good: {name} reaches {_percent(best.value)} too"
    return f"it is {points} above the best baseline, {name}{apart}"


_METRIC_WORDS = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "numeric_match": "right final numbers",
    "rouge_l": "ROUGE-L",
    "slot_f1": "slot F1",
}


def _paired(a: Scores, b: Scores, seed: int) -> PairedTest | None:
    """The paired test where both were scored on the same rows; a baseline read from elsewhere may not have been."""
    return compare(a.per_row, b.per_row, seed=seed) if len(a.per_row) == len(b.per_row) else None


def _beyond(test: PairedTest) -> str:
    return f"a difference {'beyond' if test.significant else 'within'} noise, {p_in_words(test.p_value)}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
