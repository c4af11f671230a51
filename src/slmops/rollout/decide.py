"""The rules: when a new version gets a larger share, when it takes over, when it goes back.

A step is the shadow (answers that nobody sees, on the same requests) or a share of the callers. Each step is judged by
what was seen in it alone, so that a morning at 1 % and an evening at 50 % are not mixed.

- **Back**, in any step: a measure is worse than its margin allows. All these tests together give a version that is
  within every margin a chance of at most ``alpha`` of going back, however often they are looked at.
- **Further**: enough was seen, nothing is worse, and nothing looks worse than its margin.
- **Over**, in the last step alone: every measure is proven to be no worse than its margin. A version that is worse than
  the margin of any measure has a chance of at most ``alpha`` of getting there.
- **Back** too, where the last step ends without a proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from slmops.errors import UsageError
from slmops.rollout.sequential import (
    Arm,
    interval,
    log_e_not_worse,
    log_e_paired_not_worse,
    log_e_paired_worse,
    log_e_worse,
)
from slmops.rollout.tally import MEASURES, Measure, Tally

Action = Literal["stay", "further", "over", "back"]


@dataclass(frozen=True)
class Policy:
    """
    ``shares``           of the callers that the new version gets, one step after the other; the last one decides
    ``alpha``            chance of a wrong step back, and of a wrong step over
    ``shadow_requests``  answered in the shadow before the first share; 0: no shadow
    ``step_requests``    that the new version answers in a step before the next one
    ``most_requests``    that it answers in the last step without a proof before it goes back
    ``answered_margin``  how many more of its requests may fail, as a share
    ``quick_margin``     how many more of its answers may be slow
    ``slow_factor``      slow is what takes so many times the 95th percentile of the old version's time
    ``score_margin``     what the callers' mean score, from 0 to 1, may be lower
    ``least_feedback``   answers with feedback, for each version in the last step, from which the score has to be
                         proven; with fewer it is watched for harm alone
    """

    shares: tuple[float, ...] = (0.01, 0.05, 0.25, 0.5)
    alpha: float = 0.05
    shadow_requests: int = 200
    step_requests: int = 100
    most_requests: int = 50_000
    answered_margin: float = 0.01
    quick_margin: float = 0.05
    slow_factor: float = 1.5
    score_margin: float = 0.05
    least_feedback: int = 30

    def __post_init__(self) -> None:
        """Raises :class:`UsageError` for values that contradict each other."""
        growing = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not growing or not 0 < self.shares[0] <= self.shares[-1] < 1:
            raise UsageError(
                f"The shares are {list(self.shares)}.", remedy="Give shares that grow, between 0 and 1: [0.05, 0.5]."
            )
        for name in ("alpha", "answered_margin", "quick_margin", "score_margin"):
            if not 0 < getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}.", remedy="Give a share between 0 and 1.")
        for name in ("shadow_requests", "step_requests", "most_requests", "least_feedback"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} is {getattr(self, name)}.", remedy="Give 0 or more.")
        if self.slow_factor < 1:
            raise UsageError(f"slow_factor is {self.slow_factor}.", remedy="Give 1 or more.")

    def margin(self, measure: Measure) -> float:
        margins: dict[Measure, float] = {
            "answered": self.answered_margin,
            "quick": self.quick_margin,
            "score": self.score_margin,
        }
        return margins[measure]

    @property
    def log_harm(self) -> float:
        """What evidence of harm must reach: all steps and measures share ``alpha``."""
        return math.log((1 + len(self.shares)) * len(MEASURES) / self.alpha)

    @property
    def log_proof(self) -> float:
        """What evidence of no harm must reach: it is looked for in one step, and all measures must have it."""
        return math.log(1 / self.alpha)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "shares": list(self.shares)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Policy:
        """Raises :class:`UsageError` for unknown names and values of another type."""
        known = {one.name: one for one in fields(cls)}
        if unknown := sorted(raw.keys() - known.keys()):
            raise UsageError(f"Unknown key {unknown[0]} in the policy.", remedy=f"Known are {', '.join(known)}.")
        values: dict[str, Any] = {}
        for name, value in raw.items():
            listed = value if isinstance(value, list | tuple) else [value]
            if (name == "shares") != isinstance(value, list | tuple) or not all(
                isinstance(one, int | float) and not isinstance(one, bool) for one in listed
            ):
                raise UsageError(f"{name} is {value!r} in the policy.", remedy="Give a number; shares: [0.05, 0.5].")
            values[name] = tuple(map(float, listed)) if name == "shares" else value
        return cls(**values)


@dataclass(frozen=True)
class Finding:
    """One measure in one step. ``rows`` and ``arms``: of the old and the new version; in the shadow only differences
    are known, and there are no arms. ``difference``: of the means, None where one is not there. ``log_harm`` and
    ``log_proof``: logarithms of e-values."""

    measure: Measure
    rows: tuple[int, int]
    difference: float | None
    margin: float
    log_harm: float
    log_proof: float
    alpha: float
    arms: tuple[Arm, Arm] | None = None

    @property
    def means(self) -> tuple[float | None, float | None]:
        """Old and new; None where nothing was seen."""
        old, new = self.arms or (Arm(), Arm())
        return (old.mean if old.rows else None), (new.mean if new.rows else None)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Holds the difference at all times together with probability 1 - alpha."""
        if self.arms is None or self.difference is None:
            return None
        (old_low, old_high), (new_low, new_high) = (interval(arm, self.alpha / 2) for arm in self.arms)
        return new_low - old_high, new_high - old_low

    def to_json(self) -> dict[str, Any]:
        (old, new), between = self.means, self.interval
        return {
            "measure": self.measure,
            "rows": {"old": self.rows[0], "new": self.rows[1]},
            "old": old,
            "new": new,
            "difference": self.difference,
            "interval": None if between is None else list(between),
            "margin": self.margin,
            "e_harm": _e_value(self.log_harm),
            "e_proof": _e_value(self.log_proof),
        }


