"""A bundle carries how its test rows look, as numbers without a text."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pipeline_helpers import Done

from slmops.artifacts import Message, Row
from slmops.monitor.drift import drift
from slmops.monitor.reference import FOLDER, read_reference
from slmops.pipeline import watch


def test_a_run_packs_the_reference_of_its_test_rows(done: Done) -> None:
    bundle = done.result.bundle
    reference = read_reference(bundle.path)
    assert reference is not None
    assert reference.surprisal is not None
    rows = done.result.report["student"]["score"]["rows"]
    assert len(reference.sample) == len(reference.sample.sketches) == rows
    assert set(reference.sample.names) <= set(bundle.description["labels"])
    assert ((reference.sample.confidence > 0) & (reference.sample.confidence <= 1)).all()
    assert reference.about["task"] == bundle.description["task"]
    assert all(f"{FOLDER}/{name}" in bundle.manifest.files for name in ("reference.json", "rows.npz"))
    assert not drift(reference, reference.sample).alarm


def test_a_language_models_reference_is_of_the_answers_it_was_scored_by(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row(str(n), (Message("user", f"how much is {n} and {n}?"),), str(2 * n)) for n in range(40)]
    recipe = SimpleNamespace(closed=False, task="math")
    context: Any = SimpleNamespace(recipe=recipe, test_rows=lambda _: rows)
    data: Any = SimpleNamespace(rows=lambda _: rows, digest="d")
    answers = [f"#### {2 * n}" if n % 4 else "I do not know" for n in range(40)]
    monkeypatch.setattr(watch, "score_variant", lambda *_: SimpleNamespace(predictions=answers))
    reference = watch.reference_of(context, "student-int8", SimpleNamespace(digest="v"), data)  # type: ignore[arg-type]
    assert reference is not None
    sample = reference.sample
    assert sample.output_chars.tolist() == [len(answer) for answer in answers]
    assert sample.format_ok.mean() == pytest.approx(0.75)
    assert np.isnan(sample.confidence).all()
    assert sample.names == ()
    context.test_rows = lambda _: []
    assert watch.reference_of(context, "student-int8", SimpleNamespace(digest="v"), data) is None  # type: ignore[arg-type]
