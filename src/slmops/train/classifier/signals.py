"""What a teacher left for its student beside the rows of a closed label set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from slmops.artifacts import Dataset
from slmops.errors import DataError

PIECE_ROWS = 4096
SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class TeacherSignals:
    """Log-probabilities ``[rows, labels]`` and, where they were kept, mean hidden states ``[rows, hidden]``.

    One array a split, mapped from disk, in the order in which the splits were named; rows are counted through.
    ``centre`` and ``deviation`` ``[hidden]`` standardize the states, by the first split.
    """

    log_probabilities: tuple[NDArray[np.float32], ...]
    states: tuple[NDArray[np.float16], ...] = ()
    centre: NDArray[np.float32] | None = None
    deviation: NDArray[np.float32] | None = None

    @classmethod
    def read(
        cls, dataset: Dataset, splits: Mapping[str, int], labels: int, *, states: float | None = None
    ) -> TeacherSignals:
        """The signals of ``splits`` (name to number of rows). ``states``: the weight that was asked for; 0 leaves them
        out, None takes them where they are.

        Raises:
            DataError: a file is missing, damaged, or does not belong to the rows.
        """
        found = tuple(_read(dataset, f"teacher_{split}.npy", rows, labels) for split, rows in splits.items())
        names = [f"states_{split}.npy" for split in splits]
        if states == 0 or (states is None and not all((dataset.path / name).exists() for name in names)):
            return cls(found)
        hidden = tuple(_read(dataset, name, rows) for name, rows in zip(names, splits.values(), strict=True))
        return cls(found, hidden, *_moments(hidden[0]))

    @property
    def hidden_size(self) -> int:
        """0 without states."""
        return self.states[0].shape[1] if self.states else 0

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """``teacher_log_probabilities`` and, where kept, standardized ``teacher_states``, in float32."""
        batch = {"teacher_log_probabilities": torch.from_numpy(_rows(self.log_probabilities, indices))}
        if self.centre is not None and self.deviation is not None:
            batch["teacher_states"] = torch.from_numpy((_rows(self.states, indices) - self.centre) / self.deviation)
        return batch


def _rows(arrays: Sequence[NDArray[Any]], indices: Sequence[int]) -> NDArray[np.float32]:
    picked = np.empty((len(indices), arrays[0].shape[1]), dtype=np.float32)
    for place, index in enumerate(indices):
        for array in arrays:
            if index < len(array):
                picked[place] = array[index]
                break
            index -= len(array)
    return picked


def _moments(states: NDArray[np.float16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each dimension, piece by piece."""
    total, squares = np.zeros(states.shape[1]), np.zeros(states.shape[1])
    for start in range(0, len(states), PIECE_ROWS):
        piece = states[start : start + PIECE_ROWS].astype(np.float64)
        total += piece.sum(axis=0)
        squares += (piece**2).sum(axis=0)
    centre = total / len(states)
    deviation = np.sqrt(np.maximum(squares / len(states) - centre**2, SMALLEST_DEVIATION**2))
    return centre.astype(np.float32), deviation.astype(np.float32)


def _read(dataset: Dataset, name: str, rows: int, columns: int | None = None) -> NDArray[Any]:
    path: Path = dataset.path / name
    if not path.exists():
        raise DataError(f"There are no teacher's signals: {name} is missing.", path=dataset.path)
    try:
        signals: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{name} cannot be read: {error}.", path=dataset.path) from None
    if len(signals) != rows:
        raise DataError(f"{name} has {len(signals)} rows where the split has {rows}.", path=dataset.path)
    if signals.ndim != 2 or columns not in (None, signals.shape[1]):
        raise DataError(
            f"{name} has {signals.shape[-1]} columns where the data set has {columns} labels.", path=dataset.path
        )
    return signals
