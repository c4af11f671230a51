"""What training takes of the machine: memory and cores of this process, and a GPU's memory and time where there is one.

Not covered: other processes of the same training (each is asked for itself).
"""

from __future__ import annotations

import psutil
import torch

from slmops.train.gpu import GpuUse


class ResourceUse:
    """Asked again and again; cores and a GPU's time are means over the time since the question before."""

    def __init__(self, gpu: GpuUse | None = None) -> None:
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first answer is always 0
        self._gpu = gpu or GpuUse.find()

    def figures(self) -> dict[str, float]:
        """``memory_mb`` (resident), ``cpu_cores`` (1.0 is one core, wholly), ``gpu_memory_mb`` (torch's own, most since
        then), and what :meth:`GpuUse.figures` tells."""
        found = {
            "memory_mb": self._process.memory_info().rss / 1e6,
            "cpu_cores": self._process.cpu_percent() / 100,
        }
        if torch.cuda.is_available():
            found["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.reset_peak_memory_stats()
        return found | (self._gpu.figures() if self._gpu is not None else {})
