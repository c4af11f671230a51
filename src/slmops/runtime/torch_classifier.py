"""A classifier run by torch: the form in which it was trained, and in which a teacher is measured.

Guarantees: rows come back in the order given and sum to 1; texts are cut and padded as :mod:`slmops.runtime.
onnx_classifier` does it, so that the two differ by their arithmetic alone; nothing is fetched or sent.
Not covered: accelerators, quantized weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slmops.artifacts import MODEL_DESCRIPTION
from slmops.errors import CorruptArtifactError, MissingExtraError, ModelError, ModelNotFoundError
from slmops.runtime.base import Probabilities, States
from slmops.runtime.description import ModelDescription
from slmops.runtime.onnx_classifier import BATCH_TOKENS, TOKEN_CHARACTERS, encodable, length_batches, pad, softmax

if TYPE_CHECKING:
    from slmops.models.classifier import PooledClassifier


class TorchClassifier:
    """See the module. One instance may be used from one thread at a time."""

    def __init__(self, classifier: PooledClassifier, tokenizer: Any, description: ModelDescription) -> None:
        self._classifier: PooledClassifier | None = classifier
        self._tokenizer = tokenizer
        self._empty = [description.pad_token_id]
        self._max_characters = description.max_tokens * TOKEN_CHARACTERS
        self.description = description

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> TorchClassifier:
        """Open a classifier's checkpoint, with or without ``slmops.json``.

        ``threads``: of torch, for the whole process; None leaves them as they are.

        Raises:
            MissingExtraError: torch or transformers are not installed.
            ModelNotFoundError: no model there.
            CorruptArtifactError: ``slmops.json`` or the tokenizer is damaged.
            ModelError: weights, labels or tokenizer are missing or do not belong together.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{folder} is not a classifier: it has no config.json.",
                remedy="Name a checkpoint that was trained for a closed label set.",
            )
        try:
            import torch
        except ImportError:
            raise MissingExtraError("Running a torch model", "train") from None
        from slmops.models.classifier import load_classifier
        from slmops.models.quiet import quiet_transformers

        quiet_transformers()
        if threads is not None:
            torch.set_num_threads(threads)
        classifier = load_classifier(folder)
        description = _describe(folder, classifier)
        return cls(classifier, _open_tokenizer(folder, description.max_tokens), description)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.description.labels

    def probabilities(self, texts: Sequence[str]) -> Probabilities:
        """``[len(texts), len(labels)]`` float32, in the order of ``texts``; each row sums to 1."""
        return self.states_and_probabilities(texts)[1]

    def states_and_probabilities(self, texts: Sequence[str]) -> tuple[States, Probabilities]:
        """The mean hidden state over each text's tokens, ``[len(texts), hidden]`` float32, and the distribution."""
        import torch

        if self._classifier is None:
            raise RuntimeError("The classifier is closed.")
        readable = [encodable(text, self._max_characters) for text in texts]
        encoded = [encoding.ids or self._empty for encoding in self._tokenizer.encode_batch_fast(readable)]
        states = np.empty((len(texts), self._classifier.head.in_features), dtype=np.float32)
        probabilities = np.empty((len(texts), len(self.labels)), dtype=np.float32)
        for rows in length_batches([len(ids) for ids in encoded], BATCH_TOKENS):
            ids, mask = pad([encoded[row] for row in rows], self.description.pad_token_id)
            with torch.inference_mode():
                pooled = self._classifier.pooled(torch.from_numpy(ids), torch.from_numpy(mask))
                states[rows] = pooled.numpy()
                probabilities[rows] = softmax(self._classifier.classify(pooled).numpy())
        return states, probabilities

    def close(self) -> None:
        """Free the weights. The classifier cannot be used afterwards."""
        self._classifier = None


def _describe(folder: Path, classifier: PooledClassifier) -> ModelDescription:
    if not (folder / MODEL_DESCRIPTION).exists():
        return ModelDescription(
            "torch", "classifier", "fp32", parameters=classifier.parameters_count, labels=classifier.labels
        )
    description = ModelDescription.read(folder)
    if (description.runtime, description.form) != ("torch", "classifier"):
        raise ModelError(
            f"{folder} holds a {description.form} for {description.runtime}, not a classifier for torch.",
            remedy="Name a checkpoint that was trained for a closed label set.",
        )
    if description.labels != classifier.labels:
        raise CorruptArtifactError(
            f"{folder}: {MODEL_DESCRIPTION} and labels.json do not name the same labels.",
            remedy="Fetch the bundle anew, or run again.",
        )
    return description


def _open_tokenizer(folder: Path, max_tokens: int) -> Any:
    from slmops.chat.files import open_tokenizer

    tokenizer = open_tokenizer(folder / "tokenizer.json")
    tokenizer.enable_truncation(max_tokens)
    return tokenizer
