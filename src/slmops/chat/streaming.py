"""Token ids to text, piece by piece.

Guarantees: the pieces of :meth:`StreamDecoder.push` and the last one of :meth:`StreamDecoder.flush`, put together, are
what decoding all ids at once gives, wherever the ids make text; no piece ends within a character. Each step decodes a
few tokens, not the answer.

Where bytes are no text, the two may differ in how many replacement characters they show: a decoder of SentencePiece's
kind gives up a whole run of bytes for one bad byte at its end, and its beginning has been shown by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\ufffd"  # What a decoder shows for bytes that are not (yet) a character.


class StreamDecoder:
    """``decode``: ids to text, the whole-sequence decoder that the pieces have to agree with."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._shown = 0  # tokens at the window's start whose text has been given out

    def push(self, token_id: int) -> str:
        """The text that is certain now and was not before; often empty within a character."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """What was held back, for the end of the sequence: bytes without their character."""
        return self._advance(self._decode(self._window)) if self._window else ""

    def _advance(self, text: str) -> str:
        # The window starts with tokens already shown, because decoders treat a first token otherwise: those of
        # SentencePiece's kind drop its leading space.
        shown = self._decode(self._window[: self._shown])
        piece = text[len(shown) :] if text.startswith(shown) else self._decode(self._window[self._shown :])
        if piece:
            del self._window[: self._shown]
        self._shown = len(self._window)
        return piece
