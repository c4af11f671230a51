"""A part that this machine lacks: skipped for a person, a failure in CI, which installs every part."""

from __future__ import annotations

import os

import pytest


def skip_or_fail(reason: str) -> None:
    """Skip the test, or fail it where ``CI`` is set. ``reason`` names what is missing."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have this: {reason}")
    pytest.skip(reason)
