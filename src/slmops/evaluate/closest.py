"""When nothing meets the budget: which candidates are closest, and what each would have to give up.

Pure: judged candidates in, an order and sentences out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slmops.evaluate.choose import Candidate
from slmops.evaluate.gates import Gate

ZERO = 1e-6  # stands for a value or a limit of 0 where a ratio is wanted


@dataclass(frozen=True)
class Shortfall:
    """One gate that does not hold. ``factor``: how many times over the limit, or short of it."""

    gate: str
    value: float
    limit: float
    unit: str
    factor: float
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class NearMiss:
    """A candidate that fails. ``distance``: the sum over its failed gates of the logarithm (base 2) of ``factor``:
    1 is one limit missed by twice."""

    id: str
    distance: float
    shortfalls: tuple[Shortfall, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "distance": self.distance,
            "gives_up": [shortfall.to_json() for shortfall in self.shortfalls],
        }

    @property
    def sentence(self) -> str:
        return f"{self.id} would have to give up: " + "; ".join(one.sentence for one in self.shortfalls) + "."


def closest(judged: Sequence[tuple[Candidate, Sequence[Gate]]]) -> list[NearMiss]:
    """All candidates, the closest first; empty where one of them passes all its gates.

    Candidates that miss by equal distances stand in the order given.
    """
    if any(all(gate.passed for gate in gates) for _, gates in judged):
        return []
    misses = [near_miss(candidate.id, gates) for candidate, gates in judged]
    return sorted(misses, key=lambda miss: miss.distance)


def near_miss(name: str, gates: Sequence[Gate]) -> NearMiss:
    """How far ``name`` is from holding all of ``gates``."""
    shortfalls = tuple(_shortfall(gate) for gate in gates if not gate.passed)
    return NearMiss(name, sum(math.log2(one.factor) for one in shortfalls), shortfalls)


def _shortfall(gate: Gate) -> Shortfall:
    value, limit = max(gate.value, ZERO), max(gate.limit, ZERO)
    over = gate.direction == "at_most"
    factor = max(1.0, value / limit if over else limit / value)
    sentence = f"{gate.name}: {_shown(gate.value, gate)} where {'at most' if over else 'at least'} "
    sentence += f"{_shown(gate.limit, gate)} is asked for ({_times(factor)} {'too much' if over else 'too little'})"
    return Shortfall(gate.name, gate.value, gate.limit, gate.unit, factor, sentence)


def _shown(value: float, gate: Gate) -> str:
    if gate.unit in ("MB", "ms", "tokens/s", "nats"):
        return f"{value:.3g} {gate.unit}" if value < 1000 else f"{value:,.0f} {gate.unit}"
    return f"{100 * value:.1f} %" if abs(value) <= 1 else f"{value:.3g}"


def _times(factor: float) -> str:
    return f"{factor:.2f} times" if factor < 10 else f"{factor:,.0f} times"


def closest_in_words(misses: Sequence[NearMiss], most: int = 3) -> list[str]:
    """Sentences for people, the closest first."""
    if not misses:
        return []
    return [f"Nothing meets the budget. Closest is {misses[0].id}.", *(miss.sentence for miss in misses[:most])]
