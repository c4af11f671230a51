"""The environment that libraries below us find: told not to phone home, before any of them is imported."""

from __future__ import annotations

import os

SWITCHES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "OLIVE_DISABLE_TELEMETRY": "1",
}
"""Variable -> the value that means off."""


def silence_telemetry() -> None:
    """Set every switch that the user has not set; and keep tokenizers from warning when a worker is forked."""
    for name, value in {**SWITCHES, "TOKENIZERS_PARALLELISM": "false"}.items():
        os.environ.setdefault(name, value)
