"""A teacher's token probabilities on disk: the k likeliest of each token, and the mass of all others.

::

    token_signals.json   what they belong to: tokenizer, vocabulary, k, temperature, longest row
    rows_<split>.npy     for each row of the split: where its tokens start, how many, and a checksum of its ids
    tokens_<split>.npy   one record a token that is learnt, mapped from disk

A record holds ids (16 bits where the vocabulary allows, else 32), natural logarithms of probabilities in float16 in
descending order, the logarithm of the mass of all other tokens, and that of the token that really comes next: at most
:data:`~slmops.recipe.MAX_SIGNAL_BYTES`. Rows without anything to learn have no records.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import DataError

HEADER_NAME = "token_signals.json"
ROW_DTYPE = np.dtype([("start", "<i8"), ("tokens", "<u4"), ("checksum", "<u4")])
FLOOR = -60.0
"""Logarithm of the smallest mass that is told from none: float16 holds it, and the mass is far below rounding."""

Records = NDArray[Any]


@dataclass(frozen=True)
class SignalHeader:
    """``tokenizer``: digest of the teacher's. ``temperature``: all probabilities are softened by it already."""

    tokenizer: str
    vocabulary: int
    top_k: int
    temperature: float
    max_tokens: int
    schema: int = 1

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one record."""
        ids = "<u2" if self.vocabulary <= 1 << 16 else "<u4"
        return np.dtype([("ids", ids, (self.top_k,)), ("logs", "<f2", (self.top_k,)), ("tail", "<f2"), ("next", "<f2")])

    @property
    def token_bytes(self) -> int:
        return self.dtype.itemsize

    def write(self, folder: Path) -> None:
        (folder / HEADER_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> SignalHeader:
        """Raises :class:`DataError` where there is none."""
        try:
            raw = json.loads((folder / HEADER_NAME).read_text("utf-8"))
            return cls(**{name: raw[name] for name in cls.__dataclass_fields__})
        except FileNotFoundError:
            raise DataError(f"There are no teacher's token signals: {HEADER_NAME} is missing.", path=folder) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{HEADER_NAME} cannot be read: {error!r}.", path=folder) from None


@dataclass(frozen=True)
class TokenSignals:
    """The signals of one split."""

    header: SignalHeader
    rows: NDArray[Any]
    records: Records

    @classmethod
    def read(cls, folder: Path, split: str) -> TokenSignals:
        """Raises :class:`DataError`: a file is missing, damaged, or of other signals."""
        header = SignalHeader.read(folder)
        rows, records = (
            _map(folder / f"rows_{split}.npy", ROW_DTYPE),
            _map(folder / f"tokens_{split}.npy", header.dtype),
        )
        if int(rows["tokens"].sum()) != len(records):
            raise DataError(
                f"tokens_{split}.npy has {len(records):,} tokens where its rows have {int(rows['tokens'].sum()):,}.",
                path=folder,
                remedy="Delete the artifact and run again.",
            )
        return cls(header, rows, records)

    def of_row(self, row: int) -> Records:
        start, tokens = int(self.rows["start"][row]), int(self.rows["tokens"][row])
        return self.records[start : start + tokens]


def checksum(ids: Sequence[int]) -> int:
    """Of a row's token ids."""
    return zlib.crc32(np.asarray(ids, dtype="<u4").tobytes())


def _map(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"There are no teacher's token signals: {path.name} is missing.", path=path.parent) from None
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path.name} cannot be read: {error}.", path=path.parent) from None
    if found.dtype != dtype or found.ndim != 1:
        raise DataError(f"{path.name} does not hold what {HEADER_NAME} says.", path=path.parent)
    return found
