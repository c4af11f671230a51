"""Which engine is taken: the decision, what is remembered, and what a crash costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.tiny_models import write_tiny_generator, write_tiny_llama
from slmops.errors import ServeError
from slmops.serve import choose as choosing
from slmops.serve.choose import Candidate, Speed, candidates_of, choose, decide, measure, reason, was_busy

MACHINE = {"cpu": "x", "cores": 2, "cpu_flags": ["avx2"], "arch": "x86_64"}


def speed(engine: str, alone: float, crowd: float, clients: int = 8) -> Speed:
    return Speed(engine, "folder", clients, alone, crowd)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint, folder = tmp_path_factory.mktemp("llama"), tmp_path_factory.mktemp("text") / "model"
    write_tiny_llama(checkpoint)
    write_tiny_generator(folder, checkpoint)
    return folder


def test_the_best_is_good_alone_and_in_a_crowd() -> None:
    batch, single, lame = speed("batch", 110, 480), speed("single", 135, 130), speed("lame", 30, 500)
    assert decide([single, batch, lame]) is batch
    assert decide([single]) is single
    alone = [speed("batch", 110, 110, clients=1), speed("single", 135, 135, clients=1)]
    assert decide(alone).engine == "single"
    told = reason(batch, [single, lame, batch], "measured here before")
    assert told == (
        "measured here before: tokens/s for 8 callers and for one: batch 480 and 110, lame 500 and 30, "
        "single 130 and 135"
    )
    assert "for one caller: single 135, batch 110" in reason(alone[1], alone, "now")


def test_a_busy_machine_is_known_by_its_load() -> None:
    assert was_busy(8.0, 2)
    assert not was_busy(4.0, 2)
    assert not was_busy(None, 2)
    assert not was_busy(9.0, None)


def test_engines_are_measured_once_and_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_load_1min", lambda: 0.5)
    options: dict[str, Any] = {"digests": ["d"], "machine": MACHINE, "kept": tmp_path, "clients": 2, "threads": 1}
    choice = choose(candidates_of([folder]), **options)
    assert {one.engine for one in choice.speeds} == {"onnx-batch", "onnx-genai"}
    assert choice.engine in {"onnx-batch", "onnx-genai"}
    assert all(one.alone_per_s > 0 and one.crowd_per_s > 0 for one in choice.speeds)
    assert "just now" in choice.why
    (record,) = tmp_path.iterdir()

    def never(*_: object, **__: object) -> list[Speed]:
        raise AssertionError("measured again")

    monkeypatch.setattr(choosing, "measure", never)
    again = choose(candidates_of([folder]), **options)
    assert (again.engine, again.folder, again.speeds) == (choice.engine, choice.folder, choice.speeds)
    assert "before" in again.why
    for change in ({"digests": ["e"]}, {"machine": {**MACHINE, "cores": 4}}, {"clients": 3}, {"again": True}):
        with pytest.raises(AssertionError):
            choose(candidates_of([folder]), **{**options, **change})
    record.write_text("{", "utf-8")
    with pytest.raises(AssertionError):
        choose(candidates_of([folder]), **options)


def test_what_a_busy_machine_says_is_not_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "_load_1min", lambda: 20.0)
    monkeypatch.setattr(choosing, "measure", lambda *_, **__: [Speed("onnx-batch", str(folder), 8, 1.0, 2.0)])
    choice = choose(candidates_of([folder]), digests=["d"], machine=MACHINE, kept=tmp_path)
    assert "busy" in choice.why
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_crashes_is_out_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child ends without a word on the first candidate; the others are measured all the same."""
    asked: list[list[str]] = []

    def child(candidates: Any, clients: int, threads: int | None) -> tuple[list[Speed | None], str]:
        asked.append([one.engine for one in candidates])
        if candidates[0].engine == "crashes":
            return [], "segmentation fault"
        return [Speed(one.engine, one.folder, clients, 1.0, 2.0) if one.engine == "runs" else None
                for one in candidates], ""  # fmt: skip

    monkeypatch.setattr(choosing, "_measured", child)
    candidates = [Candidate(name, str(folder)) for name in ("crashes", "fails", "runs")]
    assert [one.engine for one in measure(candidates, 8, None)] == ["runs"]
    assert asked == [["crashes", "fails", "runs"], ["fails", "runs"]]
    with pytest.raises(ServeError, match="crashes: segmentation fault"):
        measure(candidates[:1], 8, None)


def test_a_candidate_that_cannot_be_opened_is_left_out(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "slmops.json").write_text(json.dumps({"runtime": "onnx-genai", "form": "generator"}), "utf-8")
    found = measure([Candidate("onnx-batch", str(broken)), Candidate("onnx-batch", str(folder))], 1, 1)
    assert [one.folder for one in found] == [str(folder)]
    with pytest.raises(ServeError, match="could be measured"):
        measure([Candidate("onnx-batch", str(broken))], 1, 1)


def test_one_candidate_is_not_measured(folder: Path, tmp_path: Path) -> None:
    choice = choose([Candidate("torch", str(folder))], digests=[], machine=MACHINE, kept=tmp_path)
    assert (choice.engine, choice.why) == ("torch", "the only engine that can run it here")
    with pytest.raises(ServeError, match="No engine"):
        choose([], digests=[], machine=MACHINE, kept=tmp_path)
