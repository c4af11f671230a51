"""TF-IDF of words and characters under one-against-rest logistic regression: a classifier without a language model.

It is the honest comparison for a student of a closed label set, and, where labels are few, a second teacher that errs
elsewhere than a language model does.

On disk, so that nothing is unpickled: ``linear.json`` (labels and the terms of each part in the order of their columns)
and ``linear.safetensors`` (``weights`` float32 ``[features, labels]``, ``bias`` ``[labels]``, each part's ``idf``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import CorruptArtifactError

ABOUT_NAME, WEIGHTS_NAME = "linear.json", "linear.safetensors"
INVERSE_REGULARISATIONS = (3.0, 10.0)
TEMPERATURES = tuple(0.02 * 1.25**step for step in range(25))
"""Candidates of :func:`calibrated`: 0.02 to 4.2."""
MANY_ROWS = 200
PARTS: dict[str, dict[str, Any]] = {
    # The pattern takes words of one letter too: "I", "a", and every word of scripts that write one sign a word.
    "words": {"ngram_range": (1, 2), "token_pattern": r"\w+"},
    "characters": {"ngram_range": (2, 5), "analyzer": "char_wb"},
}


@dataclass(frozen=True)
class LinearClassifier:
    """Features times one matrix, ``weights`` float32 ``[features, labels]``: the one-against-rest models folded into
    one product. ``features``: scikit-learn's; ``temperature``: what the scores are divided by before the softmax."""

    features: Any
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    labels: tuple[str, ...]
    temperature: float = 1.0

    def scores(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``[texts, labels]``, the higher the likelier."""
        scores: NDArray[np.float32] = self.features.transform(texts) @ self.weights + self.bias
        return scores

    def answers(self, texts: Sequence[str]) -> list[str]:
        """The likeliest label of each text."""
        return [self.labels[index] for index in self.scores(texts).argmax(axis=1)]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``[texts, labels]``; each row sums to 1."""
        return _softmax(self.scores(texts) / self.temperature)

    def close(self) -> None:
        """Nothing to free."""

    def save(self, folder: Path) -> None:
        """Write the files named above."""
        from safetensors.numpy import save_file

        parts = dict(self.features.transformer_list)
        about = {
            "labels": self.labels,
            "temperature": self.temperature,
            "parts": {name: sorted(part.vocabulary_, key=part.vocabulary_.__getitem__) for name, part in parts.items()},
        }
        (folder / ABOUT_NAME).write_text(json.dumps(about, ensure_ascii=False) + "\n", "utf-8")
        idf = {f"idf.{name}": np.asarray(part.idf_, dtype=np.float32) for name, part in parts.items()}
        weights = np.ascontiguousarray(self.weights)
        save_file({"weights": weights, "bias": self.bias, **idf}, folder / WEIGHTS_NAME)

    @classmethod
    def load(cls, folder: Path) -> LinearClassifier:
        """Read what :meth:`save` wrote.

        Raises:
            CorruptArtifactError: a file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            about = json.loads((folder / ABOUT_NAME).read_text("utf-8"))
            arrays = load_file(folder / WEIGHTS_NAME)
            labels, temperature = tuple(about["labels"]), float(about["temperature"])
            parts = [(name, _known_part(name, terms, arrays[f"idf.{name}"])) for name, terms in about["parts"].items()]
            return cls(_union(parts), arrays["weights"], arrays["bias"], labels, temperature)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CorruptArtifactError(
                f"{folder} holds no linear classifier: {error}.", remedy="Train or fetch it anew."
            ) from None


def fit_linear(
    train: Sequence[tuple[str, str]], validation: Sequence[tuple[str, str]], seed: int
) -> LinearClassifier | None:
    """The logistic regression with the most ``validation`` rows right; None where there is nothing to tell apart.

    ``train`` and ``validation``: texts with their labels.
    """
    texts, targets = [text for text, _ in train], [target for _, target in train]
    features = text_features(texts) if len(set(targets)) > 1 else None
    if features is None:
        return None
    matrix = features.transform(texts)
    best: tuple[int, LinearClassifier] | None = None
    for inverse in INVERSE_REGULARISATIONS if validation else INVERSE_REGULARISATIONS[-1:]:
        candidate = LinearClassifier(features, *_one_against_rest(matrix, targets, inverse, seed))
        guesses = candidate.answers([text for text, _ in validation]) if validation else []
        right = sum(guess == target for guess, (_, target) in zip(guesses, validation, strict=True))
        if best is None or right > best[0]:
            best = (right, candidate)
    return None if best is None else best[1]


def calibrated(classifier: LinearClassifier, rows: Sequence[tuple[str, str]]) -> LinearClassifier:
    """With the temperature under which the labels of ``rows`` (texts that it was not trained on) are likeliest.

    One-against-rest scores say little about how sure they are until they are scaled.
    Source: C. Guo et al., "On Calibration of Modern Neural Networks", arXiv:1706.04599.
    """
    known = [(text, classifier.labels.index(target)) for text, target in rows if target in classifier.labels]
    if not known:
        return classifier
    scores, right = classifier.scores([text for text, _ in known]), np.asarray([index for _, index in known])

    def surprise(temperature: float) -> float:
        likely = _softmax(scores / temperature)[np.arange(len(right)), right]
        return float(-np.log(np.maximum(likely, 1e-9)).mean())

    return LinearClassifier(
        classifier.features, classifier.weights, classifier.bias, classifier.labels, min(TEMPERATURES, key=surprise)
    )


def text_features(texts: Sequence[str]) -> Any | None:
    """TF-IDF of words (1-2) and characters (2-5) that are in ``texts``, or None where the texts are blank."""
    parts: list[tuple[str, Any]] = []
    if any(re.search(r"\w", text) for text in texts):
        parts.append(("words", _part("words")))
    if any(text.strip() for text in texts):
        # Pieces seen once make nine tenths of the features and none of the accuracy, once there are enough rows.
        parts.append(("characters", _part("characters", min_df=2 if len(texts) >= MANY_ROWS else 1)))
    return _union(parts).fit(texts) if parts else None


def _part(name: str, **more: Any) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(sublinear_tf=True, dtype=np.float32, **PARTS[name], **more)


def _known_part(name: str, terms: Sequence[str], idf: NDArray[np.float32]) -> Any:
    part = _part(name, vocabulary={term: column for column, term in enumerate(terms)})
    part.idf_ = idf
    return part


def _union(parts: list[tuple[str, Any]]) -> Any:
    from sklearn.pipeline import FeatureUnion

    return FeatureUnion(parts)


def _one_against_rest(
    matrix: Any, targets: Sequence[str], inverse_regularisation: float, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], tuple[str, ...]]:
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
    return weights, bias, tuple(labels)


def _softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    softened: NDArray[np.float32] = (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
    return softened
