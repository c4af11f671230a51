"""Progress as events: stages emit, the command line (and later the console) draws.

A stage takes a :data:`ProgressSink` and never prints. The default sink drops events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """One step forward in a piece of work.

    ``done`` and ``total`` count ``unit``s; ``total`` is None when the amount is not known. ``note`` is a short live
    figure, for example ``"loss 0.412"``. ``figures`` holds what was just measured on the validation split, for
    example ``{"validation_loss": 0.412}``: a sink may stop the work by raising when they are bad.
    """

    task: str
    done: int
    total: int | None = None
    unit: str = "rows"
    note: str = ""
    figures: Mapping[str, float] = field(default_factory=dict, hash=False)


ProgressSink = Callable[[Progress], None]


def ignore(event: Progress) -> None:
    """Drop the event."""
