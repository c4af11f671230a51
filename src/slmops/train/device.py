"""Where a model is trained: on the GPU where torch finds one, else on the CPU; and how much memory is free there.

Not covered: several GPUs in one process (``train.processes`` gives each process one), and devices of other makers.
"""

from __future__ import annotations

import torch

from slmops.models import available_memory_bytes


def training_device() -> torch.device:
    """The device that transformers' Trainer will choose, too."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def free_training_bytes() -> int | None:
    """Memory that training may take on :func:`training_device`; None where the system does not tell."""
    if not torch.cuda.is_available():
        return available_memory_bytes()
    free, _ = torch.cuda.mem_get_info()
    return int(free)


def wait_for(device: torch.device) -> None:
    """Until all that the device was asked to do is done: its work is queued, and a clock would not see it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
