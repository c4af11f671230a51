"""One token out of a distribution, and how likely given tokens were: what engines share that show their logits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LIKELIEST = 1024
"""Tokens among which the mass of ``top_p`` is looked for first."""


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
    exact = logprobs.astype(np.float64)
    kept = nucleus(exact, top_p)
    scaled = exact[kept] / temperature
    mass = np.cumsum(np.exp(scaled - scaled.max()))
    place = int(np.searchsorted(mass, random.random() * mass[-1], side="right"))
    return int(kept[min(place, len(kept) - 1)])


def nucleus(logprobs: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """The fewest likeliest tokens that have ``top_p`` of the mass together, best first; all, as they are, for 1.

    A vocabulary is sorted in milliseconds, which is a step's time: most often the likeliest few hold the mass.
    """
    if top_p >= 1:
        return np.arange(logprobs.size)
    wanted = top_p * np.exp(logprobs).sum()
    for count in (LIKELIEST, logprobs.size):
        some = np.argpartition(-logprobs, count - 1)[:count] if count < logprobs.size else np.arange(logprobs.size)
        order = some[np.argsort(-logprobs[some], kind="stable")]
        mass = np.cumsum(np.exp(logprobs[order]))
        if mass[-1] >= wanted or count >= logprobs.size:
            break
    return order[: int(np.searchsorted(mass, wanted)) + 1]
