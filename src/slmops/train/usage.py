"""What training takes of the machine: memory and cores of this process, and a GPU's memory where there is one.

Not covered: other processes of the same training (each is asked for itself), and how busy a GPU is.
"""

from __future__ import annotations

import psutil
import torch


class ResourceUse:
    """Asked again and again; cores are a mean over the time since the question before."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first answer is always 0

    def figures(self) -> dict[str, float]:
        """``memory_mb`` (resident), ``cpu_cores`` (1.0 is one core, wholly), ``gpu_memory_mb`` (most since then)."""
        found = {
            "memory_mb": self._process.memory_info().rss / 1e6,
            "cpu_cores": self._process.cpu_percent() / 100,
        }
        if torch.cuda.is_available():
            found["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.reset_peak_memory_stats()
        return found
