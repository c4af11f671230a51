"""Rows of the task as token batches, on which parts of a model are weighed.

Rows come from the task's own training split, drawn evenly with the seed. A classifier reads their texts; a language
model reads conversation and answer, and what counts is what it says at the answer's tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slmops.artifacts import Message, Row
from slmops.errors import DataError

ToMessages = Callable[[Row], tuple[Message, ...]]
BATCH_TOKENS = 1024
PAD_ID = 0
"""Padding is masked, so any id will do."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Rows of similar length: ``input_ids`` and ``attention_mask`` int64 ``[rows, longest]``; ``predicts`` bool of the
    same shape, True where the next token is one that counts."""

    input_ids: Tensor
    attention_mask: Tensor
    predicts: Tensor

    @property
    def tokens(self) -> int:
        return int(self.attention_mask.sum())


def calibration_batches(
    folder: Path, rows: Sequence[Row], to_messages: ToMessages | None, *, count: int, max_tokens: int, seed: int
) -> list[CalibrationBatch]:
    """``count`` of ``rows`` (all, where there are fewer) as batches for the checkpoint at ``folder``.

    ``to_messages``: what a language model is shown for a row; None for a classifier.

    Raises:
        DataError: there are no rows, or none with tokens that count.
    """
    check_rows(rows)
    chosen = random.Random(seed).sample(list(rows), min(count, len(rows)))
    encoded = list(_encoded(folder, chosen, to_messages, max_tokens))
    if not encoded:
        raise DataError(
            f"None of the {len(chosen)} rows to calibrate on has an answer that fits into {max_tokens} tokens.",
            remedy="Raise train.max_tokens, or look at the data with: slmops data RECIPE",
        )
    return list(_batches(encoded))


def check_rows(rows: Sequence[Row]) -> None:
    """Raises :class:`DataError` where there are none."""
    if not rows:
        raise DataError(
            "There are no rows to calibrate on: the train split is empty.",
            remedy="Give rows for training: pruning weighs a model's parts by what they do on them.",
        )


def first_tokens(batches: Sequence[CalibrationBatch], most: int) -> list[CalibrationBatch]:
    """The first batches that together have at most ``most`` tokens; one at least."""
    kept: list[CalibrationBatch] = []
    for batch in batches:
        if kept and sum(one.tokens for one in kept) + batch.tokens > most:
            break
        kept.append(batch)
    return kept


def _encoded(
    folder: Path, rows: Sequence[Row], to_messages: ToMessages | None, max_tokens: int
) -> Iterator[tuple[list[int], list[bool]]]:
    """Token ids of each row, and at which of them the next token counts."""
    if to_messages is None:
        from slmops.chat.files import open_tokenizer

        tokenizer = open_tokenizer(folder / "tokenizer.json")
        tokenizer.enable_truncation(max_tokens)
        for encoding in tokenizer.encode_batch([row.text for row in rows]):
            ids = encoding.ids or [PAD_ID]
            yield ids, [True] * len(ids)
        return
    from slmops.chat import ChatTokenizer

    chat = ChatTokenizer.load(folder)
    for row in rows:
        if row.target is None:
            ids = chat.encode_prompt(to_messages(row))[:max_tokens]
            mask = [True] * len(ids)
        else:
            both = chat.encode_training(to_messages(row), row.target)
            ids, mask = list(both.input_ids[:max_tokens]), list(both.loss_mask[:max_tokens])
        if any(mask[1:]):
            yield ids, [*mask[1:], False]


def _batches(encoded: Sequence[tuple[list[int], list[bool]]]) -> Iterator[CalibrationBatch]:
    """Short ones together; a batch has at most :data:`BATCH_TOKENS` padded tokens, or one row. Shuffled by what comes
    first among ``encoded``, so that the first batches are no shorter than the others on the whole."""
    groups: list[list[int]] = []
    for index in sorted(range(len(encoded)), key=lambda i: len(encoded[i][0])):
        longest = len(encoded[index][0])
        if groups and (len(groups[-1]) + 1) * longest <= BATCH_TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    for group in sorted(groups, key=min):
        longest = max(len(encoded[index][0]) for index in group)
        input_ids = torch.full((len(group), longest), PAD_ID)
        attention_mask = torch.zeros((len(group), longest), dtype=torch.int64)
        predicts = torch.zeros((len(group), longest), dtype=torch.bool)
        for line, index in enumerate(group):
            ids, wanted = encoded[index]
            input_ids[line, : len(ids)] = torch.tensor(ids)
            attention_mask[line, : len(ids)] = 1
            predicts[line, : len(ids)] = torch.tensor(wanted)
        yield CalibrationBatch(input_ids, attention_mask, predicts)
