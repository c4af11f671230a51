"""Rows of the task as token rows, one by one and without padding, for graphs that are measured.

They come from the training split, drawn evenly with the seed, or from a file: JSON lines with ``messages`` and
``target``, or with ``text``.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from slmops.artifacts import Message, Row
from slmops.compress.quantize.statistics import TokenRow
from slmops.errors import DataError
from slmops.recipe import CalibrationConfig

ToMessages = Callable[[Row], tuple[Message, ...]]
FEWEST_TOKENS = 2


def read_calibration(config: CalibrationConfig, rows: Sequence[Row], seed: int) -> list[Row]:
    """At most ``config.rows`` rows: of ``config.data``, or of ``rows`` (the training split) where it is null.

    Raises:
        DataError: no such file, a line that is no such row, or no row at all.
    """
    found = list(rows) if config.data is None else _read(Path(config.data))
    if not found:
        raise DataError(
            "There are no rows to calibrate on: "
            + ("the train split is empty." if config.data is None else "the file is empty."),
            path=None if config.data is None else Path(config.data),
            remedy="Give rows in compress.calibration.data, or an algorithm that needs none: rtn, k_quant or hqq.",
        )
    return random.Random(seed).sample(found, min(config.rows, len(found)))


def token_rows(folder: Path, rows: Sequence[Row], to_messages: ToMessages | None, max_tokens: int) -> list[TokenRow]:
    """``rows`` as the model at ``folder`` reads them; ``to_messages``: what a language model is shown for a row, None
    for a classifier. Rows of running text are read as they are.

    Raises:
        DataError: no row has an answer that fits into ``max_tokens``.
    """
    encode = _classifier(folder) if to_messages is None else _generator(folder, to_messages)
    made = []
    for row in rows:
        ids, counts = encode(row)
        ids, counts = ids[:max_tokens], counts[:max_tokens]
        if len(ids) >= FEWEST_TOKENS and any(counts[1:]):
            made.append(TokenRow(np.array(ids, dtype=np.int64), np.array([*counts[1:], False])))
    if not made:
        raise DataError(
            f"None of the {len(rows)} rows to calibrate on has an answer that fits into {max_tokens} tokens.",
            remedy="Raise train.max_tokens, or give other rows in compress.calibration.data.",
        )
    return made


def _classifier(folder: Path) -> Callable[[Row], tuple[list[int], list[bool]]]:
    from slmops.chat.files import open_tokenizer

    tokenizer = open_tokenizer(folder / "tokenizer.json")

    def encode(row: Row) -> tuple[list[int], list[bool]]:
        ids = tokenizer.encode(row.text if row.messages else row.target or "").ids
        return ids, [True] * len(ids)

    return encode


def _generator(folder: Path, to_messages: ToMessages) -> Callable[[Row], tuple[list[int], list[bool]]]:
    from slmops.chat import ChatTokenizer

    chat = ChatTokenizer.load(folder)

    def encode(row: Row) -> tuple[list[int], list[bool]]:
        if not row.messages:
            ids = chat.encode(row.target or "")
            return ids, [True] * len(ids)
        if row.target is None:
            ids = chat.encode_prompt(to_messages(row))
            return ids, [True] * len(ids)
        both = chat.encode_training(to_messages(row), row.target)
        return list(both.input_ids), list(both.loss_mask)

    return encode


def _read(path: Path) -> list[Row]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The rows to calibrate on cannot be read: {error}.", path=path) from None
    return [_row(line, path, number) for number, line in enumerate(filter(str.strip, lines), start=1)]


def _row(line: str, path: Path, number: int) -> Row:
    try:
        raw: dict[str, Any] = json.loads(line)
        if "text" in raw:
            return Row(str(number), (), str(raw["text"]))
        messages = tuple(Message(one["role"], one["content"]) for one in raw["messages"])
        return Row(str(number), messages, None if raw.get("target") is None else str(raw["target"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This is no row to calibrate on: {type(error).__name__} {error}.",
            path=path,
            row=number,
            remedy='Write {"messages": [...], "target": "..."} or {"text": "..."} on each line.',
        ) from None
