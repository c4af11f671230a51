"""NVML of a device with one GPU: a clock, a buffer of samples, and a counter that some devices lack."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

NVML_GPU_UTILIZATION_SAMPLES = 1


class NVMLError(Exception):
    pass


class FakeNvml:
    """``work(percents)``: what the GPU did since, a sample each; ``samples``, ``power``: False where it tells none."""

    NVML_GPU_UTILIZATION_SAMPLES = NVML_GPU_UTILIZATION_SAMPLES
    NVMLError = NVMLError

    def __init__(self, uuid: str = "GPU-1234", *, samples: bool = True, power: bool = True) -> None:
        self.uuid, self.has_samples, self.has_power = uuid, samples, power
        self.started = False
        self.now = 1_000_000
        self.buffer: list[Any] = []
        self.used_bytes = 3_000_000_000

    def work(self, *percents: int) -> None:
        for percent in percents:
            self.now += 167_000
            self.buffer.append(SimpleNamespace(timeStamp=self.now, sampleValue=SimpleNamespace(uiVal=percent)))

    def nvmlInit(self) -> None:  # noqa: N802 - NVML's own names
        self.started = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if not self.started or uuid != self.uuid:
            raise NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetSamples(self, device: str, kind: int, after: int) -> tuple[int, list[Any]]:  # noqa: N802
        found = [one for one in self.buffer if one.timeStamp > after]
        if not self.has_samples or not found:
            raise NVMLError("Not Found")
        return 1, found

    def nvmlDeviceGetUtilizationRates(self, device: str) -> Any:  # noqa: N802
        return SimpleNamespace(gpu=self.buffer[-1].sampleValue.uiVal if self.buffer else 0, memory=0)

    def nvmlDeviceGetMemoryInfo(self, device: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.used_bytes, total=80_000_000_000, free=0)

    def nvmlDeviceGetPowerUsage(self, device: str) -> int:  # noqa: N802
        if not self.has_power:
            raise NVMLError("Not Supported")
        return 412_000
