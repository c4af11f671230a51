"""What people see: errors, progress bars, tables. Machines get JSON, one object on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from slmops.errors import SlmopsError
from slmops.progress import Progress, ProgressSink

errors = Console(stderr=True, highlight=False, soft_wrap=True)


def show_error(error: SlmopsError) -> None:
    errors.print("[bold red]error:[/] ", end="")
    errors.print(error.message, markup=False)
    if error.remedy:
        errors.print("  [bold]try:[/] ", end="")
        errors.print(error.remedy, markup=False)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def progress_bars() -> Iterator[ProgressSink]:
    """A sink that draws one bar a task on a terminal, and writes one line a finished task elsewhere."""
    if not errors.is_terminal:
        yield _plain_sink()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=errors) as bars:
        tasks: dict[str, TaskID] = {}

        def sink(event: Progress) -> None:
            if event.task not in tasks:
                tasks[event.task] = bars.add_task(event.task, total=event.total, unit=event.unit, note=event.note)
            bars.update(tasks[event.task], completed=event.done, total=event.total, unit=event.unit, note=event.note)

        yield sink


def _plain_sink() -> ProgressSink:
    finished: set[str] = set()

    def sink(event: Progress) -> None:
        if event.total is not None and event.done >= event.total and event.task not in finished:
            finished.add(event.task)
            note = f", {event.note}" if event.note else ""
            errors.print(f"{event.task}: {event.done} {event.unit}{note}", markup=False)

    return sink
