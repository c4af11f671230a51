"""Texts that repeat others: what comes later is compared with what was there, and with what came before it.

Guarantees: the same texts give the same result; every match is compared exactly (:mod:`slmops.data.shingles`); a pair
at the threshold is found with at least 99.9 %. In a bucket of very many alike, each text is compared with the last
:data:`WINDOW_TEXTS` only, so the work stays linear.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from slmops.data.shingles import jaccard, plan_bands, shingle_set, signatures
from slmops.data.text import fold, words_only

WINDOW_TEXTS = 100
SIGNED_AT_ONCE = 4096


def repeats(texts: Sequence[str], known: Sequence[str] = (), threshold: float = 0.9) -> list[bool]:
    """For each of ``texts``: whether it is as like one of ``known``, or an earlier one that is kept, as ``threshold``.

    ``threshold`` is a Jaccard similarity of character 5-grams; case, punctuation and blanks do not count.
    """
    forms = [words_only(fold(text)) for text in (*known, *texts)]
    bands = plan_bands(threshold)
    buckets: list[defaultdict[bytes, deque[int]]] = [
        defaultdict(lambda: deque(maxlen=WINDOW_TEXTS)) for _ in range(bands.bands)
    ]
    exact: set[str] = set()
    result: list[bool] = []
    for start in range(0, len(forms), SIGNED_AT_ONCE):
        signed = signatures(forms[start : start + SIGNED_AT_ONCE], bands.hashes)
        for index, signature in enumerate(signed, start):
            form, keys = (
                forms[index],
                [signature[at : at + bands.rows].tobytes() for at in range(0, bands.hashes, bands.rows)],
            )
            again = form in exact
            if not again and index >= len(known):
                others = {other for bucket, key in zip(buckets, keys, strict=True) for other in bucket.get(key, ())}
                own = shingle_set(form)
                again = any(jaccard(own, shingle_set(forms[other])) >= threshold for other in sorted(others))
            if index >= len(known):
                result.append(again)
            if not again:
                exact.add(form)
                for bucket, key in zip(buckets, keys, strict=True):
                    bucket[key].append(index)
    return result
