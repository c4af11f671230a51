"""Which of many students to train, and how long: the decisions of a search for the smallest model that passes.

Pure: values, numbers and scores in, choices out. Training and measuring is the pipeline's business.

The search is successive halving over rungs of effort (K. Jamieson, A. Talwalkar, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization", arXiv:1502.07943) with the ranking of several objectives at once by
fronts of what nothing beats (K. Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002):
score, bytes and latency pull apart, and one number for all three would decide for the user what a byte is worth.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.recipe import CompressConfig, Precision, Range, Values

BITS: Mapping[Precision, float] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}
"""Of one weight, without scales: for estimates that must not be too high."""
ETA = 3
"""Each rung keeps one in so many, and trains so many times longer."""
GRID_STEPS = 5
"""Values tried of a range that names no step."""


@dataclass(frozen=True)
class Point:
    """A candidate among others: ``score`` the higher the better, ``costs`` the lower the better, each in its unit."""

    id: str
    score: float
    costs: tuple[float, ...]

    def beats(self, other: Point) -> bool:
        """At least as good in everything, and better in something."""
        as_good = self.score >= other.score and all(a <= b for a, b in zip(self.costs, other.costs, strict=True))
        return as_good and (self.score, self.costs) != (other.score, other.costs)


def candidates(space: Mapping[str, Values], most: int, seed: int) -> list[dict[str, Any]]:
    """Every combination of the values in ``space``, or ``most`` of them drawn without repeats, the same for a seed.

    A range without a step gives :data:`GRID_STEPS` values, evenly spaced (in their logarithm where it says so).
    """
    axes = [[(key, value) for value in values_of(spec)] for key, spec in space.items()]
    total = math.prod(len(axis) for axis in axes)
    rng = random.Random(seed)
    chosen = range(total) if total <= most else sorted(rng.sample(range(total), most))
    found = []
    for number in chosen:
        values = {}
        for axis in reversed(axes):
            number, place = divmod(number, len(axis))
            key, value = axis[place]
            values[key] = value
        found.append({key: values[key] for key in space})
    return found


def values_of(spec: Values) -> list[Any]:
    """The values of one key, in order, without repeats."""
    if not isinstance(spec, Range):
        return list(spec)
    low, high = spec.low, spec.high
    if spec.step is not None:
        values = [low + number * spec.step for number in range(int((high - low) / spec.step + 1e-9) + 1)]
    elif spec.log:
        values = [low * (high / low) ** (number / (GRID_STEPS - 1)) for number in range(GRID_STEPS)]
    else:
        values = [low + (high - low) * number / (GRID_STEPS - 1) for number in range(GRID_STEPS)]
    rounded = [round(value) for value in values] if spec.whole else [float(f"{value:.4g}") for value in values]
    return list(dict.fromkeys(rounded))


def layer_parameters(hidden_size: int, intermediate_size: int, attention_size: int, key_value_size: int) -> int:
    """Weights of one layer with a gated feed-forward part, without norms and biases."""
    attention = 2 * hidden_size * attention_size + 2 * hidden_size * key_value_size
    return attention + 3 * hidden_size * intermediate_size


def fewest_bits(config: CompressConfig) -> float:
    """Of a weight in the smallest variant that is asked for; 0 where another tool decides it."""
    named = [_bits_in(one.stored_as) for one in config.formats]
    return min([BITS[one] for one in config.precisions] + [one.bits for one in config.quantize] + named)


def _bits_in(quantization: str) -> float:
    """The number in ``q4_k_m``, ``int8``, ``bf16`` …, which is the least that a weight takes."""
    number = re.search(r"\d+", quantization)
    return float(number[0]) if number else 0.0


def bytes_at_least(layers: int, parameters_each: int, bits: float) -> int:
    """What the layers alone take in so many bits a weight: vocabulary, norms and scales come on top."""
    return int(layers * parameters_each * bits / 8)


def efforts(rungs: int) -> list[float]:
    """Share of the whole training at each rung, the last one 1."""
    return [ETA ** (rung - rungs + 1) for rung in range(rungs)]


def seats(count: int, rungs: int) -> list[int]:
    """How many candidates each rung has."""
    return [max(1, math.ceil(count / ETA**rung)) for rung in range(rungs)]


def fronts(points: Sequence[Point]) -> list[list[Point]]:
    """``points`` in ranks: those that nothing beats, those that only these beat, and so on; each by falling score."""
    left, found = list(points), []
    while left:
        front = [one for one in left if not any(other.beats(one) for other in left)]
        found.append(sorted(front, key=lambda point: (-point.score, point.costs, point.id)))
        left = [one for one in left if one not in front]
    return found


def promoted(points: Sequence[Point], fitting: Sequence[str], count: int) -> list[str]:
    """The ids of the ``count`` that go on: those that fit the budget before those that do not, then front by front.

    A front that does not go on whole is thinned evenly from its best score to its lowest cost: its ends are what a
    user may want, and at little effort nobody knows yet which of its scores will pass.
    """
    chosen: list[str] = []
    inside = set(fitting)
    for group in ([p for p in points if p.id in inside], [p for p in points if p.id not in inside]):
        for front in fronts(group):
            room = count - len(chosen)
            if room <= 0:
                return chosen
            kept = front if len(front) <= room else _evenly(front, room)
            chosen += [point.id for point in kept]
    return chosen


def _evenly(front: Sequence[Point], room: int) -> list[Point]:
    if room == 1:
        return [front[0]]
    return [front[round(number * (len(front) - 1) / (room - 1))] for number in range(room)]


def with_effort(epochs: float, effort: float) -> float:
    """Epochs at a share of the effort, to four digits: what is trained is what the recipe says."""
    return float(f"{epochs * effort:.4g}")
