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
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from typing import Any

import numpy as np

from slmops.artifacts import Dataset, Row
from slmops.errors import DataError
from slmops.evaluate.scores import Scores, score_predictions
from slmops.models.linear import LinearClassifier, fit_linear, text_features
from slmops.recipe import CLOSED_TASKS, Task

log = logging.getLogger(__name__)

MAX_TRAIN_ROWS = 50_000
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
        features = text_features([row.text for row in train])
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
    def __init__(self, model: LinearClassifier) -> None:
        self.model = model

    def answers(self, texts: Sequence[str]) -> list[str]:
        return self.model.answers(texts)

    def parts(self) -> Any:
        return self.model.features, self.model.weights, self.model.bias, self.model.labels


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


def _fit_linear(train: Sequence[Row], validation: Sequence[Row], seed: int) -> _Linear | None:
    learnt, judged = ([(row.text, str(row.target)) for row in rows] for rows in (train, validation))
    model = fit_linear(learnt, judged, seed)
    if model is None:
        log.info("the training rows have one class or no text: there is no linear baseline")
    return None if model is None else _Linear(model)


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
