"""A new version beside the one in use: how its share grows, and what the numbers say, at any moment.

Pure: counts in, a decision with its numbers out; no clock, no disk, no randomness. It lies low because everything that
replaces one version by another decides by it. :mod:`~slmops.rollout.sequential` has the tests,
:mod:`~slmops.rollout.decide` the rules, :mod:`~slmops.rollout.tally` what is counted.
"""

from slmops.rollout.decide import Decision, Finding, Policy, decide
from slmops.rollout.sequential import Arm, Paired, interval
from slmops.rollout.tally import MEASURES, Tally

__all__ = ["MEASURES", "Arm", "Decision", "Finding", "Paired", "Policy", "Tally", "decide", "interval"]
