"""How many requests at once: decisions only, no clock, no network.

Additive increase, multiplicative decrease (D.-M. Chiu, R. Jain, "Analysis of the increase and decrease algorithms for
congestion avoidance in computer networks", 1989), with a doubling start as TCP has it. Two things count as congestion:
a server that says so (429, 503, a timeout), and answers that take much longer than they did.

Guarantees: the limit stays within 1 and ``most``; requests that were in flight when the limit was cut do not cut it
again; slowness alone does not cut below a quarter of ``most``: a queue at the server is slow, and still as much work a
second. What this process itself waits for its processor (``own_lag_s``) is not taken for the server's slowness.
Not covered: a server whose answers differ a lot in length gives latencies that differ a lot; hence the wide bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field

FIRST_AT_ONCE = 16
CUT = 0.5
"""What is left of the limit after a 429, a 503 or a timeout."""
EASE = 0.8
"""What is left of it when answers got slow."""
SLOW = 4.0
HOLD = 2.0
"""Mean latency of a window, as multiples of the best window: from HOLD on no more are added, from SLOW on some go."""
FORGET = 1.02
"""The best window counts for a little less with each that follows, so that a server that became slower is believed."""
SMALLEST_WINDOW = 8
STEPS = 16
"""So many windows from nothing to ``most``."""
LEAST_SHARE = 0.25
CONGESTION = frozenset({"rate_limit", "overloaded", "timeout"})


@dataclass
class Pace:
    """``limit`` requests may be in flight. Times are seconds of any one clock."""

    most: int
    limit: float = field(init=False)
    _starting: bool = field(default=True, init=False)
    _cut_at_s: float = field(default=float("-inf"), init=False)
    _best_s: float | None = field(default=None, init=False)
    _window_sum_s: float = field(default=0.0, init=False)
    _window: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.limit = float(min(self.most, FIRST_AT_ONCE))

    @property
    def at_once(self) -> int:
        return max(1, int(self.limit))

    def answered(self, begun_s: float, now_s: float, own_lag_s: float = 0.0) -> None:
        """An answer came. One step a window: as many answers as there are places, so that each step can be felt."""
        if begun_s < self._cut_at_s:
            return  # how slow it was, it was before the cut
        self._window_sum_s += max(0.0, now_s - begun_s - own_lag_s)
        self._window += 1
        if self._window < max(self.at_once, SMALLEST_WINDOW):
            return
        mean_s, self._window_sum_s, self._window = self._window_sum_s / self._window, 0.0, 0
        best_s = mean_s if self._best_s is None else min(mean_s, self._best_s * FORGET)
        self._best_s = best_s
        if mean_s > SLOW * best_s:
            if self.limit > self.most * LEAST_SHARE:
                self._lower(EASE, now_s)
        elif mean_s <= HOLD * best_s:
            grown = self.limit * 2 if self._starting else self.limit + max(1.0, self.most / STEPS)
            self.limit = min(float(self.most), grown)

    def congested(self, begun_s: float, now_s: float) -> None:
        """The server had too much to do for a request that began at ``begun_s``."""
        if begun_s >= self._cut_at_s:
            self._lower(CUT, now_s)

    def _lower(self, share: float, now_s: float) -> None:
        self.limit = max(1.0, self.limit * share)
        self._starting = False
        self._cut_at_s = now_s
        self._window_sum_s, self._window = 0.0, 0
