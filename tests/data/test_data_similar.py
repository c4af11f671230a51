"""Repeats against a plain quadratic reference."""

from __future__ import annotations

import random

import pytest

from slmops.data.shingles import jaccard, shingle_set
from slmops.data.similar import repeats
from slmops.data.text import fold, words_only


def plain(texts: list[str], known: list[str], threshold: float) -> list[bool]:
    kept = [shingle_set(words_only(fold(text))) for text in known]
    result = []
    for text in texts:
        own = shingle_set(words_only(fold(text)))
        again = any(jaccard(own, other) >= threshold for other in kept)
        result.append(again)
        if not again:
            kept.append(own)
    return result


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_like_the_reference(threshold: float) -> None:
    rng = random.Random(4)
    words = ["where", "is", "my", "parcel", "card", "lost", "refund", "please", "today", "again"]
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 9))) for _ in range(250)]
    texts += [f"{text}!!" for text in texts[:40]]
    found = repeats(texts[60:], texts[:60], threshold)
    wanted = plain(texts[60:], texts[:60], threshold)
    different = sum(one != other for one, other in zip(found, wanted, strict=True))
    assert different <= 1, "candidates are found with 99.9 %"
    assert any(wanted)


def test_case_and_punctuation_do_not_count() -> None:
    assert repeats(["WHERE is it?", "where is it", "elsewhere"], ["where, is it"]) == [True, True, False]
    assert repeats([], ["a"]) == []
    assert repeats(["", "", "a"]) == [False, True, False]
