"""Whole rollouts in a few milliseconds each: how often they end wrongly, and how soon they end."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from slmops.errors import UsageError
from slmops.rollout import MEASURES, Arm, Paired, Policy, Tally, decide
from slmops.rollout.tally import Version

VERSIONS: tuple[Version, Version] = ("old", "new")
POLICY = Policy(shares=(0.05, 0.5), shadow_requests=100, step_requests=50, most_requests=4000, answered_margin=0.02)


@dataclass(frozen=True)
class World:
    """Chances of an answer, of one in time, and of a caller who is content, of both versions."""

    answered: tuple[float, float] = (1.0, 1.0)
    quick: tuple[float, float] = (0.97, 0.97)
    score: tuple[float, float] = (0.9, 0.9)
    feedback: float = 1.0


def simulate(world: World, policy: Policy, seed: int, *, look_every: int = 40) -> tuple[str, int, int]:
    """Outcome, step and requests until it ended. It is looked at every ``look_every`` requests, and may end at any."""
    rng = np.random.default_rng(seed)
    step, requests, tally = -1 if policy.shadow_requests else 0, 0, Tally()
    while True:
        tally = _more(world, policy, step, tally, look_every, rng)
        requests += look_every
        decision = decide(policy, step, tally)
        if decision.action in ("over", "back"):
            return decision.action, step, requests
        if decision.action == "further":
            step, tally = step + 1, Tally()
        if requests > 50_000:
            return "never", step, requests


def _more(world: World, policy: Policy, step: int, tally: Tally, count: int, rng: np.random.Generator) -> Tally:
    """``tally`` after ``count`` more requests, each measure drawn by itself."""
    pairs, arms = dict(tally.pairs), {version: dict(tally.arms.get(version, {})) for version in VERSIONS}
    on_new = rng.random(count) < (policy.shares[step] if step >= 0 else 0)
    heard = rng.random(count) < world.feedback
    for measure in MEASURES:
        counted = heard if measure == "score" else np.ones(count, dtype=bool)
        old, new = (rng.random(count) < chance for chance in getattr(world, measure))
        if step < 0:
            better, worse = int((new & ~old & counted).sum()), int((old & ~new & counted).sum())
            before, same = tally.pair(measure), int(counted.sum()) - better - worse
            pairs[measure] = Paired(before.better + better, before.same + same, before.worse + worse)
            continue
        for version, values, mine in zip(VERSIONS, (old, new), (~on_new, on_new), strict=True):
            chosen, arm = values[mine & counted], tally.arm(version, measure)
            arms[version][measure] = Arm(arm.rows + len(chosen), arm.total + float(chosen.sum()))
    return Tally(arms, pairs)


def outcomes(world: World, policy: Policy = POLICY, runs: int = 12) -> list[tuple[str, int, int]]:
    return [simulate(world, policy, seed) for seed in range(runs)]


def test_an_equal_version_takes_over() -> None:
    found = outcomes(World())
    assert sum(outcome == "over" for outcome, _, _ in found) >= 10
    assert sum(outcome == "back" for outcome, _, _ in found) <= 2  # not proven in time, or alpha


def test_a_better_version_takes_over_sooner() -> None:
    better = outcomes(World(score=(0.85, 0.97)))
    equal = outcomes(World())
    assert all(outcome == "over" for outcome, _, _ in better)
    assert np.median([requests for *_, requests in better]) < np.median([requests for *_, requests in equal])


@pytest.mark.parametrize("world", [World(score=(0.9, 0.85)), World(quick=(0.97, 0.92)), World(answered=(1.0, 0.98))])
def test_a_version_at_the_margin_hardly_ever_takes_over(world: World) -> None:
    policy = replace(POLICY, most_requests=1500)
    assert sum(outcome == "over" for outcome, _, _ in outcomes(world, policy)) <= 1


@pytest.mark.parametrize(
    ("world", "measure"),
    [
        (World(score=(0.9, 0.6)), "The answers are worse"),
        (World(quick=(0.97, 0.5)), "More answers are slow"),
        (World(answered=(1.0, 0.7)), "More requests fail"),
    ],
)
def test_a_bad_version_goes_back_in_the_shadow_before_anybody_meets_it(world: World, measure: str) -> None:
    found = outcomes(world)
    assert all(outcome == "back" for outcome, _, _ in found)
    assert all(step == -1 for _, step, _ in found)
    assert np.median([requests for *_, requests in found]) <= 120
    bad = Tally()
    for _ in range(200):
        bad = bad.paired("answered", True, "fail" not in measure).paired("quick", True, "slow" not in measure)
        bad = bad.paired("score", True, "worse" not in measure)
    assert measure in decide(POLICY, -1, bad).why


def test_a_bad_version_without_a_shadow_goes_back_at_a_small_share() -> None:
    found = outcomes(World(score=(0.9, 0.5)), replace(POLICY, shadow_requests=0))
    assert all((outcome, step) == ("back", 0) for outcome, step, _ in found)


def test_a_version_within_its_margins_goes_back_at_most_so_often() -> None:
    policy = replace(POLICY, most_requests=5000)
    worlds = [World(score=(0.9, 0.87)), World(quick=(0.97, 0.94))]
    ended = [simulate(world, policy, seed) for world in worlds for seed in range(3)]
    harmed = [step for outcome, step, requests in ended if outcome == "back" and step < 1]
    assert harmed == []


def test_without_feedback_it_is_said_what_was_not_judged() -> None:
    tally = Tally()
    for _ in range(1500):
        for version in VERSIONS:
            tally = tally.seen(version, "answered", 1.0).seen(version, "quick", 1.0)
    decision = decide(POLICY, 1, tally)
    assert decision.action == "over"
    assert "Too little feedback" in decision.why
    assert "Too little feedback" not in decide(POLICY, 0, tally).why


def test_some_bad_feedback_still_sends_it_back_though_too_little_to_prove() -> None:
    tally = Tally()
    for _ in range(25):
        tally = tally.seen("old", "score", 1.0).seen("new", "score", 0.0)
    assert decide(POLICY, 1, tally).action == "back"


def test_what_is_never_proven_goes_back() -> None:
    policy = replace(POLICY, most_requests=100)
    tally = Tally()
    for _ in range(100):
        for version in VERSIONS:
            tally = tally.seen(version, "answered", 1.0).seen(version, "quick", 1.0)
    decision = decide(policy, 1, tally)
    assert decision.action == "back"
    assert "Not proven within 100 requests" in decision.why


def test_a_doubtful_step_is_not_left() -> None:
    tally = Tally()
    for number in range(60):
        tally = tally.seen("old", "score", 1.0).seen("new", "score", float(number % 10 != 0)).seen("new", "answered", 1)
    assert decide(POLICY, 0, tally).action == "stay"


def test_a_decision_is_plain_json_with_its_numbers() -> None:
    tally = Tally().seen("old", "score", 1.0).seen("new", "score", 0.0)
    raw = json.loads(json.dumps(decide(POLICY, 1, tally).to_json(), allow_nan=False))
    [score] = [one for one in raw["findings"] if one["measure"] == "score"]
    assert (score["old"], score["new"], score["difference"], score["rows"]) == (1.0, 0.0, -1.0, {"old": 1, "new": 1})
    assert score["interval"][0] <= -1.0 <= score["interval"][1]
    assert Tally.from_json(json.loads(json.dumps(tally.to_json()))) == tally


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"shares": [0.5, 0.1]}, "[0.5, 0.1]"),
        ({"shares": []}, "[]"),
        ({"shares": 0.5}, "0.5"),
        ({"shares": [1.0]}, "[1.0]"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": "small"}, "'small'"),
        ({"alhpa": 0.1}, "Unknown key alhpa"),
        ({"step_requests": -1}, "step_requests is -1"),
        ({"slow_factor": 0.5}, "slow_factor is 0.5"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(raw: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=r".*") as caught:
        Policy.from_json(raw)
    assert said in caught.value.message
    assert caught.value.remedy


def test_a_policy_survives_the_disk() -> None:
    assert Policy.from_json(json.loads(json.dumps(POLICY.to_json()))) == POLICY
