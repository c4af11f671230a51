"""Baselines on data sets written to disk, small and odd."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from slmops.artifacts import SPLITS, Dataset, Message, Row, drafting
from slmops.errors import DataError
from slmops.evaluate import baselines
from slmops.evaluate.baselines import DESCRIPTIONS, baseline_scores
from slmops.models.linear import text_features
from slmops.recipe import Task

Pairs = Sequence[tuple[str, str | None]]

THEMES = {
    "lost": ["I lost my {}", "my {} is gone", "cannot find my {} anywhere", "my {} was stolen"],
    "fee": ["why a fee on my {}?", "the {} costs too much", "you charged me for the {}", "fee for a {}"],
    "top_up": ["add money to my {}", "how to top up the {}", "put 10 euros on the {}", "topping up a {}"],
}
THINGS = ["card", "account", "wallet", "phone", "pocket", "app", "bank book", "Ausweis", "κάρτα"]


def dataset(folder: Path, *, labels: Sequence[str] | None, train: Pairs, validation: Pairs, test: Pairs) -> Dataset:
    with drafting("dataset", folder / "dataset") as draft:
        for split, pairs in zip(SPLITS, (train, validation, test), strict=True):
            rows = [Row(f"{split}-{i}", (Message("user", x),), y) for i, (x, y) in enumerate(pairs)]
            lines = "".join(json.dumps(row.to_json()) + "\n" for row in rows)
            (draft.path / f"{split}.jsonl").write_text(lines, "utf-8")
        (draft.path / "summary.json").write_text(json.dumps({"labels": labels}), "utf-8")
    return Dataset.open(folder / "dataset")


def support_pairs() -> list[tuple[str, str]]:
    pairs = [(text.format(thing), label) for label, texts in THEMES.items() for text in texts for thing in THINGS]
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i] for i in order]


def test_a_closed_task_has_a_majority_and_a_linear_baseline(tmp_path: Path) -> None:
    pairs = support_pairs()
    train = [*pairs[:70], ("odd one", "fee"), ("odd two", "fee"), *[("odd", "fee")] * 10]
    data = dataset(tmp_path, labels=sorted(THEMES), train=train, validation=pairs[70:85], test=pairs[85:])
    found = baseline_scores(data, 0, task="classification")
    assert list(found) == ["majority", "linear"]
    targets = [label for _, label in pairs[85:]]
    assert found["majority"].predictions == ["fee"] * len(targets)
    assert found["majority"].value == targets.count("fee") / len(targets)
    assert found["linear"].value > 0.9
    assert found["linear"].metric == "accuracy"
    assert found["linear"].rows == len(targets)
    assert found["linear"].others["size_bytes"] > 1000 > found["majority"].others["size_bytes"] > 0
    assert found["linear"].others["latency_ms_p50"] > 0
    again = baseline_scores(data, 0, task="classification")
    assert again["linear"].predictions == found["linear"].predictions
    assert set(found) <= set(DESCRIPTIONS)


def test_the_folded_matrix_is_sklearns_own_one_against_rest(tmp_path: Path) -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    pairs = support_pairs()
    data = dataset(tmp_path, labels=sorted(THEMES), train=pairs[:60], validation=[], test=pairs[60:])
    found = baseline_scores(data, 0, task="classification")["linear"]
    texts, targets = [x for x, _ in pairs[:60]], [y for _, y in pairs[:60]]
    features = text_features(texts)
    assert features is not None
    one = LogisticRegression(C=10, solver="liblinear", dual=True, max_iter=1000)
    reference = OneVsRestClassifier(one).fit(features.transform(texts), targets)
    assert found.predictions == reference.predict(features.transform([x for x, _ in pairs[60:]])).tolist()


def test_two_classes_and_no_validation_rows_are_enough(tmp_path: Path) -> None:
    train = [("yes of course", "entails"), ("no never", "contradicts")] * 3
    data = dataset(tmp_path, labels=["contradicts", "entails"], train=train, validation=[], test=train[:2])
    assert baseline_scores(data, 0, task="nli")["linear"].predictions == ["entails", "contradicts"]


def test_ties_for_the_majority_fall_to_the_first_in_the_alphabet(tmp_path: Path) -> None:
    pairs = [("x", "b"), ("y", "a")]
    data = dataset(tmp_path, labels=["a", "b"], train=pairs, validation=[], test=pairs)
    assert baseline_scores(data, 0, task="classification")["majority"].predictions == ["a", "a"]


def test_one_class_leaves_nothing_to_learn(tmp_path: Path) -> None:
    pairs = [("a", "only"), ("b", "only")]
    data = dataset(tmp_path, labels=["only"], train=pairs, validation=pairs, test=pairs)
    found = baseline_scores(data, 0, task="classification")
    assert list(found) == ["majority"]
    assert found["majority"].value == 1


@pytest.mark.parametrize("text", ["", "   ", "\0", "😀", "?!", "a", "東"])
def test_texts_without_words_are_no_trouble(tmp_path: Path, text: str) -> None:
    pairs = [(text, "a"), (text, "b")]
    data = dataset(tmp_path, labels=["a", "b"], train=pairs, validation=pairs, test=pairs)
    for scores in baseline_scores(data, 0, task="classification").values():
        assert scores.value == 0.5


def test_an_open_task_has_the_commonest_and_the_nearest_answer(tmp_path: Path) -> None:
    train = [("where is my card", "On its way."), ("close the account", "Done."), ("shut the account", "Done.")]
    test = [("my card, where is it?", "On its way."), ("account: close it", "Done."), ("something else", "Hello.")]
    data = dataset(tmp_path, labels=None, train=train, validation=[], test=test)
    found = baseline_scores(data, 0, task="conversation")
    assert list(found) == ["majority", "nearest"]
    assert found["majority"].predictions == ["Done."] * 3
    assert found["majority"].metric == "rouge_l"
    assert found["nearest"].predictions[:2] == ["On its way.", "Done."]
    assert found["nearest"].per_row.tolist()[:2] == [1, 1]


def test_rows_without_a_target_are_left_out_of_all(tmp_path: Path) -> None:
    train = [("a a", "x"), ("b b", None), ("c c", "y")]
    data = dataset(tmp_path, labels=["x", "y"], train=train, validation=[("q", None)], test=[("a a", "x"), ("b", None)])
    found = baseline_scores(data, 0, task="classification")
    assert found["linear"].rows == 1


@pytest.mark.parametrize(
    ("train", "test", "words"), [([], [("a", "x")], "training rows"), ([("a", "x")], [], "no rows")]
)
def test_an_empty_split_is_told(tmp_path: Path, train: Pairs, test: Pairs, words: str) -> None:
    data = dataset(tmp_path, labels=["x"], train=train, validation=[], test=test)
    with pytest.raises(DataError, match=words):
        baseline_scores(data, 0, task="classification")


def test_very_many_rows_are_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MAX_TRAIN_ROWS", 60)
    pairs = support_pairs()
    data = dataset(tmp_path, labels=sorted(THEMES), train=pairs[:100], validation=[], test=pairs[100:])
    assert baseline_scores(data, 1, task="classification")["linear"].value > 0.6


@pytest.mark.slow
def test_the_linear_baseline_is_a_strong_one_on_real_intents(tmp_path: Path, shared_data: Path) -> None:
    with (shared_data / "banking77" / "train.csv").open(encoding="utf-8") as file:
        pairs = [(row["text"], row["category"]) for row in csv.DictReader(file)]
    pairs = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    task: Task = "classification"
    data = dataset(
        tmp_path,
        labels=sorted({y for _, y in pairs}),
        train=pairs[:8000],
        validation=pairs[8000:9000],
        test=pairs[9000:],
    )
    found = baseline_scores(data, 0, task=task)
    assert found["linear"].value > 0.88
    assert found["majority"].value < 0.05
