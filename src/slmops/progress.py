"""Progress as events: stages emit, the command line (and later the console) draws.

A stage takes a :data:`ProgressSink` and never prints. The default sink drops events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """One step forward in a piece of work.

    ``done`` and ``total`` count ``unit``s; ``total`` is None when the amount is not known. ``note`` is a short live
    figure, for example ``"loss 0.412"``.
    """

    task: str
    done: int
    total: int | None = None
    unit: str = "rows"
    note: str = ""


ProgressSink = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """Drop the event."""
