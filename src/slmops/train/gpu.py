"""How busy a GPU is, by NVML (the package nvidia-ml-py, extra ``gpu``); nothing is asked where either is missing.

Figures are of the whole device, whoever uses it: kernels of other programs count too. Not covered: devices of other
makers.
"""

from __future__ import annotations

import logging
from statistics import fmean
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)


class GpuUse:
    """Asked again and again; ``gpu_busy`` is a mean over the time since the question before. ``nvml``: the module
    ``pynvml``, or what behaves like it; ``uuid``: of the device, as torch tells it."""

    def __init__(self, nvml: ModuleType | Any, uuid: str) -> None:
        self._nvml = nvml
        nvml.nvmlInit()
        self._device = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
        self._last_sample = 0  # of NVML's clock, microseconds

    @classmethod
    def find(cls) -> GpuUse | None:
        """Of the device that torch trains on; None where there is none, or nobody tells of it."""
        import torch

        if not torch.cuda.is_available():
            return None
        try:
            import pynvml

            return cls(pynvml, str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
        except ImportError:
            log.info("nvidia-ml-py is not installed: how busy the GPU is will not be told")
        except (pynvml.NVMLError, AttributeError) as error:
            log.info("NVML does not tell of the GPU: %s", error)
        return None

    def figures(self) -> dict[str, float]:
        """``gpu_busy`` (share of the time in which a kernel ran), ``gpu_device_memory_mb`` (in use on the device),
        ``gpu_power_w``; what the device does not tell is left out."""
        found: dict[str, float] = {}
        for name, ask in (
            ("gpu_busy", self._busy),
            ("gpu_device_memory_mb", self._memory_mb),
            ("gpu_power_w", self._power_w),
        ):
            try:
                found[name] = ask()
            except self._nvml.NVMLError as error:
                log.debug("NVML gives no %s: %s", name, error)
        return found

    def _busy(self) -> float:
        nvml = self._nvml
        try:
            _, samples = nvml.nvmlDeviceGetSamples(self._device, nvml.NVML_GPU_UTILIZATION_SAMPLES, self._last_sample)
        except nvml.NVMLError:
            samples = []
        new = [one for one in samples if one.timeStamp > self._last_sample]
        if not new:  # asked again within one sampling period, or a device without a buffer of samples
            return float(nvml.nvmlDeviceGetUtilizationRates(self._device).gpu) / 100
        first, self._last_sample = self._last_sample == 0, max(one.timeStamp for one in new)
        # The buffer reaches back to before training: of the first answer the last sample counts.
        counted = new[-1:] if first else new
        return fmean(one.sampleValue.uiVal for one in counted) / 100

    def _memory_mb(self) -> float:
        return float(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used) / 1e6

    def _power_w(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._device)) / 1e3
