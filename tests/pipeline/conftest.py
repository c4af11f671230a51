"""A tiny teacher, a tiny table, and one whole run that the tests look at."""

from __future__ import annotations

import time

import pytest
import torch
from pipeline_helpers import Done, Place, write_rows

from fakes.tiny_models import write_tiny_llama
from slmops.pipeline import run_recipe
from slmops.progress import Progress
from slmops.store import Store


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Read only."""
    folder = tmp_path_factory.mktemp("project")
    write_tiny_llama(folder / "teacher")
    write_rows(folder / "rows.csv")
    return Place(folder)


@pytest.fixture(scope="session")
def done(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Read only: copy the store before anything is changed in it."""
    torch.set_num_threads(1)
    events: list[Progress] = []
    root = tmp_path_factory.mktemp("done") / "store"
    started = time.monotonic()
    with Store.open(root) as store:
        result = run_recipe(place.recipe(), store, progress=events.append)
    return Done(place, root, result, events, time.monotonic() - started)
