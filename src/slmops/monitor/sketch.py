"""A text as a few numbers: enough to see that texts have changed, too few to read them again.

Three kinds. ``novelty``: how surprising its words and character 4-grams are after the training texts, in nats a
feature: text of another field stands out row by row. ``vector``: the same features by hashing with signs (Weinberger et
al., "Feature Hashing for Large Scale Multitask Learning", 2009), to length 1: an embedding that needs no model.
``buckets``: how often words fall into each of :data:`BUCKETS` classes, which stands for the distribution of tokens.

Guarantees: the same text gives the same numbers on every machine and in every version (:data:`SCHEMA`). Not covered:
what words mean; a text in other words is another text. A guess at a whole text can be confirmed from its sketch, so
sketches are deleted with their events, and are made of redacted texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
DIMENSIONS = 64
BUCKETS = 64
FEATURES = 1 << 14
"""Classes of words and 4-grams whose frequencies are known."""
GRAM = 4
MOST_CHARACTERS = 4000
"""Longer texts are judged by their beginning."""
SKETCH_BYTES = 2 * DIMENSIONS + BUCKETS
ADDED = 0.5
"""What an unseen feature counts."""

_WORD = re.compile(r"\w+")
U64 = NDArray[np.uint64]
F16 = NDArray[np.float16]
F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Sketched:
    """``numbers``: vector in float16, then buckets in uint8: :data:`SKETCH_BYTES` bytes. ``novelty``: None where the
    training texts are not known."""

    numbers: bytes
    novelty: float | None


def sketch(text: str, surprisal: F16 | None = None) -> Sketched:
    """``surprisal``: of each feature, as :func:`surprisals` gives it."""
    words, features = _features(text)
    signs = np.where(features & np.uint64(1), 1.0, -1.0)
    places = ((features >> np.uint64(8)) % np.uint64(DIMENSIONS)).astype(np.int64)
    vector = np.bincount(places, signs, minlength=DIMENSIONS)
    length = np.linalg.norm(vector)
    buckets = np.bincount(((words >> np.uint64(40)) % np.uint64(BUCKETS)).astype(np.int64), minlength=BUCKETS)
    numbers = (vector / (length or 1.0)).astype("<f2").tobytes() + np.minimum(buckets, 255).astype(np.uint8).tobytes()
    return Sketched(numbers, None if surprisal is None else _novelty(features, surprisal))


def novelty(text: str, surprisal: F16) -> float:
    """Mean surprisal of the text's features, in nats; 0 for a text without any."""
    return _novelty(_features(text)[1], surprisal)


def surprisals(texts: Iterable[str]) -> F16:
    """``-log p`` of each class of features in the training texts, float16 ``[FEATURES]``; what was never seen counts
    :data:`ADDED`."""
    counts = np.full(FEATURES, ADDED)
    for text in texts:
        counts += np.bincount(_places(_features(text)[1]), minlength=FEATURES)
    found: F16 = (-np.log(counts / counts.sum())).astype(np.float16)
    return found


def _novelty(features: U64, surprisal: F16) -> float:
    return float(surprisal[_places(features)].mean(dtype=np.float64)) if len(features) else 0.0


def _places(features: U64) -> NDArray[np.int64]:
    return ((features >> np.uint64(24)) % np.uint64(FEATURES)).astype(np.int64)


def _features(text: str) -> tuple[U64, U64]:
    """Hashes of the text's words, and of its words and 4-grams."""
    folded = " ".join(text[:MOST_CHARACTERS].casefold().split())
    found = [crc32(word.encode("utf-8", "replace")) for word in _WORD.findall(folded)]
    words = _mix(np.array(found, dtype=np.uint64))
    return words, np.concatenate((words, _mix(_grams(f" {folded} "))))


def vectors(sketches: Sequence[bytes]) -> F32:
    """``[sketches, DIMENSIONS]``."""
    raw = np.frombuffer(b"".join(sketches), dtype=np.uint8).reshape(-1, SKETCH_BYTES)
    halves: F16 = np.ascontiguousarray(raw[:, : 2 * DIMENSIONS]).view("<f2")
    return halves.astype(np.float32)


def word_buckets(sketches: Sequence[bytes]) -> F32:
    """Words in each class, ``[sketches, BUCKETS]``."""
    raw = np.frombuffer(b"".join(sketches), dtype=np.uint8).reshape(-1, SKETCH_BYTES)
    return raw[:, 2 * DIMENSIONS :].astype(np.float32)


def _grams(text: str) -> U64:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.uint64)
    hashed = np.zeros(max(len(points) - GRAM + 1, 0), dtype=np.uint64)
    for offset in range(GRAM):
        hashed = hashed * np.uint64(0x100000001B3) + points[offset : offset + len(hashed)]
    return hashed


def _mix(values: U64) -> U64:
    """A bijection of 64-bit values that looks random (the finaliser of SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
