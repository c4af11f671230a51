from __future__ import annotations

import random

import numpy as np

from slmops.data.dedupe import (
    TEST_FILE,
    TRAIN_FILE,
    Clusters,
    Columns,
    Fate,
    Similarity,
    mark_exact,
    mark_near,
    unite_near,
)
from slmops.data.shingles import plan_bands, signatures
from slmops.data.text import fold, hash64, words_only

THRESHOLD = 0.8


def columns_of(texts: list[str], answers: list[str], files: list[int] | None = None) -> Columns:
    return Columns(
        ids=np.arange(len(texts), dtype=np.uint64),
        texts=np.array([hash64(fold(text)) for text in texts], dtype=np.uint64),
        answers=np.array([hash64(answer) for answer in answers], dtype=np.uint64),
        files=np.array(files or [TRAIN_FILE] * len(texts), dtype=np.uint8),
    )


def variations(seed: int, families: int, each: int) -> list[str]:
    rng = random.Random(seed)
    texts = []
    for _ in range(families):
        base = "".join(rng.choices("abcdefghijklmnop ", k=rng.randint(40, 120))).strip()
        for _ in range(each):
            place = rng.randrange(len(base))
            texts.append(base[:place] + rng.choice("qrstu") * rng.randint(0, 6) + base[place:])
    return texts


def plain_clusters(texts: list[str], similarity: Similarity) -> list[int]:
    """The definition: connect all pairs at the threshold, by brute force."""
    numbers = list(range(len(texts)))
    for left in range(len(texts)):
        for right in range(left + 1, len(texts)):
            if numbers[left] != numbers[right] and similarity(left, right) >= THRESHOLD:
                old, new = sorted((numbers[left], numbers[right]), reverse=True)
                numbers = [new if number == old else number for number in numbers]
    return numbers


def test_clusters_are_those_of_brute_force() -> None:
    texts = [words_only(fold(text)) for text in variations(0, families=60, each=5)]
    similarity = Similarity(lambda row: texts[row])
    bands = plan_bands(THRESHOLD)
    clusters = Clusters.of(len(texts))
    unite_near(clusters, np.arange(len(texts)), signatures(texts, bands.hashes), bands, THRESHOLD, similarity)
    expected = plain_clusters(texts, similarity)
    assert clusters.numbers().tolist() == expected
    assert not clusters.truncated
    assert 60 <= len(set(expected)) < 200


def test_removal_keeps_one_of_each_like_with_the_same_answer() -> None:
    texts = [words_only(fold(text)) for text in variations(1, families=30, each=6)]
    answers = [str(number % 2) for number in range(len(texts))]
    similarity = Similarity(lambda row: texts[row])
    numbers = np.array(plain_clusters(texts, similarity), dtype=np.int64)
    fates = np.zeros(len(texts), dtype=np.uint8)
    mark_near(fates, columns_of(texts, answers), numbers, THRESHOLD, similarity, remove=True)
    kept = [row for row in range(len(texts)) if fates[row] == Fate.KEPT]
    removed = [row for row in range(len(texts)) if fates[row] == Fate.NEAR]
    assert removed
    for row in removed:  # for a reason: an earlier row like it, of the same answer, stays
        assert any(
            other < row and answers[other] == answers[row] and similarity(other, row) >= THRESHOLD for other in kept
        )
    for row in kept:  # nothing is left to remove
        assert not any(
            other < row and answers[other] == answers[row] and similarity(other, row) >= THRESHOLD for other in kept
        )


def test_where_everything_is_alike_the_work_is_bounded_and_that_is_said() -> None:
    rng = random.Random(0)
    texts = [f"please tell me where the parcel with number {rng.randrange(10**6)} is" for _ in range(3000)]
    calls = 0

    class Counting(Similarity):
        def __call__(self, left: int, right: int) -> float:
            nonlocal calls
            calls += 1
            return super().__call__(left, right)

    bands = plan_bands(0.9)
    clusters = Clusters.of(len(texts))
    similarity = Counting(lambda row: texts[row])
    unite_near(clusters, np.arange(len(texts)), signatures(texts, bands.hashes), bands, 0.9, similarity)
    assert clusters.truncated
    assert calls < 40 * len(texts)


def test_exact_rules() -> None:
    texts = ["Same text", "same  TEXT", "split label", "split label", "in test", "own"]
    answers = ["a", "a", "a", "b", "a", "a"]
    columns = columns_of([*texts, "In Test"], [*answers, "b"], [TRAIN_FILE] * 6 + [TEST_FILE])
    fates = np.zeros(7, dtype=np.uint8)
    mark_exact(fates, columns, closed=True)
    assert fates.tolist() == [Fate.KEPT, Fate.EXACT, Fate.CONFLICT, Fate.CONFLICT, Fate.OVERLAP_EXACT, Fate.KEPT, 0]
    fates = np.zeros(7, dtype=np.uint8)
    mark_exact(fates, columns, closed=False)
    assert fates.tolist() == [Fate.KEPT, Fate.EXACT, 0, 0, Fate.OVERLAP_EXACT, 0, 0]
