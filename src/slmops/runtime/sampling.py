"""One token out of a distribution, and how likely given tokens were: what engines share that show their logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Log-probabilities of one position, ``[vocabulary]`` in and out."""
    exact = logits.astype(np.float64)
    exact -= exact.max()
    made: NDArray[np.float32] = (exact - np.log(np.exp(exact).sum())).astype(np.float32)
    return made


def log_likelihood(logits: NDArray[Any], ids: NDArray[np.int64]) -> float:
    """Sum over rows of ``log softmax(logits)[row, ids[row]]`` in nats; ``logits``: ``[rows, vocabulary]``."""
    total = 0.0
    for row, token in zip(logits, ids, strict=True):  # row by row: a float64 copy of all would double the memory
        exact = row.astype(np.float64)
        peak = exact.max()
        total += float(exact[token] - peak - np.log(np.exp(exact - peak).sum()))
    return total


def draw(logprobs: NDArray[np.float32], temperature: float, top_p: float, random: np.random.Generator) -> int:
    """One token: the likeliest ones that have ``top_p`` of the mass together, at ``temperature``. Pure but for
    ``random``."""
    order = np.argsort(-logprobs, kind="stable")
    mass = np.cumsum(np.exp(logprobs[order].astype(np.float64)))
    kept = order[: int(np.searchsorted(mass, top_p * mass[-1])) + 1]
    scaled = logprobs[kept].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return int(random.choice(kept, p=weights / weights.sum()))
