"""What simple means reach on the same test rows: if one of them wins, a language model was not needed.

Closed tasks: the majority class, and TF-IDF of words and characters under logistic regression, its one free number
chosen on the validation split. Open tasks: the commonest answer, and the answer of the most similar training prompt.
The fourth baseline, the student trained without its teacher, is a model and comes from the pipeline.

Each :class:`Scores` carries ``size_bytes`` (what would be shipped) and ``latency_ms_p50`` (one text at a time, one
core, this process) in ``others``. Not covered: tuning beyond that one number; above :data:`MAX_TRAIN_ROWS` training
rows an even sample is used.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Dataset, Row
from slmops.errors import DataError
from slmops.evaluate.scores import Scores, score_predictions
from slmops.recipe import CLOSED_TASKS, Task

log = logging.getLogger(__name__)

MAX_TRAIN_ROWS = 50_000
INVERSE_REGULARISATIONS = (3.0, 10.0)
LATENCY_REQUESTS = 50

DESCRIPTIONS = {
    "majority": "the commonest answer for everything",
    "linear": "TF-IDF with a linear model",
    "nearest": "the answer of the most similar training prompt",
    "untaught": "the same student trained without the teacher",
}


def baseline_scores(dataset: Dataset, seed: int, *, task: Task) -> dict[str, Scores]:
    """Train on the data set's train split, choose on its validation split, score on its test split.

    Closed tasks give ``majority`` and ``linear`` (left out where training rows have a single class), open ones
    ``majority`` and ``nearest``.

    Raises:
        DataError: no test rows, or no training rows with a target.
    """
    train = _sample([row for row in dataset.rows("train") if row.target is not None], seed)
    validation = [row for row in dataset.rows("validation") if row.target is not None]
    test = [row for row in dataset.rows("test") if row.target is not None]
    if not train:
        raise DataError("There are no training rows with a target, so there is nothing to compare with.")
    models: dict[str, _Baseline | None] = {"majority": _Majority(train)}
    if task in CLOSED_TASKS:
        models["linear"] = _fit_linear(train, validation, seed)
    else:
        features = _features([row.text for row in train])
        models["nearest"] = None if features is None else _Nearest(features, train)
    return {
        name: _score(model, test, task, dataset.labels, seed) for name, model in models.items() if model is not None
    }


class _Baseline:
    def answers(self, texts: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def parts(self) -> Any:
        """What would have to be shipped."""
        raise NotImplementedError


class _Majority(_Baseline):
    def __init__(self, train: Sequence[Row]) -> None:
        counts = Counter(str(row.target) for row in train)
        self.answer = min(counts, key=lambda answer: (-counts[answer], answer))

    def answers(self, texts: Sequence[str]) -> list[str]:
        return [self.answer] * len(texts)

    def parts(self) -> Any:
        return self.answer


class _Linear(_Baseline):
    """Features times one matrix, ``weights`` float32 ``[features, labels]``: the one-against-rest models folded into
    one product, so that the baseline is as small and as fast as it can fairly be."""

    def __init__(
        self, features: Any, weights: NDArray[np.float32], bias: NDArray[np.float32], labels: list[str]
    ) -> None:
        self.features = features
        self.weights = weights
        self.bias = bias
        self.labels = labels

    def answers(self, texts: Sequence[str]) -> list[str]:
        best = (self.features.transform(texts) @ self.weights + self.bias).argmax(axis=1)
        return [self.labels[index] for index in best]

    def parts(self) -> Any:
        return self.features, self.weights, self.bias, self.labels


class _Nearest(_Baseline):
    """Cosine similarity of TF-IDF; of equally similar prompts the first one answers."""

    def __init__(self, features: Any, train: Sequence[Row]) -> None:
        texts = [row.text for row in train]
        self.features = features
        self.prompts = features.transform(texts)
        self.targets = [str(row.target) for row in train]

    def answers(self, texts: Sequence[str]) -> list[str]:
        found: list[str] = []
        for start in range(0, len(texts), 64):  # the similarities of a block are dense: [64, training rows]
            similar = (self.features.transform(texts[start : start + 64]) @ self.prompts.T).toarray()
            found += [self.targets[index] for index in similar.argmax(axis=1)]
        return found

    def parts(self) -> Any:
        return self.features, self.prompts, self.targets


def _features(texts: Sequence[str]) -> Any | None:
    """TF-IDF of words (1-2) and characters (2-5) that are in ``texts``, or None where the texts are blank."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import FeatureUnion

    parts: list[tuple[str, Any]] = []
    if any(re.search(r"\w", text) for text in texts):
        # The pattern takes words of one letter too: "I", "a", and every word of scripts that write one sign a word.
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\w+", dtype=np.float32)
        parts.append(("words", words))
    if any(text.strip() for text in texts):
        # Pieces seen once make nine tenths of the features and none of the accuracy, once there are enough rows.
        least = 2 if len(texts) >= 200 else 1
        characters = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=least, dtype=np.float32
        )
        parts.append(("characters", characters))
    return FeatureUnion(parts).fit(texts) if parts else None


