"""What training takes of the machine, with a GPU's counters that behave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fakes.nvml import FakeNvml, NVMLError
from slmops.train.gpu import GpuUse
from slmops.train.trackers import _figures
from slmops.train.usage import ResourceUse


def test_busy_is_the_mean_since_the_question_before() -> None:
    nvml = FakeNvml()
    nvml.work(0, 0, 0, 50)  # before training; the last sample alone is of it
    use = GpuUse(nvml, "1234")
    assert use.figures() == {"gpu_busy": 0.5, "gpu_device_memory_mb": 3000.0, "gpu_power_w": 412.0}
    nvml.work(100, 80, 90)
    assert use.figures()["gpu_busy"] == pytest.approx(0.9)
    assert use.figures()["gpu_busy"] == pytest.approx(0.9)  # no new sample: what it does now


def test_what_a_device_does_not_tell_is_left_out() -> None:
    nvml = FakeNvml(samples=False, power=False)
    nvml.work(70)
    assert GpuUse(nvml, "GPU-1234").figures() == {"gpu_busy": 0.7, "gpu_device_memory_mb": 3000.0}
    with pytest.raises(NVMLError):
        GpuUse(nvml, "other")


def test_its_figures_stand_beside_the_losses() -> None:
    nvml = FakeNvml()
    nvml.work(60)
    use = ResourceUse(GpuUse(nvml, "1234"))
    told = dict(_figures({"loss": 1.5}, use))
    assert told["machine/gpu_busy"] == 0.6
    assert told["machine/memory_mb"] > 0
    assert told["loss"] == 1.5
    assert "machine/gpu_busy" not in dict(_figures({"eval_loss": 1.5}, use))


def test_the_device_is_torchs_own_and_nothing_is_asked_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert GpuUse.find() is None
    pynvml: Any = pytest.importorskip("pynvml")
    nvml = FakeNvml("GPU-abcd")
    nvml.work(40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abcd"))
    for name in dir(nvml):
        if name.startswith(("nvml", "NVML_")):
            monkeypatch.setattr(pynvml, name, getattr(nvml, name))
    found = GpuUse.find()
    assert found is not None
    assert found.figures()["gpu_busy"] == 0.4


def test_a_machine_whose_driver_is_missing_trains_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pynvml")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abcd"))
    assert GpuUse.find() is None  # NVML's library is not on this machine
