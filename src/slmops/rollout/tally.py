"""What was seen of two versions since a step began: counts, and nothing that anybody wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from slmops.rollout.sequential import Arm, Paired

Version = Literal["old", "new"]
Measure = Literal["answered", "quick", "score"]
MEASURES: tuple[Measure, ...] = ("answered", "quick", "score")
"""Answered at all, answered in time, and what callers thought of it: each from 0 to 1, higher is better."""


@dataclass(frozen=True)
class Tally:
    """
    ``arms``       version -> measure -> what was seen, where callers were divided by chance
    ``pairs``      measure -> both versions on the same requests, while the new one only shadows
    ``agreement``  shadowed requests to which both gave the same answer (1) or not (0)
    ``dropped``    requests that were not shadowed because the server had more to do
    ``undone``     requests that the new version failed and the old one answered in its place
    """

    arms: Mapping[Version, Mapping[Measure, Arm]] = field(default_factory=dict)
    pairs: Mapping[Measure, Paired] = field(default_factory=dict)
    agreement: Arm = field(default_factory=Arm)
    dropped: int = 0
    undone: int = 0

    def arm(self, version: Version, measure: Measure) -> Arm:
        return self.arms.get(version, {}).get(measure, Arm())

    def pair(self, measure: Measure) -> Paired:
        return self.pairs.get(measure, Paired())

    @property
    def requests(self) -> int:
        """That the new version was asked, and told of."""
        return self.arm("new", "answered").rows + self.pair("answered").rows

    def seen(self, version: Version, measure: Measure, value: float) -> Tally:
        """One more value in [0, 1] for a version."""
        of_version = {**self.arms.get(version, {}), measure: self.arm(version, measure).add(value)}
        return replace(self, arms={**self.arms, version: of_version})

    def paired(self, measure: Measure, old: bool, new: bool) -> Tally:
        """One more request on which both were seen, each good or not."""
        return replace(self, pairs={**self.pairs, measure: self.pair(measure).add(int(new) - int(old))})

    def to_json(self) -> dict[str, Any]:
        return {
            "arms": {
                version: {measure: [arm.rows, arm.total] for measure, arm in arms.items()}
                for version, arms in self.arms.items()
            },
            "pairs": {measure: [pair.better, pair.same, pair.worse] for measure, pair in self.pairs.items()},
            "agreement": [self.agreement.rows, self.agreement.total],
            "dropped": self.dropped,
            "undone": self.undone,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Tally:
        return cls(
            {version: {measure: Arm(*arm) for measure, arm in arms.items()} for version, arms in raw["arms"].items()},
            {measure: Paired(*pair) for measure, pair in raw["pairs"].items()},
            Arm(*raw["agreement"]),
            int(raw["dropped"]),
            int(raw["undone"]),
        )