def _fit_linear(train: Sequence[Row], validation: Sequence[Row], seed: int) -> _Linear | None:
    """The best logistic regression on the validation rows; None where there is nothing to tell apart."""
    texts, targets = [row.text for row in train], [str(row.target) for row in train]
    features = _features(texts) if len(set(targets)) > 1 else None
    if features is None:
        log.info("the training rows have one class or no text: there is no linear baseline")
        return None
    matrix = features.transform(texts)
    best: tuple[int, _Linear] | None = None
    for inverse in INVERSE_REGULARISATIONS if validation else INVERSE_REGULARISATIONS[-1:]:
        candidate = _Linear(features, *_one_against_rest(matrix, targets, inverse, seed))
        guesses = candidate.answers([row.text for row in validation]) if validation else []
        right = sum(guess == row.target for guess, row in zip(guesses, validation, strict=True))
        log.info("linear baseline: C = %g has %d of %d validation rows right", inverse, right, len(validation))
        if best is None or right > best[0]:
            best = (right, candidate)
    assert best is not None
    return best[1]


def _one_against_rest(
    matrix: Any, targets: Sequence[str], inverse_regularisation: float, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], list[str]]:
    """One logistic regression a class, by liblinear's dual solver: with many classes the multinomial one needs
    gigabytes for its history, and converges late.

    Weights ``[features, labels]``, bias ``[labels]``, labels in the order of the columns.
    """
    from sklearn.linear_model import LogisticRegression

    wanted, labels = np.asarray(targets), sorted(set(targets))
    weights = np.empty((matrix.shape[1], len(labels)), dtype=np.float32)
    bias = np.empty(len(labels), dtype=np.float32)
    for column, label in enumerate(labels):
        model = LogisticRegression(
            solver="liblinear", dual=True, C=inverse_regularisation, tol=1e-2, max_iter=1000, random_state=seed
        ).fit(matrix, wanted == label)
        weights[:, column], bias[column] = model.coef_[0], model.intercept_[0]
    return weights, bias, labels


def _score(model: _Baseline, test: Sequence[Row], task: Task, labels: Sequence[str] | None, seed: int) -> Scores:
    texts = [row.text for row in test]
    scores = score_predictions(
        model.answers(texts) if texts else [], [str(row.target) for row in test], task=task, labels=labels, seed=seed
    )
    measured = {
        "size_bytes": float(_size_bytes(model.parts())),
        "latency_ms_p50": _latency_ms_p50(model.answers, texts[:LATENCY_REQUESTS]),
    }
    return replace(scores, others={**scores.others, **measured})


def _size_bytes(parts: Any) -> int:
    import joblib  # type: ignore[import-untyped]

    buffer = BytesIO()
    joblib.dump(parts, buffer, compress=3)
    return buffer.getbuffer().nbytes


def _latency_ms_p50(answers: Callable[[Sequence[str]], list[str]], texts: Sequence[str]) -> float:
    times_ms: list[float] = []
    for text in texts:
        started = time.perf_counter()
        answers([text])
        times_ms.append((time.perf_counter() - started) * 1e3)
    return float(np.median(times_ms))


def _sample(rows: list[Row], seed: int) -> list[Row]:
    if len(rows) <= MAX_TRAIN_ROWS:
        return rows
    log.info("baselines train on %d of %d rows", MAX_TRAIN_ROWS, len(rows))
    chosen = np.random.default_rng(seed).choice(len(rows), MAX_TRAIN_ROWS, replace=False)
    return [rows[index] for index in sorted(chosen)]
