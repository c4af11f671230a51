"""Scores of classifiers and generators with behaviour, against sums done by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from sklearn.metrics import f1_score, log_loss

from slmops.artifacts import Message, Row
from slmops.errors import DataError
from slmops.evaluate.scores import (
    ClassScore,
    Confusion,
    Scores,
    class_scores,
    expected_calibration_error,
    likelihood_metrics,
    score_classifier,
    score_generator,
    score_predictions,
    top_confusions,
)
from slmops.progress import Progress
from slmops.runtime import Delta, Generation, GenerationRequest, TextScore

LABELS = ("balance", "fee", "refund")


class WordClassifier:
    """Believes in the label that the text names; a text that names none gets a flat distribution."""

    labels = LABELS

    def __init__(self) -> None:
        self.asked: list[str] = []

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        self.asked += texts
        weights = np.array([[8.0 if label in text else 1.0 for label in LABELS] for text in texts])
        return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)

    def close(self) -> None: ...


class Parrot:
    """Answers with the last message, cut to ``max_tokens`` words; scores one nat a word, or nothing at all."""

    def __init__(self, scores: bool = True) -> None:
        self.scores = scores

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        answers = []
        for request in requests:
            words = request.messages[-1].content.split()
            kept = words[: request.max_tokens]
            reason = "length" if len(words) > len(kept) else "stop"
            answers.append(Generation(" ".join(kept), reason, len(words), len(kept)))
        return answers

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        yield Delta(self.generate([request])[0].text, "stop")

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        if not self.scores:
            raise NotImplementedError
        return [TextScore(-float(len(t.split())), len(t.split()), len(t.encode())) for _, t in conversations]

    def close(self) -> None: ...


def row(text: str, target: str | None, number: int = 0) -> Row:
    return Row(f"r{number}", (Message("user", text),), target)


def messages(row: Row) -> tuple[Message, ...]:
    return row.messages


def test_a_classifier_is_judged_in_the_order_of_the_rows() -> None:
    random = np.random.default_rng(0)
    targets = [LABELS[i] for i in random.integers(0, 3, 300)]
    said = [LABELS[i] if random.random() < 0.3 else t for i, t in zip(random.integers(0, 3, 300), targets, strict=True)]
    rows = [row("x " * int(random.integers(0, 30)) + word, t) for word, t in zip(said, targets, strict=True)]
    events: list[Progress] = []
    scores = score_classifier(WordClassifier(), rows, task="classification", seed=1, progress=events.append)

    assert scores.predictions == said
    assert scores.metric == "accuracy"
    np.testing.assert_array_equal(scores.per_row, [s == t for s, t in zip(said, targets, strict=True)])
    assert scores.value == scores.per_row.mean()
    assert scores.ci95[0] < scores.value < scores.ci95[1]
    assert scores.rows == 300
    probabilities = WordClassifier().probabilities(said)
    assert scores.others["nll"] == pytest.approx(log_loss(targets, probabilities, labels=LABELS), rel=1e-5)
    assert scores.others["macro_f1"] == pytest.approx(f1_score(targets, said, average="macro"))
    assert scores.others["format_valid"] == 1
    assert scores.others["unknown_label_rows"] == 0
    assert scores.others["ece"] == pytest.approx(abs(0.8 - scores.value), abs=1e-6)  # one confidence: one bin
    assert [event.done for event in events] == [64, 128, 192, 256, 300]
    assert {event.total for event in events} == {300}


def test_short_texts_are_asked_together() -> None:
    classifier = WordClassifier()
    score_classifier(classifier, [row("x" * n, "fee") for n in (9, 1, 5)], task="nli")
    assert classifier.asked == ["x", "x" * 5, "x" * 9]


def test_a_target_that_was_never_a_label_counts_as_wrong() -> None:
    scores = score_classifier(WordClassifier(), [row("fee", "fee"), row("fee", "unseen")], task="classification")
    assert scores.per_row.tolist() == [1, 0]
    assert scores.others["unknown_label_rows"] == 1
    assert math.isfinite(scores.others["nll"])


def test_one_row_is_a_score() -> None:
    scores = score_classifier(WordClassifier(), [row("a refund", "refund")], task="classification")
    assert (scores.value, scores.ci95, scores.rows) == (1.0, (1.0, 1.0), 1)


@pytest.mark.parametrize("rows", [[], [row("a", "fee"), row("b", None, 7)]])
def test_rows_that_cannot_be_judged_are_refused(rows: list[Row]) -> None:
    with pytest.raises(DataError, match=r"no rows to score|1 of 2 rows have no target .*'r7'"):
        score_classifier(WordClassifier(), rows, task="classification")
    with pytest.raises(DataError):
        score_generator(Parrot(), rows, task="qa", max_new_tokens=5, to_messages=messages)


def test_calibration_error_is_the_plain_sum_over_bins() -> None:
    random = np.random.default_rng(4)
    confidence = random.random(500)
    correct = (random.random(500) < confidence**2).astype(float)
    by_hand = 0.0
    for b in range(10):
        inside = [i for i, c in enumerate(confidence) if b / 10 < c <= (b + 1) / 10]
        if inside:
            by_hand += len(inside) / 500 * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, correct, bins=10) == pytest.approx(by_hand)
    assert expected_calibration_error(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0
    assert expected_calibration_error(np.array([]), np.array([])) == 0


def test_the_worst_classes_and_the_commonest_mistakes_come_first() -> None:
    targets = ["a", "a", "a", "b", "b", "c"]
    predictions = ["a", "b", "b", "b", "b", "a"]
    assert top_confusions(predictions, targets) == (Confusion("a", "b", 2), Confusion("c", "a", 1))
    assert top_confusions(predictions, targets, most=1) == (Confusion("a", "b", 2),)
    classes = class_scores(predictions, targets)
    assert [c.label for c in classes] == ["c", "a", "b"]
    assert classes[1] == ClassScore("a", 3, precision=0.5, recall=1 / 3, f1=0.4)
    assert classes[0] == ClassScore("c", 1, 0.0, 0.0, 0.0)
    assert top_confusions([], []) == class_scores([], []) == ()


def test_a_generator_is_judged_by_its_answers() -> None:
    rows = [row("pay the fee today please", "pay the fee today"), row("hello", "hello"), row("", "x")]
    events: list[Progress] = []
    scores = score_generator(
        Parrot(), rows, task="conversation", max_new_tokens=4, to_messages=messages, progress=events.append
    )
    assert scores.metric == "rouge_l"
    assert scores.predictions == ["pay the fee today", "hello", ""]
    assert scores.per_row.tolist() == [1, 1, 0]
    assert scores.others["cut_off"] == pytest.approx(1 / 3)
    assert scores.others["answer_tokens"] == pytest.approx(5 / 3)
    assert scores.others["format_valid"] == pytest.approx(2 / 3)
    assert scores.others["exact_match"] == pytest.approx(2 / 3)
    assert scores.others["perplexity"] == pytest.approx(math.e)
    assert scores.others["bits_per_byte"] == pytest.approx(6 / math.log(2) / (17 + 5 + 1))
    assert [(e.task, e.done) for e in events] == [("evaluate", 3), ("perplexity", 3)]
    assert scores.classes == scores.confusions == ()


def test_an_engine_without_likelihood_leaves_perplexity_out() -> None:
    scores = score_generator(Parrot(False), [row("a", "a")], task="qa", max_new_tokens=4, to_messages=messages)
    assert scores.value == 1
    assert not {"perplexity", "bits_per_byte", "nll"} & set(scores.others)


def test_a_generator_may_answer_a_closed_task() -> None:
    rows = [row("fee", "fee"), row("the fee", "fee"), row("refund", "fee")]
    scores = score_generator(
        Parrot(), rows, task="classification", max_new_tokens=4, to_messages=messages, labels=LABELS
    )
    assert scores.per_row.tolist() == [1, 0, 0]
    assert scores.others["format_valid"] == pytest.approx(2 / 3)
    assert scores.confusions == (Confusion("fee", "refund", 1), Confusion("fee", "the fee", 1))


def test_likelihoods_are_summed_over_the_corpus() -> None:
    found = likelihood_metrics([TextScore(-2.0, 4, 10), TextScore(-10.0, 8, 30)])
    assert found["perplexity"] == pytest.approx(math.exp(1.0))
    assert found["bits_per_byte"] == pytest.approx(12 / math.log(2) / 40)
    assert likelihood_metrics([]) == {}
    assert math.isfinite(likelihood_metrics([TextScore(-1e9, 1, 1)])["perplexity"])


def test_scores_survive_json() -> None:
    before = score_predictions(["a", "b", "ü"], ["a", "a", "ü"], task="classification", seed=3)
    after = Scores.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False)))
    np.testing.assert_array_equal(after.per_row, before.per_row)
    assert after.to_json() == before.to_json()
    assert after.classes == before.classes
    assert after.ci95 == before.ci95


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("math", set()),
        ("qa", {"rouge_l"}),
        ("extraction", {"json_valid", "slot_f1_micro", "exact_match"}),
        ("summarization", {"bleu", "exact_match"}),
    ],
)
def test_each_task_tells_its_other_metrics(task: str, expected: set[str]) -> None:
    scores = score_predictions(["1"], ["1"], task=task)
    assert set(scores.others) == {"format_valid"} | expected
