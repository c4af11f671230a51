"""Who goes into which split: pure functions of rows' hashes, groups and clusters.

Laws:

* complete and disjoint: every row gets exactly one split; rows of one cluster get the same;
* stratified: a stratum of at least 10 rows gives ``floor(share * rows + 1/2)`` rows to each held-out split wherever its
  clusters can be placed so; smaller strata of at least 3 rows give at least one row to each held-out split when asked;
* stable: the order of rows within a stratum comes from their content and the seed alone, so that added rows move only
  those at the boundary of a share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from slmops.data.shingles import U64, mix

I64 = npt.NDArray[np.int64]
TRAIN, VALIDATION, TEST = 0, 1, 2
SMALL_STRATUM_ROWS = 10


def order_keys(text_hashes: U64, seed: int) -> U64:
    """A random order that content and seed decide: ``[rows]``."""
    return mix(text_hashes ^ mix(np.array([seed % 2**64], dtype=np.uint64)))


def quota(rows: int, share: float, *, small_get_one: bool) -> int:
    """How many of a stratum's ``rows`` a share is."""
    exact = math.floor(share * rows + 0.5)
    if small_get_one and 3 <= rows < SMALL_STRATUM_ROWS and share > 0:
        return max(exact, 1)
    return exact


def divide(
    keys: U64, strata: I64, clusters: I64, shares: Mapping[int, float], *, small_get_one: bool, inner: I64 | None = None
) -> npt.NDArray[np.uint8]:
    """The split of each row: ``[rows]`` of TRAIN, VALIDATION, TEST.

    ``strata`` numbers the groups whose shares are kept; ``inner`` a second grouping kept as far as the first permits;
    ``clusters`` the rows that stay together (the same number); ``shares`` the held-out splits' shares of the rows.
    """
    result = np.full(len(keys), TRAIN, dtype=np.uint8)
    quotas = {split: _quotas(strata, share, small_get_one) for split, share in shares.items() if share > 0}
    clustered = _place_clusters(result, keys, strata, clusters, quotas)
    _fill_with_singles(result, keys, strata, ~clustered, quotas, inner)
    return result


def draw(keys: U64, strata: I64, limit: int) -> npt.NDArray[np.bool_]:
    """Which rows a subset of ``limit`` keeps: strata in proportion, each at least one row while ``limit`` lasts."""
    rows = len(keys)
    if limit >= rows:
        return np.ones(rows, dtype=bool)
    numbers, counts = np.unique(strata, return_counts=True)
    exact = counts * (limit / rows)
    taken = np.minimum(np.maximum(np.floor(exact).astype(np.int64), 1 if len(numbers) <= limit else 0), counts)
    by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
    while taken.sum() != limit:
        missing = limit - int(taken.sum())
        if missing > 0:
            room = by_remainder[taken[by_remainder] < counts[by_remainder]][:missing]
            taken[room] += 1
        else:
            most = np.argsort(-(taken - exact), kind="stable")
            taken[most[taken[most] > 1][:-missing]] -= 1
    kept = np.zeros(rows, dtype=bool)
    for number, members in _members(strata, keys):
        kept[members[: int(taken[np.searchsorted(numbers, number)])]] = True
    return kept


def _quotas(strata: I64, share: float, small_get_one: bool) -> dict[int, int]:
    numbers, counts = np.unique(strata, return_counts=True)
    return {
        int(number): quota(int(count), share, small_get_one=small_get_one)
        for number, count in zip(numbers, counts, strict=True)
    }


def _place_clusters(
    result: npt.NDArray[np.uint8], keys: U64, strata: I64, clusters: I64, quotas: dict[int, dict[int, int]]
) -> npt.NDArray[np.bool_]:
    """Place clusters of two rows and more, while quotas last, and take them off the quotas: which rows were placed.

    A cluster prefers the split that its own hash draws, so that most keep theirs when rows are added.
    """
    _, number, sizes = np.unique(clusters, return_inverse=True, return_counts=True)
    clustered = sizes[number] > 1
    rows = np.flatnonzero(clustered)
    if not len(rows):
        return clustered
    rows = rows[np.argsort(number[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(number[rows])) + 1)
    totals = {int(s): int(c) for s, c in zip(*np.unique(strata, return_counts=True), strict=True)}
    held = {stratum: sum(of.get(stratum, 0) for of in quotas.values()) for stratum in totals}
    train_left = {stratum: totals[stratum] - held[stratum] for stratum in totals}
    groups.sort(key=lambda members: (-len(members), int(keys[members].min())))
    for members in groups:
        numbers, counts = np.unique(strata[members], return_counts=True)
        need = {int(s): int(c) for s, c in zip(numbers, counts, strict=True)}
        left = {TRAIN: train_left, **quotas}
        drawn = _drawn_split(int(keys[members].min()), need, totals, quotas)
        order = [drawn, *(split for split in (TRAIN, VALIDATION, TEST) if split != drawn and split in left)]
        split = next((s for s in order if all(left[s].get(n, 0) >= c for n, c in need.items())), TRAIN)
        for stratum, count in need.items():
            left[split][stratum] -= count
        result[members] = split
    for of in quotas.values():
        for stratum in of:
            of[stratum] = max(of[stratum], 0)
    return clustered


def _drawn_split(
    key: int, need: Mapping[int, int], totals: Mapping[int, int], quotas: Mapping[int, Mapping[int, int]]
) -> int:
    stratum = next(iter(need))
    point = key / 2**64 * totals[stratum]
    for split, of in quotas.items():
        point -= of.get(stratum, 0)
        if point < 0:
            return split
    return TRAIN


def _fill_with_singles(
    result: npt.NDArray[np.uint8],
    keys: U64,
    strata: I64,
    single: npt.NDArray[np.bool_],
    quotas: dict[int, dict[int, int]],
    inner: I64 | None,
) -> None:
    rows = np.flatnonzero(single)
    if not len(rows):
        return
    for stratum, members in _members(strata[rows], keys[rows]):
        ordered = rows[members]
        if inner is not None:
            ordered = _interleave(ordered, inner[ordered])
        begin = 0
        for split in (TEST, VALIDATION):
            end = begin + quotas.get(split, {}).get(stratum, 0)
            result[ordered[begin:end]] = split
            begin = min(end, len(ordered))


def _interleave(ordered: I64, groups: I64) -> I64:
    """Reorder so that every beginning of the list holds the groups in about their proportion."""
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    seen: dict[int, int] = {}
    place = np.empty(len(ordered))
    for index, group in enumerate(number.tolist()):
        seen[group] = seen.get(group, 0) + 1
        place[index] = (seen[group] - 0.5) / sizes[group]
    result: I64 = ordered[np.argsort(place, kind="stable")]
    return result


def _members(strata: I64, keys: U64) -> list[tuple[int, I64]]:
    """Rows of each stratum, in the order of their keys (rows of equal content in their own order)."""
    if not len(strata):
        return []
    order = np.lexsort((keys, strata)).astype(np.int64)
    groups = np.split(order, np.flatnonzero(np.diff(strata[order])) + 1)
    return [(int(strata[group[0]]), group) for group in groups]
