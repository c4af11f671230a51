"""Which variant goes into the bundle: of those whose gates all hold, the one that costs the device least.

Pure: measured candidates in, a choice and its gates out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from slmops.evaluate.estimate import DeviceEstimate
from slmops.evaluate.gates import Gate, budget_gates, format_gate, measure_gates, parity_gate, retention_gate
from slmops.evaluate.measure import Measurement
from slmops.evaluate.scores import Scores
from slmops.recipe import BudgetConfig, GatesConfig


@dataclass(frozen=True)
class Candidate:
    """A variant with what was found out about it. ``size_bytes``: all files that the device must hold.

    ``estimate``  it on the budget's device, where the budget names one
    ``drift``     gates over how far the steps to it moved the model (:mod:`slmops.evaluate.parity`)
    ``further``   gates over what it can do beside its task (:mod:`slmops.evaluate.benchmarks`)
    """

    id: str
    size_bytes: int
    scores: Scores
    measurement: Measurement
    estimate: DeviceEstimate | None = None
    drift: tuple[Gate, ...] = ()
    further: tuple[Gate, ...] = ()

    @property
    def cost(self) -> tuple[float, int]:
        """Bytes times p50 latency (ms), then bytes: halving either is worth the same."""
        return self.size_bytes * self.measurement.latency_ms["p50"], self.size_bytes


def gates_of(
    way: Sequence[Candidate], teacher: Scores, limits: GatesConfig, budget: BudgetConfig, seed: int
) -> list[Gate]:
    """The gates of the last candidate of ``way``: against the teacher, the budget, and step by step along the way.

    ``way`` holds the forms that the weights went through, for example as trained, fp32 graph, int8 graph.
    """
    last = way[-1]
    steps = [
        parity_gate(before.scores, after.scores, limits.parity, name=f"parity {before.id} → {after.id}", seed=seed)
        for before, after in itertools.pairwise(way)
    ]
    return [
        retention_gate(last.scores, teacher, limits.retention),
        format_gate(last.scores, limits.format_valid),
        *measure_gates(last.scores, limits.metrics),
        *steps,
        *last.drift,
        *last.further,
        *budget_gates(budget, last.size_bytes, last.measurement, last.estimate),
    ]


def choose(judged: Sequence[tuple[Candidate, list[Gate]]]) -> tuple[Candidate, list[Gate]]:
    """The cheapest that passes; where none does, the one that fails the fewest gates, then the best score.

    Raises:
        ValueError: there is nothing to choose from.
    """
    passing = [pair for pair in judged if all(gate.passed for gate in pair[1])]
    if passing:
        return min(passing, key=lambda pair: pair[0].cost)
    return max(judged, key=lambda pair: (-sum(not gate.passed for gate in pair[1]), pair[0].scores.value))
