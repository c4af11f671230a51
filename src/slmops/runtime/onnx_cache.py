"""The keys and values of several answers in one block of memory, laid out as onnxruntime-genai's graphs read them.

Guarantees: rows ``0 .. n - 1`` of every array are one tensor ``[n, heads, tokens, size]`` without a copy, and so is
each row alone; the block grows with what runs and is given back when nothing does. Does no inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

LENGTH_STEP = 128
"""The block grows by so many tokens a row."""
LARGEST_IDLE_BYTES = 64 * 2**20
"""A block larger than this is given back when nothing runs."""


@dataclass(frozen=True)
class CacheShape:
    """``names``: of one tensor of keys or values each, such as ``0.key``; ``heads`` and ``size`` of each."""

    names: tuple[str, ...]
    heads: int
    size: int
    kind: type[np.floating]

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return len(self.names) * self.heads * self.size * np.dtype(self.kind).itemsize


class RowCache:
    """See the module."""

    def __init__(self, shape: CacheShape) -> None:
        self.shape = shape
        self.rows = 0
        self.tokens = 0
        self.arrays: list[NDArray[np.floating]] = []

    def fit(self, rows: int, tokens: int) -> bool:
        """Make room; True where the memory moved. What is there stays."""
        if rows <= self.rows and tokens <= self.tokens:
            return False
        new_rows = max(self.rows, 1 << max(rows - 1, 0).bit_length())
        new_tokens = max(self.tokens, -(-tokens // LENGTH_STEP) * LENGTH_STEP)
        grown = []
        for number in range(len(self.shape.names)):
            array = np.zeros((new_rows, self.shape.heads, new_tokens, self.shape.size), self.shape.kind)
            if self.arrays:
                old = self.arrays[number]
                array[: self.rows, :, : self.tokens] = old
            grown.append(array)
        self.arrays, self.rows, self.tokens = grown, new_rows, new_tokens
        return True

    def move(self, source: int, target: int, tokens: int) -> None:
        """The first ``tokens`` of one row to another."""
        for array in self.arrays:
            array[target, :, :tokens] = array[source, :, :tokens]

    def copy_out(self, row: int, tokens: int) -> list[NDArray[np.floating]]:
        """The first ``tokens`` of a row, ``[heads, tokens, size]`` for each array."""
        return [array[row, :, :tokens].copy() for array in self.arrays]

    def copy_in(self, row: int, kept: Sequence[NDArray[np.floating]], tokens: int) -> None:
        for array, one in zip(self.arrays, kept, strict=True):
            array[row, :, :tokens] = one[:, :tokens]

    def idle(self) -> bool:
        """Nothing runs: give a large block back. True where the memory moved."""
        if self.rows * self.tokens * self.shape.token_bytes <= LARGEST_IDLE_BYTES:
            return False
        self.arrays, self.rows, self.tokens = [], 0, 0
        return True


@dataclass(frozen=True, eq=False)
class Kept:
    """A prompt's ids, and its keys and values: ``[heads, tokens, size]`` for each array."""

    ids: NDArray[np.int64]
    arrays: list[NDArray[np.floating]]


@dataclass
class Beginnings:
    """Prompts that were read lately, with their keys and values; the one that was of no use for longest goes first.

    ``most_tokens``  over all
    ``least``        prompts shorter than this are not worth keeping
    """

    most_tokens: int
    least: int
    _kept: list[Kept] = field(default_factory=list)

    def longest(self, prompt: Sequence[int]) -> tuple[int, Kept | None]:
        """The kept prompt that has most in common with the beginning of ``prompt``, and how many tokens. The last
        token of ``prompt`` never counts: it has to be read for the model to go on."""
        ids = np.asarray(prompt[:-1], np.int64)
        best, found = 0, None
        for kept in self._kept:
            common = common_tokens(ids, kept.ids)
            if common > best:
                best, found = common, kept
        if found is None or best < self.least:
            return 0, None
        self._kept.remove(found)
        self._kept.append(found)
        return best, found

    def wants(self, prompt: Sequence[int]) -> bool:
        """Whether ``prompt`` is long enough, and no kept one has nearly all of it."""
        if not self.least <= len(prompt) <= self.most_tokens:
            return False
        ids = np.asarray(prompt, np.int64)
        return all(common_tokens(ids, kept.ids) < 0.9 * len(prompt) for kept in self._kept)

    def keep(self, prompt: Sequence[int], arrays: list[NDArray[np.floating]]) -> None:
        self._kept.append(Kept(np.asarray(prompt, np.int64), arrays))
        while sum(len(kept.ids) for kept in self._kept) > self.most_tokens:
            self._kept.pop(0)


def common_tokens(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common beginning."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
