"""Sketches, references and the verdict on a window."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitor_helpers import row

from slmops.errors import CorruptArtifactError
from slmops.monitor.drift import FEWEST, drift
from slmops.monitor.reference import (
    Reference,
    Seen,
    build_reference,
    read_reference,
    reference_from_events,
    sample_of,
    write_reference,
)
from slmops.monitor.sketch import DIMENSIONS, SKETCH_BYTES, novelty, sketch, surprisals, vectors, word_buckets

WORDS = "my card is lost refund the fee please when will it come balance of account top up".split()  # noqa: SIM905
NEW = ["spaceship", "quasar", "nebula", "telescope", "orbit", "gravity"]
LABELS = ("card", "fee", "refund")


def texts(seed: int, count: int, words: list[str] = WORDS) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(words, k=chance.randint(3, 9))) for _ in range(count)]


def seen(seed: int, count: int, **changes: Any) -> list[Seen]:
    chance = random.Random(seed)
    labels = [chance.choice(LABELS) for _ in range(count)]
    pairs = zip(texts(seed, count), labels, strict=True)
    made = [Seen(text, label, label, chance.betavariate(8, 2), True) for text, label in pairs]
    return [Seen(**{**vars(one), **changes}) for one in made]


def window(reference: Reference, rows: list[Seen]) -> list[dict[str, Any]]:
    found = []
    for number, one in enumerate(rows):
        numbers = sketch(one.text, reference.surprisal)
        found.append(
            row(
                number,
                sketch=numbers.numbers,
                novelty=numbers.novelty,
                input_chars=len(one.text),
                output_chars=len(one.output),
                label=one.label,
                confidence=one.confidence,
                format_ok=one.format_ok,
            )
        )
    return found


@pytest.fixture(scope="module")
def reference() -> Reference:
    return build_reference(texts(1, 500), seen(2, 400), about={"task": "classification"})


@given(st.text())
def test_a_sketch_is_short_finite_and_always_the_same(text: str) -> None:
    numbers = sketch(text).numbers
    assert numbers == sketch(text).numbers
    assert len(numbers) == SKETCH_BYTES
    vector = vectors([numbers])[0]
    assert vector.shape == (DIMENSIONS,)
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector) < 1.01
    assert text in ("", " ") or word_buckets([numbers]).min() >= 0


def test_alike_texts_lie_near_and_blanks_do_not_count() -> None:
    first, alike, same, other = vectors(
        [sketch(t).numbers for t in ("my card is lost", "my card was lost", " My  card IS lost ", "orbit of a nebula")]
    )
    assert first @ alike > 0.5 > first @ other
    assert np.array_equal(first, same)


def test_new_words_surprise() -> None:
    table = surprisals(texts(1, 500))
    assert table.shape == (1 << 14,)
    known, new = (np.mean([novelty(text, table) for text in texts(7, 50, words)]) for words in (WORDS, NEW))
    assert new > known + 1
    assert novelty("", table) >= 0
    assert np.exp(-table.astype(np.float64)).sum() == pytest.approx(1, abs=0.02)


def test_unchanged_traffic_is_no_alarm(reference: Reference) -> None:
    found = drift(reference, sample_of(window(reference, seen(3, 300))))
    assert not found.alarm
    assert {view.name for view in found.views} == {"novelty", "embedding", "tokens", "length", "labels", "confidence"}
    assert found.untested == ("answer", "format")
    assert "look like the model's test rows" in found.sentence


@pytest.mark.parametrize(
    ("view", "changed"),
    [
        ("novelty", lambda one, n: {"text": texts(n, 1, NEW)[0]} if n % 5 == 0 else {}),
        ("labels", lambda one, n: {"label": "fee", "output": "fee"} if n % 2 else {}),
        ("labels", lambda one, n: {"label": "new", "output": "new"} if n % 8 == 0 else {}),
        ("confidence", lambda one, n: {"confidence": one.confidence * 0.7} if n % 2 else {}),
        ("length", lambda one, n: {"text": f"{one.text} {one.text} {one.text}"}),
        ("format", lambda one, n: {"format_ok": n % 10 != 0}),
    ],
)
def test_what_has_changed_is_named(reference: Reference, view: str, changed: Any) -> None:
    rows = [Seen(**{**vars(one), **changed(one, number)}) for number, one in enumerate(seen(4, 300))]
    found = drift(reference, sample_of(window(reference, rows)))
    assert view in {one.name for one in found.views if one.alarm}
    assert found.alarm
    assert found.to_json()["alarm"]


def test_too_few_rows_are_told_not_judged(reference: Reference) -> None:
    few = drift(reference, sample_of(window(reference, seen(3, FEWEST - 1))))
    assert not few.views
    assert not few.alarm
    assert "too few" in few.sentence
    assert not drift(reference, sample_of([])).alarm


def test_earlier_traffic_can_be_the_reference(reference: Reference) -> None:
    earlier = reference_from_events(window(reference, seen(5, 300)))
    assert not drift(earlier, sample_of(window(reference, seen(6, 300)))).alarm
    moved = seen(7, 300, label="fee", output="fee")
    assert drift(earlier, sample_of(window(reference, moved))).alarm


def test_a_written_reference_reads_back_and_holds_no_text(reference: Reference, tmp_path: Path) -> None:
    write_reference(reference, tmp_path / "reference")
    back = read_reference(tmp_path)
    assert back is not None
    assert back.surprisal is not None
    assert np.array_equal(back.surprisal, reference.surprisal)
    assert back.sample.sketches == reference.sample.sketches
    assert np.array_equal(back.sample.labels, reference.sample.labels)
    assert back.sample.names == LABELS
    raw = b"".join(path.read_bytes() for path in (tmp_path / "reference").iterdir())
    assert b"lost" not in raw
    assert len(raw) < 400_000
    assert read_reference(tmp_path / "nowhere") is None


def test_a_damaged_reference_is_an_error(reference: Reference, tmp_path: Path) -> None:
    write_reference(reference, tmp_path / "reference")
    (tmp_path / "reference" / "rows.npz").write_bytes(b"PK damaged")
    with pytest.raises(CorruptArtifactError, match="damaged"):
        read_reference(tmp_path)


def test_personal_data_is_out_before_anything_is_counted() -> None:
    plain = build_reference(["write to <EMAIL>"], [Seen("I am <EMAIL>", "a")], about={})
    given_ = build_reference(["write to ann@example.com"], [Seen("I am bob@example.com", "a")], about={})
    assert np.array_equal(plain.surprisal, given_.surprisal)
    assert plain.sample.sketches == given_.sample.sketches
