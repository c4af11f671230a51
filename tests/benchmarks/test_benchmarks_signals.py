"""When the ablation of signals counts as passed."""

from __future__ import annotations

import pytest
from benchmarks.signals import judged, table

GOLD = [0.0, 1.0] * 20
BETTER = [1.0, 1.0] * 20
WORSE = [0.0, 0.0] * 20


@pytest.mark.parametrize(
    ("values", "quick", "passed"),
    [
        (BETTER, True, True),
        (BETTER, False, True),
        (GOLD, True, False),  # the signal did not reach the student
        (GOLD, False, False),
        (WORSE, True, False),
        ([1.0, 1.0, *GOLD[2:]], True, True),  # a gain within noise
        ([1.0, 1.0, *GOLD[2:]], False, False),
    ],
)
def test_a_quick_look_is_judged_too(values: list[float], quick: bool, passed: bool) -> None:
    weights = {"gold": ["a"], "forward_kl": ["a" if values is GOLD else "b"]}
    tables = {"closed": table({"gold": GOLD, "forward_kl": values}, weights)}
    assert judged(tables, tables["closed"][1], quick=quick)["passed"] is passed
