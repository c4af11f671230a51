"""A tool in a process of its own: what it prints goes to a log, what it sends home goes nowhere, and a failure is told
with its last lines."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from slmops.errors import ConversionError

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
LOG_TAIL_LINES = 3
DISK_FULL = ("No space left on device", "[Errno 28]")
"""What a log says when there was no room to write."""


def run_child(
    arguments: Sequence[str], log: Path, *, what: str, remedy: str, environment: Mapping[str, str] | None = None
) -> None:
    """Run ``python ARGUMENTS`` in the folder of ``log``, where all that it prints is kept.

    Raises:
        ConversionError: its exit code is not 0; its last lines are in the message.
        OSError: it had no room on the disk.
    """
    with log.open("wb") as output:
        child = subprocess.run(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **OFFLINE, **(environment or {})},
            cwd=log.parent,
            check=False,
        )
    if child.returncode == 0:
        return
    said = log.read_text("utf-8", "replace")
    if any(sign in said for sign in DISK_FULL):
        raise OSError(errno.ENOSPC, "No space left on device", str(log.parent))
    raise ConversionError(
        f"{what} ended with exit code {child.returncode}: {log_tail(log)}",
        remedy=f"{remedy} The whole log is {log}.",
    )


def log_tail(log: Path) -> str:
    """The last lines of a log, in one."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    return " / ".join(lines[-LOG_TAIL_LINES:]) or "it printed nothing"
