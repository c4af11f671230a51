"""When to ask again, how long to wait, and when to stop asking: decisions only, no clock, no network."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

FailureKind = Literal[
    "connection",
    "timeout",
    "rate_limit",
    "overloaded",
    "server_error",
    "junk",
    "refused_request",
    "refused_format",
    "budget",
    "time_limit",
]
NOT_ASKED = frozenset({"budget", "time_limit"})
"""Failures of requests that never left."""

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
"""A server that wants a longer pause ends the run: it can be started again later."""
UNREACHABLE_AFTER = 5
"""So many connection failures in a row, before any answer, mean that nobody is there."""


@dataclass(frozen=True)
class Trouble:
    """One attempt that brought no answer.

    ``wait_s``  what the server asked for (Retry-After), if it did
    ``fatal``   asking for other rows will not go better: a wrong key, an unknown model, an empty account
    ``billed``  the server may have done the work, and may want its money
    """

    kind: FailureKind
    detail: str
    retry: bool = True
    wait_s: float | None = None
    fatal: bool = False
    billed: bool = False


def backoff_s(attempt: int, rng: random.Random) -> float:
    """Wait before the next try, after ``attempt`` failed ones (from 1): exponential, with full jitter.

    Full jitter (uniform between 0 and the bound) spreads clients that failed together the most; see M. Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """
    return rng.uniform(0, min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(attempt - 1, 32)))


def retry_after_s(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that the server asks to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as an HTTP date.

    None where it does not say, or says something else. ``now`` is for tests.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit_s
        except ValueError:
            continue
        return max(0.0, seconds) if seconds == seconds else None
    try:
        until = parsedate_to_datetime(headers.get("retry-after") or "")
    except ValueError:
        return None
    until = until if until.tzinfo else until.replace(tzinfo=UTC)
    return max(0.0, (until - (now or datetime.now(UTC))).total_seconds())


@dataclass
class Breaker:
    """Counts attempts and says when to stop the whole run.

    It opens on a fatal failure; after :data:`UNREACHABLE_AFTER` connection failures in a row with no answer so far;
    and after so many failures of any kind in a row that every request in flight must have used up its tries.
    """

    concurrency: int
    retries: int
    answers: int = 0
    _unreachable_in_a_row: int = field(default=0, init=False)
    _failed_in_a_row: int = field(default=0, init=False)

    def succeeded(self) -> None:
        self.answers += 1
        self._unreachable_in_a_row = self._failed_in_a_row = 0

    def failed(self, trouble: Trouble) -> bool:
        """Count a failed attempt; True: stop."""
        self._failed_in_a_row += 1
        unreachable = trouble.kind in {"connection", "timeout"}
        self._unreachable_in_a_row = self._unreachable_in_a_row + 1 if unreachable else 0
        return (
            trouble.fatal
            or (trouble.wait_s or 0.0) > LONGEST_RETRY_AFTER_S
            or (self.answers == 0 and self._unreachable_in_a_row >= UNREACHABLE_AFTER)
            or self._failed_in_a_row >= max(20, self.concurrency * (self.retries + 1))
        )
