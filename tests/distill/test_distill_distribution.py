"""The distribution of a local classifier, kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from distill_helpers import lines, make_dataset, make_draft, row
from numpy.typing import NDArray

from slmops.artifacts import Dataset
from slmops.distill import distribution, keep_distribution
from slmops.errors import DataError, TeacherError
from slmops.progress import Progress

LABELS = ("a", "b", "c")


class Lengths:
    """A classifier whose distribution is a function of the text's length; ``labels`` in an order of its own."""

    def __init__(self, labels: tuple[str, ...] = ("c", "a", "b")) -> None:
        self.labels = labels
        self.asked: list[str] = []

    def logits(self, text: str) -> dict[str, float]:
        return {"a": len(text) % 7, "b": len(text) % 3, "c": 1.0}

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.asked += texts
        rows = np.array([[self.logits(text).get(label, 0.0) for label in self.labels] for text in texts])
        exp = np.exp(rows)
        return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)

    def close(self) -> None:
        pass


def dataset(folder: Path, count: int = 30) -> Dataset:
    rows = [row(i, "x" * i + "y", LABELS[i % 3]) for i in range(count)]
    return make_dataset(folder, rows, [row(900, "vv", "a"), row(901, "v", None)], [row(999, "t", "a")], LABELS)


def test_files_agree_with_a_plain_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "PIECE_ROWS", 8)
    data, draft, events = dataset(tmp_path), make_draft(tmp_path), list[Progress]()
    model = Lengths()
    extra = [f"extra {'z' * i}" for i in range(11)]
    keep_distribution(data, model, draft, extra_texts=extra, progress=events.append)
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "quarantine.jsonl"):
        assert (draft.path / name).read_bytes() == (data.path / name).read_bytes()
    assert [one["text"] for one in lines(draft.path / "transfer.jsonl")] == extra
    for name, texts in (
        ("train", [one.text for one in data.rows("train")]),
        ("validation", ["vv", "v"]),
        ("transfer", extra),
    ):
        kept = np.load(draft.path / f"teacher_{name}.npy")
        assert kept.dtype == np.float32
        wanted = np.array([[model.logits(text)[label] for label in LABELS] for text in texts])
        wanted -= np.log(np.exp(wanted).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(kept, wanted, atol=1e-5)
    teacher = json.loads((draft.path / "summary.json").read_text())["teacher"]
    right = [max(LABELS, key=lambda label: model.logits(r.text)[label]) == r.target for r in data.rows("train")]
    assert teacher["agreement_with_gold"]["train"] == pytest.approx(np.mean(right))
    assert teacher["asked"] == 43
    assert (events[-1].done, events[-1].total) == (43, 43)
    assert "t" not in model.asked


def test_finished_pieces_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "PIECE_ROWS", 8)
    data, draft = dataset(tmp_path), make_draft(tmp_path)

    class Dies(Lengths):
        def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
            if len(self.asked) >= 16:
                raise KeyboardInterrupt
            return super().probabilities(texts)

    with pytest.raises(KeyboardInterrupt):
        keep_distribution(data, Dies(), draft)
    damaged = sorted(draft.work.glob("*.npy"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    again, fresh = Lengths(), make_draft(tmp_path / "fresh")
    keep_distribution(data, again, draft)
    assert len(again.asked) == 32 - 8
    keep_distribution(data, Lengths(), fresh)
    np.testing.assert_array_equal(np.load(draft.path / "teacher_train.npy"), np.load(fresh.path / "teacher_train.npy"))
    assert not (draft.path / "transfer.jsonl").exists()


def test_states_are_kept_where_the_classifier_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distribution, "PIECE_ROWS", 8)

    class Shows(Lengths):
        def states_and_probabilities(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            states = np.array([[len(text), 1e9, -len(text)] for text in texts], np.float32)
            return states, self.probabilities(texts)

    data, draft = dataset(tmp_path), make_draft(tmp_path)
    keep_distribution(data, Shows(), draft, extra_texts=["four"], states=True)
    lengths = np.array([len(one.text) for one in data.rows("train")])
    kept = np.load(draft.path / "states_train.npy")
    assert kept.dtype == np.float16
    np.testing.assert_array_equal(kept, np.stack([lengths, np.full(30, 65504), -lengths], axis=1))
    np.testing.assert_array_equal(np.load(draft.path / "states_transfer.npy")[:, 0], [4])
    assert not (draft.path / "states_validation.npy").exists()
    for model, states in ((Shows(), False), (Lengths(), True)):
        plain = make_draft(tmp_path / f"plain{states}")
        keep_distribution(data, model, plain, states=states)
        assert not list(plain.path.glob("states_*"))
        np.testing.assert_array_equal(
            np.load(plain.path / "teacher_train.npy"), np.load(draft.path / "teacher_train.npy")
        )


def test_certainty_stays_finite() -> None:
    logs = distribution.log_probabilities(np.array([[1.0, 0.0, 0.0]], dtype=np.float32))
    assert np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)).sum(), 1, atol=1e-6)


def test_other_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"lacks \['c'\], and knows \['d'\]"):
        keep_distribution(dataset(tmp_path), Lengths(("a", "b", "d")), make_draft(tmp_path))


def test_open_task_is_refused(tmp_path: Path) -> None:
    data = make_dataset(tmp_path, [row(0)], [row(1)], [row(2)])
    with pytest.raises(DataError, match="no closed label set"):
        keep_distribution(data, Lengths(), make_draft(tmp_path))


@pytest.mark.parametrize("wrong", [np.nan, -0.5, 7.0])
def test_what_is_no_distribution_is_refused(tmp_path: Path, wrong: float) -> None:
    class Broken(Lengths):
        def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
            answers = super().probabilities(texts)
            answers[-1, 0] = wrong
            return answers

    with pytest.raises(TeacherError, match="not a distribution"):
        keep_distribution(dataset(tmp_path), Broken(), make_draft(tmp_path))
    assert not list((tmp_path / "work").glob("*.npy"))


def test_wrong_shape_is_refused(tmp_path: Path) -> None:
    class Short(Lengths):
        def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
            return super().probabilities(texts)[:-1]

    with pytest.raises(TeacherError, match="probabilities where"):
        keep_distribution(dataset(tmp_path), Short(), make_draft(tmp_path))
