"""One switch for the chatter of transformers: its bars and advice are not ours to show."""

from __future__ import annotations

import os


def quiet_transformers() -> None:
    """No bars, no advice, no telemetry from transformers and the hub's client, for the whole process."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
