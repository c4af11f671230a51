"""More texts for the teacher to label: variations of the training texts.

A closed-set teacher gives its whole distribution for any text, so the student can learn from texts that nobody
labelled. They need not be good sentences, only near enough to the real ones to show where the teacher draws its lines.
Texts of the validation and test splits are never used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

_WORD = re.compile(r"\S+")


def vary_texts(texts: Sequence[str], *, rows_each: float, seed: int) -> list[str]:
    """About ``rows_each`` variations a text, none equal to a text or to each other; the same for the same arguments.

    Three kinds in turn: the head of one text and the tail of another, two short texts in a row, and a text with some
    words dropped and two swapped.
    """
    if not texts or rows_each <= 0:
        return []
    rng = random.Random(seed)
    wanted = round(rows_each * len(texts))
    known = {_folded(text) for text in texts}
    kinds: tuple[Callable[[Sequence[str], random.Random], str], ...] = (_crossed, _thinned, _crossed, _joined)
    variations: list[str] = []
    for attempt in range(4 * wanted):  # bounded: few distinct variations exist of few short texts
        if len(variations) == wanted:
            break
        text = kinds[attempt % len(kinds)](texts, rng)
        if text and _folded(text) not in known:
            known.add(_folded(text))
            variations.append(text)
    return variations


def _crossed(texts: Sequence[str], rng: random.Random) -> str:
    first, second = _WORD.findall(rng.choice(texts)), _WORD.findall(rng.choice(texts))
    cut, place = rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7)
    return " ".join([*first[: max(1, round(cut * len(first)))], *second[round(place * len(second)) :]])


def _joined(texts: Sequence[str], rng: random.Random) -> str:
    first, second = rng.choice(texts), rng.choice(texts)
    return f"{first} {second}"


def _thinned(texts: Sequence[str], rng: random.Random) -> str:
    words = _WORD.findall(rng.choice(texts))
    kept = [word for word in words if rng.random() > 0.15] or words
    if len(kept) > 2:
        place = rng.randrange(len(kept) - 1)
        kept[place], kept[place + 1] = kept[place + 1], kept[place]
    return " ".join(kept)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())