@dataclass(frozen=True)
class Decision:
    """``why`` is one sentence."""

    action: Action
    why: str
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return {"action": self.action, "why": self.why, "findings": [one.to_json() for one in self.findings]}


def decide(policy: Policy, step: int, tally: Tally) -> Decision:
    """What to do now. ``step`` -1 is the shadow, 0 the first share."""
    findings = tuple(_found(policy, step, tally, measure) for measure in MEASURES)
    for finding in findings:
        if finding.log_harm >= policy.log_harm:
            return Decision("back", f"{_WORSE[finding.measure]}: {_numbers(finding)}.", findings)
    if step < len(policy.shares) - 1:
        return _further(policy, step, tally, findings)
    return _over(policy, tally, findings)


def _further(policy: Policy, step: int, tally: Tally, findings: tuple[Finding, ...]) -> Decision:
    needed = policy.shadow_requests if step < 0 else policy.step_requests
    if tally.requests < needed:
        return Decision("stay", f"{tally.requests} of {needed} requests seen.", findings)
    if doubtful := [one for one in findings if one.difference is not None and one.difference < -one.margin]:
        return Decision("stay", f"{_DOUBT[doubtful[0].measure]}: {_numbers(doubtful[0])}.", findings)
    return Decision("further", f"{tally.requests} requests seen, and nothing is worse.", findings)


def _over(policy: Policy, tally: Tally, findings: tuple[Finding, ...]) -> Decision:
    required = [one for one in findings if one.measure != "score" or min(one.rows) >= policy.least_feedback]
    open_ = [one for one in required if one.log_proof < policy.log_proof]
    if not open_ and tally.requests >= policy.step_requests:
        said = "Proven no worse: " + "; ".join(f"{one.measure} {_numbers(one)}" for one in required)
        unjudged = "" if len(required) == len(findings) else " Too little feedback to judge the answers by."
        return Decision("over", f"{said}.{unjudged}", findings)
    if tally.requests >= policy.most_requests:
        names = ", ".join(one.measure for one in open_) or "requests"
        return Decision("back", f"Not proven within {tally.requests} requests: {names}.", findings)
    return Decision("stay", "Not proven yet: " + ", ".join(one.measure for one in open_) + ".", findings)


def _found(policy: Policy, step: int, tally: Tally, measure: Measure) -> Finding:
    margin = policy.margin(measure)
    if step < 0:
        pairs = tally.pair(measure)
        return Finding(
            measure,
            (pairs.rows, pairs.rows),
            pairs.mean if pairs.rows else None,
            margin,
            log_e_paired_worse(pairs, margin),
            log_e_paired_not_worse(pairs, margin),
            policy.alpha,
        )
    old, new = tally.arm("old", measure), tally.arm("new", measure)
    seen = bool(old.rows and new.rows)
    return Finding(
        measure,
        (old.rows, new.rows),
        new.mean - old.mean if seen else None,
        margin,
        log_e_worse(new, old, margin),
        log_e_not_worse(new, old, margin),
        policy.alpha,
        (old, new),
    )


_WORSE: dict[Measure, str] = {
    "answered": "More requests fail",
    "quick": "More answers are slow",
    "score": "The answers are worse",
}
_DOUBT: dict[Measure, str] = {
    "answered": "More requests seem to fail",
    "quick": "More answers seem to be slow",
    "score": "The answers seem to be worse",
}


def _numbers(finding: Finding) -> str:
    points = 100 * (finding.difference or 0.0)
    old, new = finding.means
    if old is None or new is None:
        return f"{points:+.1f} points over {finding.rows[1]} requests that both answered"
    seen = f"{finding.rows[1]} and {finding.rows[0]} seen"
    return f"{100 * new:.1f} % after {100 * old:.1f} % ({points:+.1f} points; {seen})"


def _e_value(logarithm: float) -> float:
    """Rounded and bounded, so that it can be written as JSON."""
    return float(f"{math.exp(max(-700.0, min(logarithm, 700.0))):.4g}")
