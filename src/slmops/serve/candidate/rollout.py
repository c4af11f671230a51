"""One rollout as it goes on: who gets which version, what was seen, what is decided.

All of it runs in the event loop's thread, but for the writing. :meth:`Rollout.look` decides and writes, about once a
second; everything else only counts. A disk that does not take a decision leaves the step as it is, and the next look
tries again: no request fails for it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slmops.errors import StorageError
from slmops.rollout import Arm, Decision, decide
from slmops.rollout.tally import Version
from slmops.serve.candidate.book import Book, State
from slmops.serve.candidate.reading import Feedback

log = logging.getLogger(__name__)
CALIBRATION_ROWS = 50
"""Answers of the old version that say what is slow."""
REMEMBERED = 20_000
"""Answers that feedback may still come to; older ones are forgotten. They are in memory alone."""
LATENCIES_SHOWN = 1000


@dataclass(frozen=True)
class Seen:
    """One answer of one version. ``answer`` is None where it cannot be read; ``latency_ms`` to its last byte."""

    id: str | None
    answered: bool
    latency_ms: float
    answer: str | None = None


@dataclass(frozen=True)
class _Remembered:
    """An answer that was given, in which step, and what the other version said where it shadowed."""

    version: Version
    step: int
    answer: str | None
    shadow: str | None = None


def fraction(key: str, subject: str) -> float:
    """Where in [0, 1) a subject stands: the same for as long as the key is, and nobody without it can tell."""
    digest = hmac.new(bytes.fromhex(key), subject.encode("utf-8", "replace"), hashlib.sha256).digest()
    return int.from_bytes(digest[:8]) / 2**64


class Rollout:
    """See the module. ``state`` is replaced, never changed."""

    def __init__(self, book: Book, state: State) -> None:
        self.book = book
        self.state = state
        self.last: Decision | None = None
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()
        self._old_ms: list[float] = []
        self._shown_ms: dict[Version, deque[float]] = {
            "old": deque(maxlen=LATENCIES_SHOWN),
            "new": deque(maxlen=LATENCIES_SHOWN),
        }
        self._saved = state

    @property
    def running(self) -> bool:
        return self.state.outcome == "running"

    @property
    def shadowing(self) -> bool:
        return self.running and self.state.step < 0

    def version_for(self, subject: str) -> Version:
        """Who answers ``subject``. As the share grows, whoever has the candidate keeps it."""
        return "new" if fraction(self.state.key, subject) < self.state.share else "old"

    # --- what is seen -----------------------------------------------------------------------------------------

    def saw(self, version: Version, seen: Seen) -> None:
        """An answer to a caller."""
        self._learn(version, seen)
        if not self.running or self.shadowing:
            return
        tally = self.state.tally.seen(version, "answered", float(seen.answered))
        if seen.answered and self.state.slow_ms is not None:
            tally = tally.seen(version, "quick", float(seen.latency_ms <= self.state.slow_ms))
        self.state = replace(self.state, tally=tally)
        self._remember(seen, _Remembered(version, self.state.step, seen.answer))

    def saw_both(self, old: Seen, new: Seen) -> None:
        """The answer that a caller got, and what the candidate said to the same request. Counted while it shadows."""
        if not self.shadowing:
            return
        self._shown_ms["new"].append(new.latency_ms)
        tally = self.state.tally.paired("answered", old.answered, new.answered)
        if old.answered and new.answered:
            if (slow_ms := self.state.slow_ms) is not None:
                tally = tally.paired("quick", old.latency_ms <= slow_ms, new.latency_ms <= slow_ms)
            tally = replace(tally, agreement=tally.agreement.add(float(_same(old.answer, new.answer))))
        self.state = replace(self.state, tally=tally)
        self._remember(old, _Remembered("old", self.state.step, old.answer, new.answer))

    def heard(self, feedback: Feedback) -> bool:
        """Whether the feedback counted: once an answer, and in the step in which the answer was given."""
        known = self._remembered.pop(feedback.id, None)
        if known is None or known.step != self.state.step or not self.running:
            return False
        score = feedback.score
        if score is None:
            score = float(_same(known.answer, feedback.correction))
        tally = self.state.tally
        if not self.shadowing:
            self.state = replace(self.state, tally=tally.seen(known.version, "score", score))
            return True
        right = feedback.correction or (known.answer if score >= 0.5 else None)
        if known.shadow is None or right is None:
            return False
        self.state = replace(
            self.state, tally=tally.paired("score", _same(known.answer, right), _same(known.shadow, right))
        )
        return True

    def dropped(self) -> None:
        """A request was not shadowed."""
        self.state = replace(self.state, tally=replace(self.state.tally, dropped=self.state.tally.dropped + 1))

    def undone(self) -> None:
        """The candidate failed a caller, and the old version answered."""
        self.state = replace(self.state, tally=replace(self.state.tally, undone=self.state.tally.undone + 1))

    # --- what is decided --------------------------------------------------------------------------------------

    async def look(self) -> Decision | None:
        """Decide by what was seen so far, and have that on disk; None where the rollout is over already."""
        if not self.running:
            return None
        state = self.state
        self.last = decision = decide(state.policy, state.step, state.tally)
        try:
            if decision.action != "stay":
                await asyncio.to_thread(self.book.note, state, decision.action, _told(state, decision))
                self.state = replace(self.state.after(decision.action), number=state.number + 1)
                log.info("rollout: %s. %s", self.state.stage, decision.why)
            if (state := self.state) != self._saved:
                await asyncio.to_thread(self.book.save, state)
                self._saved = state
        except StorageError as error:
            log.error("%s", error)
        return decision

    def status(self) -> dict[str, Any]:
        """For people and for metrics: the step, what was seen in it by version, and how it looks."""
        state = self.state
        return {
            "old": state.old,
            "new": state.new,
            "stage": state.stage,
            "share": state.share,
            "outcome": state.outcome,
            "requests": state.tally.requests,
            "versions": {version: self._of_version(version) for version in ("old", "new")},
            "agreement": _mean(state.tally.agreement),
            "dropped": state.tally.dropped,
            "undone": state.tally.undone,
            "slow_ms": state.slow_ms,
            "last": None if self.last is None else self.last.to_json(),
        }

    def _of_version(self, version: Version) -> Mapping[str, Any]:
        arms = {measure: self.state.tally.arm(version, measure) for measure in ("answered", "score")}
        times = sorted(self._shown_ms[version])
        return {
            "digest": self.state.old if version == "old" else self.state.new,
            "requests": arms["answered"].rows,
            "failures": arms["answered"].rows - int(arms["answered"].total),
            "feedback": arms["score"].rows,
            "score": _mean(arms["score"]),
            "latency_ms": {"p50": _at(times, 0.5), "p95": _at(times, 0.95)},
        }

    def _learn(self, version: Version, seen: Seen) -> None:
        if not seen.answered:
            return
        self._shown_ms[version].append(seen.latency_ms)
        if self.state.slow_ms is None and version == "old":
            self._old_ms.append(seen.latency_ms)
            if len(self._old_ms) >= CALIBRATION_ROWS:
                slow_ms = self.state.policy.slow_factor * (_at(sorted(self._old_ms), 0.95) or 0.0)
                self.state = replace(self.state, slow_ms=slow_ms)

    def _remember(self, seen: Seen, answer: _Remembered) -> None:
        if seen.id is None or not seen.answered:
            return
        self._remembered[seen.id] = answer
        if len(self._remembered) > REMEMBERED:
            self._remembered.popitem(last=False)


def _told(state: State, decision: Decision) -> dict[str, Any]:
    return {
        "step": state.stage,
        "why": decision.why,
        "findings": [one.to_json() for one in decision.findings],
        "requests": state.tally.requests,
        "agreement": _mean(state.tally.agreement),
        "dropped": state.tally.dropped,
        "undone": state.tally.undone,
    }


def _same(answer: str | None, other: str | None) -> bool:
    return answer is not None and other is not None and answer.strip() == other.strip()


def _mean(arm: Arm) -> float | None:
    return arm.mean if arm.rows else None


def _at(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
