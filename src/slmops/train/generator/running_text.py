"""Learning a field's language: running text as tokens, of which every one is learnt.

Documents stand one after the other, each closed by the tokenizer's end token, and are cut into pieces of
``train.max_tokens`` without padding. Guarantees: no token of a document is left out and none is learnt twice in a pass
(a piece begins with the token that the one before ended with); what is judged is judged document by document, so that
no figure depends on what stands beside it. Not covered: attention that stops at a document's beginning inside a piece;
the end token is what tells the model of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from slmops.chat import ChatTokenizer
from slmops.errors import DataError, ModelError
from slmops.train.generator.answers import EncodedRow

MEASURED_ROWS = 2
"""Pieces that are judged at once: each of their tokens has its logits."""
ENCODED_AT_ONCE = 1000


def encode_documents(tokenizer: ChatTokenizer, texts: Sequence[str]) -> list[EncodedRow]:
    """Each document whole: what the model reads before it, its tokens, the end token.

    Before it stands the token that the tokenizer opens texts with, else the end token; that one is not learnt.

    Raises:
        ModelError: the tokenizer has no end token.
    """
    end = tokenizer.end_token_id
    if end is None:
        raise ModelError(
            "The model's tokenizer has no end token, so it could not be told where a document ends.",
            remedy="Name one as eos_token in its tokenizer_config.json.",
        )
    opening = tokenizer.encode("a")[:1]
    start = tokenizer.bos_token_id if opening == [tokenizer.bos_token_id] else None
    first = end if start is None else start
    rows: list[EncodedRow] = []
    for at in range(0, len(texts), ENCODED_AT_ONCE):
        for ids in tokenizer.encode_batch(texts[at : at + ENCODED_AT_ONCE], add_special_tokens=False):
            rows.append(EncodedRow([first, *ids, end], [False] + [True] * (len(ids) + 1)))
    return rows


def cut(row: EncodedRow, max_tokens: int) -> list[EncodedRow]:
    """Pieces of at most ``max_tokens``; each begins with the token that the one before ended with."""
    pieces = []
    for at in range(0, max(1, len(row.tokens) - 1), max(1, max_tokens - 1)):
        supervised = row.supervised[at : at + max_tokens]
        pieces.append(EncodedRow(row.tokens[at : at + max_tokens], [False, *supervised[1:]]))
    return [piece for piece in pieces if any(piece.supervised)]


def join(rows: Sequence[EncodedRow]) -> EncodedRow:
    """Documents one after the other; an end token that would stand twice stands once."""
    tokens: list[int] = []
    supervised: list[bool] = []
    for row in rows:
        shared = int(bool(tokens) and tokens[-1] == row.tokens[0])
        tokens += row.tokens[shared:]
        supervised += row.supervised[shared:]
    return EncodedRow(tokens, supervised)


def learnt_and_judged(
    tokenizer: ChatTokenizer, learnt: Sequence[str], judged: Sequence[str], max_tokens: int, path: Path | None = None
) -> dict[str, list[EncodedRow]]:
    """``train``: documents packed into pieces of ``max_tokens``; ``validation``: each document's own pieces.

    Raises:
        DataError: ``max_tokens`` of 1, or no documents.
        ModelError: as :func:`encode_documents`.
    """
    if max_tokens < 2:
        raise DataError(f"train.max_tokens is {max_tokens}, and a piece of text needs 2.", remedy="512 is usual.")
    for name, texts in (("train", learnt), ("validation", judged)):
        if not texts:
            raise DataError(f"The {name} split has no documents.", path=path, remedy="Give more documents.")
    return {
        "train": cut(join(encode_documents(tokenizer, learnt)), max_tokens),
        "validation": judged_pieces(tokenizer, judged, max_tokens),
    }


def judged_pieces(tokenizer: ChatTokenizer, texts: Sequence[str], max_tokens: int) -> list[EncodedRow]:
    """The pieces of each document by itself."""
    return [piece for row in encode_documents(tokenizer, texts) for piece in cut(row, max_tokens)]


def perplexity(loss: float) -> float:
    """Of a mean cross-entropy in nats a token."""
    return math.exp(min(50.0, loss))
