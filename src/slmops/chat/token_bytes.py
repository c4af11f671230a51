"""The bytes that each token of a vocabulary stands for, by itself: several of them may make one character.

Covers byte-level vocabularies (an alphabet of 256 printable characters) and those of SentencePiece's kind (``▁`` for a
space, ``<0x0A>`` for a byte). Others get their own spelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: Tokenizer) -> Callable[[int], bytes]:
    """From a token's id to its bytes; an id without a token is none."""
    added = {token_id: token.content.encode() for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    state = tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else b""
    byte_level = b'"ByteLevel"' in state

    def of(token_id: int) -> bytes:
        if token_id in added:
            return added[token_id]
        spelling = tokenizer.id_to_token(token_id)
        if spelling is None:
            return b""
        return _byte_level(spelling) if byte_level else _sentencepiece(spelling)

    return of


def _byte_level(spelling: str) -> bytes:
    try:
        return bytes(_ALPHABET[character] for character in spelling)
    except KeyError:  # an entry that was put in by hand
        return spelling.encode()


def _sentencepiece(spelling: str) -> bytes:
    if found := _BYTE.fullmatch(spelling):
        return bytes([int(found[1], 16)])
    return spelling.replace("▁", " ").encode()


def _alphabet() -> dict[str, int]:
    """Printable Latin-1 stands for itself; the other bytes, in order, for the characters from 256 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(rest)}


_ALPHABET = _alphabet()
