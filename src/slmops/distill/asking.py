"""Asking so that nothing is asked twice and no limit is passed: the journal, the teacher and the limits of one run.

Guarantees: what the journal knows is not asked; each answer is in the journal before anything else is done with it; the
limits hold over all that a run asks (rows, judge, new texts), with what earlier runs paid for the same requests counted
for the budgets. When a limit is reached, everything in flight is waited for and kept, then the run ends.

Order of asking: by request digest, so that the first hundred answers are a fair sample.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

from slmops.distill.budget import Limits, money
from slmops.distill.journal import Journal
from slmops.distill.retry import NOT_ASKED
from slmops.distill.teachers import TeacherFailure, TextTeacher
from slmops.errors import TeacherError
from slmops.recipe import PricesConfig, TeacherConfig
from slmops.runtime import Generation, GenerationRequest

logger = logging.getLogger(__name__)

OnOutcome = Callable[[str, Generation | TeacherFailure], None]
"""(digest of the request, what came of it), once for each request that was asked or known."""
_Outcomes = Generator[tuple[int, Generation | TeacherFailure], None, None]


class Asking:
    """One run's requests. ``prompt_tokens``, ``completion_tokens`` and ``money`` are of all that was used so far."""

    def __init__(self, journal: Journal, config: TeacherConfig) -> None:
        self.journal = journal
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.money = 0.0
        self.currency: str | None = None
        self._config = config
        self._begun_s = time.monotonic()

    def fill(
        self, teacher: TextTeacher, requests: Mapping[str, GenerationRequest], on_outcome: OnOutcome
    ) -> dict[str, TeacherFailure]:
        """Fill the journal with answers to ``requests`` (by digest); what it still lacks comes back as failures.

        Raises:
            TeacherError: the teacher's own, and where a limit was reached.
        """
        prices: PricesConfig | None = getattr(teacher, "prices", None)
        pending: list[str] = []
        for digest in requests:
            if (known := self.journal.get(digest)) is None:
                pending.append(digest)
            else:
                self._count(known, prices)
                on_outcome(digest, known)
        pending.sort()
        logger.info("%d answers are known, %d are asked for.", len(requests) - len(pending), len(pending))
        failures: dict[str, TeacherFailure] = {}
        if not pending:
            return failures
        answers = teacher.answer([requests[digest] for digest in pending], limits=self._left())
        stopped: TeacherFailure | None = None
        unasked = 0
        with closing(_each(answers)) as outcomes:
            for index, outcome in outcomes:
                digest = pending[index]
                if isinstance(outcome, Generation):
                    self.journal.add(digest, outcome)
                    self._count(outcome, prices)
                else:
                    failures[digest] = outcome
                    if outcome.kind in NOT_ASKED:
                        stopped, unasked = outcome, unasked + 1
                        continue
                on_outcome(digest, outcome)
        if stopped is not None:
            raise self._ended(stopped, unasked)
        return failures

    def spent(self) -> dict[str, Any]:
        """For the summary; money only where a price is known."""
        told: dict[str, Any] = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        if self.currency is not None:
            told |= {"money": round(self.money, 6), "currency": self.currency}
        return told

    def _count(self, answer: Generation, prices: PricesConfig | None) -> None:
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        if prices is not None:
            self.currency = prices.currency
            self.money += money(prices, answer.prompt_tokens, answer.completion_tokens)

    def _left(self) -> Limits:
        config, used = self._config, self.prompt_tokens + self.completion_tokens
        passed_s = time.monotonic() - self._begun_s
        return Limits(
            None if config.budget_tokens is None else max(0, config.budget_tokens - used),
            None if config.budget_money is None else max(0.0, config.budget_money - self.money),
            None if config.time_limit_s is None else max(0.0, config.time_limit_s - passed_s),
        )

    def _ended(self, stopped: TeacherFailure, unasked: int) -> TeacherError:
        config, used = self._config, self.prompt_tokens + self.completion_tokens
        left = f"{len(self.journal):,} answers are kept, and {unasked:,} requests were not asked."
        if stopped.kind == "time_limit":
            return TeacherError(
                f"The time is over: teacher.time_limit_s is {config.time_limit_s:g}. {left}",
                remedy="Run again to ask for the rest, or raise teacher.time_limit_s.",
            )
        spent = []
        if config.budget_tokens is not None:
            spent.append(f"{used:,} of teacher.budget_tokens = {config.budget_tokens:,} were used")
        if config.budget_money is not None:
            spent.append(
                f"{self.money:.4g} of teacher.budget_money = {config.budget_money:g} {self.currency or ''}".strip()
                + " were paid"
            )
        kind = "token budget" if config.budget_money is None else "budget"
        return TeacherError(
            f"The {kind} is spent, or too little is left for another request: {', '.join(spent)}. {left}",
            remedy=f"Raise {' or '.join(self._budget_keys())} and run again, or ask for fewer rows (data.limit) or "
            "shorter answers (teacher.max_tokens).",
        )

    def _budget_keys(self) -> list[str]:
        keys = ("budget_tokens", "budget_money")
        return [f"teacher.{key}" for key in keys if getattr(self._config, key) is not None]


def _each(answers: Iterator[tuple[int, Generation | TeacherFailure]]) -> _Outcomes:
    """The same, closable: closing it stops the teacher's work where that is possible."""
    yield from answers
