"""What the student has cost, what the teacher would have cost, and when training has paid for itself. Pure arithmetic.

Prices are in one currency. The teacher is priced for the tokens that the student read and wrote: its own tokenizer and
instructions would make other numbers, rather more than fewer. Not covered: people, and energy that the machine does not
tell.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

SECONDS_PER_DAY = 86_400.0
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Use:
    """What was served. ``busy_s``: summed latencies; ``days``: from the first request to the last, at least one hour;
    ``joules``: of the machine while servers ran, None where it does not tell."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    busy_s: float
    days: float
    first_at: float | None = None
    joules: float | None = None


@dataclass(frozen=True)
class Prices:
    """
    ``teacher_input``, ``teacher_output``  a million tokens
    ``machine_hour``   of the serving machine, whether busy or not
    ``training_hour``  of the machine that trained; ``training_s``: how long the run took
    ``kwh``            of energy, where it is measured and not part of the machine's price
    """

    teacher_input: float | None = None
    teacher_output: float | None = None
    machine_hour: float = 0.0
    training_hour: float = 0.0
    training_s: float = 0.0
    kwh: float = 0.0
    currency: str = ""


def use_of(events: Iterable[Mapping[str, Any]], sessions: Iterable[Mapping[str, Any]] = ()) -> Use:
    """Sums over good answers; energy over the sessions that tell it."""
    good = [row for row in events if row["status"] < 400]
    times = [row["at"] for row in good]
    joules = [row["joules"] for row in sessions if row["joules"] is not None]
    days = max((max(times) - min(times)) / SECONDS_PER_DAY, 1 / 24) if times else 0.0
    return Use(
        len(good),
        sum(row["prompt_tokens"] or 0 for row in good),
        sum(row["completion_tokens"] or 0 for row in good),
        sum(row["latency_ms"] for row in good) / 1000,
        days,
        min(times, default=None),
        sum(joules) if joules else None,
    )


def ledger(use: Use, prices: Prices) -> dict[str, Any]:
    """Costs so far, per 1,000 requests, and the day on which training is paid for at this pace.

    ``break_even``: ``{"days", "at", "requests"}`` from the first request on, or None where the student never saves
    anything or the teacher's price is not known; ``at``: seconds since 1970.
    """
    student = serving_cost(use, prices)
    teacher = teacher_cost(use, prices)
    training = prices.training_hour * prices.training_s / 3600
    saved = None if teacher is None else teacher - student
    return {
        "requests": use.requests,
        "prompt_tokens": use.prompt_tokens,
        "completion_tokens": use.completion_tokens,
        "days": use.days,
        "busy_s": use.busy_s,
        "energy_kwh": None if use.joules is None else use.joules / JOULES_PER_KWH,
        "student_cost": student,
        "student_per_1000": _per_1000(student, use),
        "teacher_cost": teacher,
        "teacher_per_1000": _per_1000(teacher, use),
        "training_cost": training,
        "saved": saved,
        "saved_after_training": None if saved is None else saved - training,
        "break_even": break_even(use, training, saved),
        "currency": prices.currency,
    }


def serving_cost(use: Use, prices: Prices) -> float:
    """The machine's hours over the days served, and measured energy."""
    energy = 0.0 if use.joules is None else prices.kwh * use.joules / JOULES_PER_KWH
    return prices.machine_hour * 24 * use.days + energy


def teacher_cost(use: Use, prices: Prices) -> float | None:
    """The same tokens at the teacher's price; None where that is not known."""
    if prices.teacher_input is None or prices.teacher_output is None:
        return None
    return (use.prompt_tokens * prices.teacher_input + use.completion_tokens * prices.teacher_output) / 1e6


def break_even(use: Use, training_cost: float, saved: float | None) -> dict[str, float] | None:
    """When what is saved a day has paid for training, at the pace so far."""
    if saved is None or saved <= 0 or use.days <= 0 or use.first_at is None:
        return None
    days = training_cost / (saved / use.days)
    return {"days": days, "at": use.first_at + days * SECONDS_PER_DAY, "requests": use.requests / use.days * days}


def _per_1000(cost: float | None, use: Use) -> float | None:
    return None if cost is None or not use.requests else 1000 * cost / use.requests
