"""Which rows are the same, or nearly: decisions over arrays, with rows' texts read only for the last comparison.

What is decided, in this order, for rows of the same file:

1. the same text with different labels (closed label sets): nobody here can know which is right, a majority of two
   against one least of all, so all of them go to the quarantine for a person to look at;
2. the same text with the same answer: the first stays;
3. the same or nearly the same text in a file further from training (test, then validation): the other row goes;
4. nearly the same text with the same answer, in the training file: the first stays. With different answers both stay:
   the small difference may be what matters. Both stay too where the input joins several columns or turns: two
   questions about one long passage are nearly the same text.

Rows that stay and are nearly the same (or the same with different answers, in open tasks) share a cluster number;
clusters must not straddle splits. Files given for validation and test lose exact duplicates only, so that results on a
public test set stay comparable.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from slmops.data.shingles import U8, U64, Bands, jaccard, shingle_set
from slmops.data.split import I64

# The next three bound the work where everything is a little alike (a million rows out of one template).
PREFILTER_SIGMAS = 4.0
WINDOW_ROWS = 100  # rows of one bucket that each row is compared with
MAX_MISSES = 16  # exact comparisons in vain, a row, of pairs whose signatures agree less than the threshold
ROWS_AT_ONCE = 1 << 13  # of a band in sorted order: their texts are compared while they are in memory
CACHED_SHINGLES = 1 << 19  # at about 120 bytes each
KEPT_AT_ONCE = 256

TRAIN_FILE, VALIDATION_FILE, TEST_FILE = 0, 1, 2


class Fate(IntEnum):
    """What becomes of a row."""

    KEPT = 0
    SAME_ID = 1
    CONFLICT = 2
    EXACT = 3
    OVERLAP_EXACT = 4
    OVERLAP_NEAR = 5
    NEAR = 6
    OVER_LIMIT = 7


@dataclass(frozen=True)
class Columns:
    """Rows as arrays ``[rows]``: hashes of id, folded text and folded answer, and the file (role) each came from."""

    ids: U64
    texts: U64
    answers: U64
    files: U8


@dataclass
class Clusters:
    """Disjoint sets of rows, by union and find."""

    parents: I64
    truncated: bool = field(default=False)

    @classmethod
    def of(cls, rows: int) -> Clusters:
        return cls(np.arange(rows, dtype=np.int64))

    def find(self, row: int) -> int:
        parents = self.parents
        root = row
        while parents[root] != root:
            root = int(parents[root])
        while parents[row] != root:
            parents[row], row = root, int(parents[row])
        return root

    def unite(self, left: int, right: int) -> None:
        a, b = self.find(left), self.find(right)
        self.parents[max(a, b)] = min(a, b)

    def numbers(self) -> I64:
        """The smallest row of each row's cluster: ``[rows]``."""
        numbers = self.parents
        while True:
            above = numbers[numbers]
            if np.array_equal(above, numbers):
                return above
            numbers = above


def mark_same_ids(fates: U8, columns: Columns) -> None:
    """The first row of an id stays."""
    fates[_repeats(columns.ids, np.flatnonzero(fates == Fate.KEPT))] = Fate.SAME_ID


def mark_exact(fates: U8, columns: Columns, *, closed: bool) -> None:
    """Steps 1 and 2, and 3 for equal texts."""
    for file in (TRAIN_FILE, VALIDATION_FILE, TEST_FILE):
        rows = np.flatnonzero((fates == Fate.KEPT) & (columns.files == file))
        if closed:
            rows = rows[np.argsort(columns.texts[rows], kind="stable")]
            groups = _group_numbers(columns.texts[rows])
            differs = _differs_within(groups, columns.answers[rows])
            fates[rows[differs]] = Fate.CONFLICT
            rows = np.sort(rows[~differs])
        both = columns.texts[rows] ^ (columns.answers[rows] * np.uint64(0x9E3779B97F4A7C15))
        fates[rows[_repeats(both)]] = Fate.EXACT
    for file, further in ((VALIDATION_FILE, [TEST_FILE]), (TRAIN_FILE, [VALIDATION_FILE, TEST_FILE])):
        held_out = np.isin(columns.files, further) & (fates == Fate.KEPT)
        rows = np.flatnonzero((columns.files == file) & (fates == Fate.KEPT))
        fates[rows[np.isin(columns.texts[rows], columns.texts[held_out])]] = Fate.OVERLAP_EXACT


