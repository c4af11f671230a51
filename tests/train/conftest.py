"""One thread for torch, and a tiny language model that is made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fakes.tiny_models import write_tiny_llama


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two random layers of width 64 and 300 tokens; read only."""
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder)
    return folder
