"""Which answers a judge is asked about, and what is made of what it says. Pure.

Answers are drawn evenly over the window, so that the mean of their scores is that of all answers whose texts are kept.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from slmops.artifacts import Message, Row


def chosen(
    events: Sequence[Mapping[str, Any]], judged: Sequence[str], *, share: float, most: int, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Events to be judged: ``share`` of those with texts, ``most`` at most, less those that were judged before."""
    able = [row for row in events if row["messages"] and row["output"] and row["status"] < 400]
    wanted = min(most, round(share * len(able)))
    done = set(judged)
    left = [row for row in able if row["id"] not in done]
    drawn = random.Random(seed).sample(left, min(len(left), max(0, wanted - (len(able) - len(left)))))
    return sorted(drawn, key=lambda row: (row["at"], row["id"]))


def as_row(event: Mapping[str, Any]) -> Row:
    """The event as a row of data: what was asked, without an answer."""
    turns = json.loads(event["messages"])
    return Row(event["id"], tuple(Message(turn["role"], turn["content"]) for turn in turns))