def unite_equal_texts(clusters: Clusters, fates: U8, columns: Columns) -> None:
    """One cluster for the rows of each text."""
    rows = np.flatnonzero(fates == Fate.KEPT)
    rows = rows[np.argsort(columns.texts[rows], kind="stable")]
    same = np.flatnonzero(columns.texts[rows[1:]] == columns.texts[rows[:-1]])
    for index in same.tolist():
        clusters.unite(int(rows[index]), int(rows[index + 1]))


class Similarity:
    """Exact similarity of two rows; ``text_of`` gives a row's text in the form that is compared."""

    def __init__(self, text_of: Callable[[int], str]) -> None:
        self._text_of = text_of
        self._cache: OrderedDict[int, frozenset[str]] = OrderedDict()
        self._cached_shingles = 0

    def __call__(self, left: int, right: int) -> float:
        return jaccard(self._set(left), self._set(right))

    def _set(self, row: int) -> frozenset[str]:
        known = self._cache.get(row)
        if known is None:
            known = self._cache[row] = shingle_set(self._text_of(row))
            self._cached_shingles += len(known)
            while self._cached_shingles > CACHED_SHINGLES and len(self._cache) > 2:
                self._cached_shingles -= len(self._cache.popitem(last=False)[1])
        else:
            self._cache.move_to_end(row)
        return known


def unite_near(
    clusters: Clusters,
    kept: I64,
    signatures: U8,
    bands: Bands,
    threshold: float,
    similarity: Callable[[int, int], float],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """One cluster for rows that are nearly the same, and for those that a chain of such pairs connects.

    ``kept`` are the rows to compare, ``signatures`` those of all rows: ``[rows, bands.hashes]``. Every pair is compared
    exactly before it counts. Sets ``clusters.truncated`` where so many were alike that some were not compared.
    """
    misses = np.zeros(len(signatures), dtype=np.uint8)
    for band in range(bands.bands):
        for left, right, likely in _candidates(clusters, kept, signatures, band, bands, threshold, misses):
            if clusters.find(left) == clusters.find(right):
                continue
            if not likely and max(misses[left], misses[right]) >= MAX_MISSES:
                clusters.truncated = True
            elif similarity(left, right) >= threshold:
                clusters.unite(left, right)
            elif not likely:
                misses[left] += 1
                misses[right] += 1
        progress(band + 1, bands.bands)


def mark_near(
    fates: U8,
    columns: Columns,
    clusters: I64,
    threshold: float,
    similarity: Callable[[int, int], float],
    *,
    remove: bool,
) -> None:
    """Steps 3 and, with ``remove``, 4 for rows that are nearly the same."""
    kept = fates == Fate.KEPT
    for file, further in ((VALIDATION_FILE, [TEST_FILE]), (TRAIN_FILE, [VALIDATION_FILE, TEST_FILE])):
        held_out = kept & np.isin(columns.files, further)
        rows = np.flatnonzero((columns.files == file) & kept)
        fates[rows[np.isin(clusters[rows], clusters[held_out])]] = Fate.OVERLAP_NEAR
        kept = fates == Fate.KEPT
    rows = np.flatnonzero(kept & (columns.files == TRAIN_FILE)) if remove else np.zeros(0, dtype=np.int64)
    for members in groups_of(clusters[rows], rows):
        by_answer: dict[int, list[int]] = {}
        for row in members.tolist():
            before = by_answer.setdefault(int(columns.answers[row]), [])
            # Equal texts with equal answers are gone already: those left differ in the answer, or in the text.
            if any(similarity(other, row) >= threshold for other in before[-KEPT_AT_ONCE:]):
                fates[row] = Fate.NEAR
            else:
                before.append(row)


def groups_of(numbers: I64, rows: I64) -> Iterator[I64]:
    """Rows of each number that has two and more, in order."""
    order = np.argsort(numbers, kind="stable")
    edges = np.flatnonzero(np.diff(numbers[order])) + 1
    starts, ends = np.concatenate(([0], edges)), np.concatenate((edges, [len(order)]))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):  # one empty run where there are no rows
        if end - start > 1:
            yield rows[order[start:end]]


