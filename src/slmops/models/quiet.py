"""Switches for the chatter of libraries: their bars and advice are not ours to show, and none of them phones home."""

from __future__ import annotations

import logging
import os
import sys
from importlib.util import find_spec


def quiet_transformers() -> None:
    """No bars, no advice, no telemetry from transformers and the hub's client, for the whole process."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from transformers.utils import logging as own

    own.set_verbosity_error()
    own.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load_bitsandbytes() -> bool:
    """Import bitsandbytes, if it is installed, without its search for a kernel on a hub; whether it is there.

    peft imports it too, so this comes first wherever peft is used.
    """
    if "bitsandbytes" in sys.modules:
        return True
    if find_spec("bitsandbytes") is None:
        return False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    known = sys.modules.get("kernels")
    sys.modules["kernels"] = None  # type: ignore[assignment] # its import fails, and the built-in path is taken
    try:
        import bitsandbytes  # noqa: F401
    finally:
        if known is None:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = known
    return True
