from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.data.shingles import SHINGLE_CHARS, jaccard, plan_bands, shingle_hashes, shingle_set, signatures
from slmops.data.text import clean, fold, has_final_number, hash64, words_only


def plain_set(text: str) -> set[str]:
    padded = f" {text} ".ljust(SHINGLE_CHARS)
    return {padded[i : i + SHINGLE_CHARS] for i in range(len(padded) - SHINGLE_CHARS + 1)}


def plain_jaccard(left: str, right: str) -> float:
    a, b = plain_set(left), plain_set(right)
    return len(a & b) / len(a | b)


@given(st.lists(st.text(max_size=40), min_size=1, max_size=8))
def test_shingles_are_the_texts_character_5_grams(texts: list[str]) -> None:
    hashes, starts = shingle_hashes(texts)
    assert len(starts) == len(texts)
    parts = np.split(hashes, starts[1:])
    for text, part in zip(texts, parts, strict=True):
        assert len(set(part.tolist())) == len(plain_set(text))
        assert shingle_set(text) == plain_set(text)


@given(st.text("abc ", max_size=30), st.text("abc ", max_size=30))
def test_jaccard_is_the_plain_one(left: str, right: str) -> None:
    assert jaccard(shingle_set(left), shingle_set(right)) == pytest.approx(plain_jaccard(left, right))


def test_signatures_estimate_jaccard() -> None:
    rng = random.Random(1)
    errors = []
    for _ in range(60):
        base = "".join(rng.choices("abcdefghij ", k=200))
        cut = rng.randint(0, 150)
        other = base[cut:] + "".join(rng.choices("abcdefghij ", k=cut))
        one, two = signatures([base, other], 512)
        errors.append(float((one == two).mean()) - plain_jaccard(base, other))
    # sqrt(J (1 - J) / 512) is at most 0.022; the mean of 60 has a spread of at most 0.003.
    assert abs(np.mean(errors)) < 0.012
    assert np.max(np.abs(errors)) < 0.09


def test_signatures_do_not_depend_on_the_batch() -> None:
    texts = ["one text", "and another one", "", "x"]
    together = signatures(texts, 77)
    assert all(np.array_equal(signatures([text], 77)[0], row) for text, row in zip(texts, together, strict=True))


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_find_nearly_all_pairs_at_the_threshold(threshold: float) -> None:
    bands = plan_bands(threshold)
    assert bands.recall(threshold) >= 0.999
    assert bands.hashes <= 96


def test_bands_of_tiny_thresholds_stay_within_their_size() -> None:
    assert plan_bands(0.001).hashes == 96


def test_normal_forms() -> None:
    assert clean(" cafe\u0301\r\nx\r ") == "café\nx"
    assert fold("  CAFE\u0301  Straße\n") == fold("café strasse")
    assert words_only(fold("Where's my card?!")) == "where s my card"
    assert words_only("?!") == "?!"
    assert hash64("a") != hash64("b")


@given(st.text(st.characters(exclude_categories=("Cs",))))
@settings(max_examples=200)
def test_normal_forms_are_stable(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert fold(clean(text)) == fold(text) or "\r" in text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("so 3+4=7\n#### 7", True),
        ("#### 1,234.50", True),
        ("#### $12", True),
        ("#### -3", True),
        ("the answer is 12 apples", True),
        ("3 apples\n#### none", False),
        ("no figure", False),
    ],
)
def test_final_numbers(answer: str, expected: bool) -> None:
    assert has_final_number(answer) is expected
