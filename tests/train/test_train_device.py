"""The device that is trained on, as far as a machine without a GPU can show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_train_loop import Net, Regression, quick

from fakes.tiny_models import write_tiny_llama
from slmops.errors import MemoryBudgetError
from slmops.train import device, loop
from slmops.train.batch_size import part_tokens


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is one, with 2 MB free; nothing runs on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2_000_000, 80_000_000_000))


def test_the_gpu_where_there_is_one(gpu: None) -> None:
    assert device.training_device() == torch.device("cuda", 0)
    assert device.free_training_bytes() == 2_000_000


def test_the_cpu_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.training_device() == torch.device("cpu")
    free = device.free_training_bytes()
    assert free is None or free > 10**6


def test_rows_are_divided_by_the_gpus_memory(gpu: None, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "model")
    with pytest.raises(MemoryBudgetError):
        part_tokens(tmp_path / "model", "full", longest=512, logit_share=1.0, work=tmp_path)


def test_a_model_is_moved_before_its_precision_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []

    class Moved(Net):
        def to(self, *where: Any, **how: Any) -> Any:
            order.append(str(where[0]))
            return self

    measure = loop._time_step
    monkeypatch.setattr(loop, "training_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(loop, "_time_step", lambda *given: (order.append("measured"), measure(*given))[1])
    net = Moved()
    groups = loop.parameter_groups(list(net.parameters()), 0.05, 0.01)
    history = loop.fit(net, Regression(), groups, quick(precision="auto"), tmp_path)
    assert order[:3] == ["cuda:0", "measured", "measured"]
    assert history[-1]["validation_loss"] < history[0]["loss"]
