"""Similarity of texts: shingles, their Jaccard index, and MinHash signatures to find candidates.

A text is the set of its character 5-grams, case folded and without punctuation, with a blank at each end. One measure
for all lengths, and not words: in a text of ten words one changed word takes three of the eight word 3-shingles away; a
measure that changes with length could never match a text just over its limit with one just under; and languages without
blanks have no words to count.

Guarantees: :func:`jaccard` is exact; a pair at the threshold becomes a candidate with
probability of at least 99.9 % (for thresholds from 0.1; below, with what :meth:`Bands.recall` says).
Source: Broder, On the resemblance and containment of documents, 1997; banding: Leskovec, Rajaraman, Ullman, Mining of
Massive Datasets, chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SHINGLE_CHARS = 5
MAX_HASHES = 96
MAX_BAND_ROWS = 8  # one byte of each signature value: a band is a 64-bit key
RECALL = 0.999

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Bands:
    """A signature of ``bands * rows`` values; two texts are candidates where all ``rows`` values of a band agree."""

    bands: int
    rows: int

    @property
    def hashes(self) -> int:
        return self.bands * self.rows

    def recall(self, similarity: float) -> float:
        """Probability that a pair of this Jaccard index becomes a candidate."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


def plan_bands(threshold: float) -> Bands:
    """The most selective banding within :data:`MAX_HASHES` that finds :data:`RECALL` of the pairs at ``threshold``."""
    for rows in range(MAX_BAND_ROWS, 0, -1):
        chance = threshold**rows
        bands = 1 if chance >= 1 else math.ceil(math.log(1 - RECALL) / math.log1p(-chance))
        if bands * rows <= MAX_HASHES:
            return Bands(bands, rows)
    return Bands(MAX_HASHES, 1)


def mix(values: U64) -> U64:
    """A bijection of 64-bit values that looks random (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def shingle_hashes(texts: Sequence[str]) -> tuple[U64, npt.NDArray[np.int64]]:
    """Hashes of all shingles of ``texts``, one text after the other, and where each text begins.

    ``texts`` are in the form of :func:`slmops.data.text.words_only`. Shapes: ``[shingles]``, ``[texts]``; every text
    has at least one shingle, repeated ones are repeated.
    """
    padded = [_padded(text) for text in texts]
    points = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    lengths = np.fromiter(map(len, padded), dtype=np.int64, count=len(padded))
    ends = np.cumsum(lengths)
    windows = np.zeros(max(len(points) - SHINGLE_CHARS + 1, 0), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(SHINGLE_CHARS):
            windows = windows * np.uint64(0x100000001B3) + points[offset : offset + len(windows)]
    inside = np.ones(len(windows), dtype=bool)
    for back in range(1, SHINGLE_CHARS):  # windows that run over into the next text
        crossing = ends[:-1] - back
        inside[crossing[crossing < len(windows)]] = False
    starts = np.concatenate(([0], np.cumsum(lengths - SHINGLE_CHARS + 1)[:-1])).astype(np.int64)
    return mix(windows[inside]), starts


def shingle_set(text: str) -> frozenset[str]:
    """The text's shingles, for exact comparison."""
    padded = _padded(text)
    return frozenset(padded[start : start + SHINGLE_CHARS] for start in range(len(padded) - SHINGLE_CHARS + 1))


def jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    """Shared shingles by all shingles of two sets (neither is empty)."""
    shared = len(left & right)
    return shared / (len(left) + len(right) - shared)


def _padded(text: str) -> str:
    return f" {text} ".ljust(SHINGLE_CHARS)


def signatures(texts: Sequence[str], hashes: int) -> U8:
    """MinHash signatures, one byte of each value: ``[texts, hashes]``.

    One byte is enough here: it serves to find candidates, which are then compared exactly, and two different values
    agree by chance in 1 of 256 only.
    """
    shingles, starts = shingle_hashes(texts)
    keys = (shingles >> np.uint64(32)).astype(np.uint32)
    result = np.empty((len(texts), hashes), dtype=np.uint8)
    flips, factors = _permutations(hashes)
    with np.errstate(over="ignore"):
        for index in range(hashes):
            smallest = np.minimum.reduceat((keys ^ flips[index]) * factors[index], starts)
            # The smallest values have few high bits set: spread them before one byte is taken.
            result[:, index] = (smallest * np.uint32(0x9E3779B1)) >> np.uint32(24)
    return result


def _permutations(hashes: int) -> tuple[U32, U32]:
    drawn = mix(np.arange(2 * hashes, dtype=np.uint64) + np.uint64(0x51))
    values = (drawn >> np.uint64(32)).astype(np.uint32)
    return values[:hashes], values[hashes:] | np.uint32(1)
