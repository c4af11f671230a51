"""Which rows go into which step: decided once, before training, from lengths and a seed.

Rows of like length share a batch, so that little is spent on padding. Because the whole plan is known from the start,
a resumed run skips what was done and goes on with exactly the batches that would have followed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

BATCHES_A_BUCKET = 16
"""Rows are shuffled, cut into pieces of so many batches, and sorted by length inside each piece."""


def plan_batches(lengths: Sequence[int], *, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """Row indices for each of ``steps`` batches; every row once before any row again.

    Raises:
        ValueError: there are no rows.
    """
    if not lengths:
        raise ValueError("no rows to plan batches from")
    rng = random.Random(seed)
    plan: list[list[int]] = []
    while len(plan) < steps:
        plan += _one_epoch(lengths, batch_size, rng)
    return plan[:steps]


def steps_for(rows: int, batch_size: int, epochs: float) -> int:
    """Steps that ``epochs`` passes over ``rows`` take; at least one."""
    return max(1, round(epochs * -(-rows // batch_size)))


def _one_epoch(lengths: Sequence[int], batch_size: int, rng: random.Random) -> list[list[int]]:
    order = list(range(len(lengths)))
    rng.shuffle(order)
    bucket = batch_size * BATCHES_A_BUCKET
    batches: list[list[int]] = []
    for start in range(0, len(order), bucket):
        piece = sorted(order[start : start + bucket], key=lengths.__getitem__)
        batches += [piece[i : i + batch_size] for i in range(0, len(piece), batch_size)]
    rng.shuffle(batches)
    return batches


def divide(
    rows: Sequence[int], lengths: Sequence[int], *, parts: int = 1, max_tokens: int | None = None
) -> list[list[int]]:
    """``rows`` in at least ``parts`` pieces (as far as there are rows), each of at most ``max_tokens`` when padded.

    ``lengths`` are the rows' own, in the same order. A row longer than ``max_tokens`` is a piece of its own.
    """
    most_rows = max(1, -(-len(rows) // max(1, parts)))
    pieces: list[list[int]] = []
    longest = 0
    for row, length in zip(rows, lengths, strict=True):
        longest = max(longest, length)
        full = pieces and (
            len(pieces[-1]) >= most_rows or (max_tokens is not None and longest * (len(pieces[-1]) + 1) > max_tokens)
        )
        if not pieces or full:
            pieces.append([])
            longest = length
        pieces[-1].append(row)
    return pieces
