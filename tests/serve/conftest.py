"""What several tests of the server share."""

from __future__ import annotations

import pytest

from slmops.runtime.batch import BatchGenerator


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch takes no step before every answer in it is followed.

    A tiny model is far ahead of whoever begins to follow it, where the machine is busy: its first pieces then travel as
    one, and nobody can say how many there are. A step of a real model takes longer than that.
    """
    step = BatchGenerator.step

    def patient(batch: BatchGenerator) -> None:
        if all(stream._listener is not None for stream in list(batch._arrived)):
            step(batch)

    monkeypatch.setattr(BatchGenerator, "step", patient)