def _candidates(
    clusters: Clusters, kept: I64, signatures: U8, band: int, bands: Bands, threshold: float, misses: U8
) -> Iterator[tuple[int, int, bool]]:
    """Pairs that agree in one band and whose whole signatures do not rule them out; and whether these make it likely.

    Buckets are runs of equal keys in sorted order; pairs at distance 1, 2, ... within them are found for all buckets at
    once.
    """
    part = signatures[kept, band * bands.rows : (band + 1) * bands.rows]
    keys = np.zeros((len(kept), 8), dtype=np.uint8)
    keys[:, : bands.rows] = part
    packed = keys.view(np.uint64)[:, 0]
    order = np.argsort(packed, kind="stable")
    packed, rows = packed[order], kept[order]
    spread = (threshold * (1 - threshold) / bands.hashes) ** 0.5
    enough = (threshold - PREFILTER_SIGMAS * spread) * bands.hashes
    for start in range(0, len(rows), ROWS_AT_ONCE):
        active = np.arange(start, min(start + ROWS_AT_ONCE, len(rows)), dtype=np.int64)
        for distance in range(1, WINDOW_ROWS + 1):
            active = active[active + distance < len(rows)]
            active = active[packed[active] == packed[active + distance]]
            left, right = rows[active], rows[active + distance]
            apart = clusters.parents[left] != clusters.parents[right]
            left, right = left[apart], right[apart]
            same = signatures[left] == signatures[right]
            agreeing = np.count_nonzero(same, axis=1)
            # A pair belongs to the first band in which it agrees: it is compared once, and missed once.
            alike = np.flatnonzero(agreeing >= enough)
            before = same[alike, : band * bands.rows].reshape(len(alike), band, bands.rows)
            alike = alike[~before.all(axis=2).any(axis=1)]
            likely = agreeing[alike] >= threshold * bands.hashes
            tired = ~likely & (np.maximum(misses[left[alike]], misses[right[alike]]) >= MAX_MISSES)
            clusters.truncated = clusters.truncated or bool(tired.any())
            alike, likely = alike[~tired], likely[~tired]
            yield from zip(left[alike].tolist(), right[alike].tolist(), likely.tolist(), strict=True)
            if not len(active):
                break
        else:
            clusters.truncated = True


def _repeats(values: npt.NDArray[np.uint64], rows: I64 | None = None) -> I64:
    """Positions (or ``rows``) whose value came before."""
    used = values if rows is None else values[rows]
    repeated = np.ones(len(used), dtype=bool)
    repeated[np.unique(used, return_index=True)[1]] = False
    found: I64 = np.flatnonzero(repeated).astype(np.int64)
    return found if rows is None else rows[found]


def _group_numbers(sorted_values: U64) -> I64:
    if not len(sorted_values):
        return np.zeros(0, dtype=np.int64)
    return np.concatenate(([0], np.cumsum(np.diff(sorted_values) != 0))).astype(np.int64)


def _differs_within(groups: I64, values: U64) -> npt.NDArray[np.bool_]:
    """Whether a row's group holds more than one value."""
    if not len(groups):
        return np.zeros(0, dtype=bool)
    starts = np.concatenate(([0], np.flatnonzero(np.diff(groups)) + 1))
    differs: npt.NDArray[np.bool_] = np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts)
    return differs[groups]
