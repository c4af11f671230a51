"""A teacher that is no language model: TF-IDF with logistic regression. See :mod:`slmops.models.linear`."""

from __future__ import annotations

from slmops.artifacts import Dataset, Draft
from slmops.errors import DataError
from slmops.models.linear import calibrated, fit_linear
from slmops.train.classifier.common import labels_of, rows_by_split


def train_linear(dataset: Dataset, seed: int, draft: Draft) -> None:
    """Train on the labelled rows; how sure it says it is comes from the validation rows.

    Raises:
        DataError: no labelled rows, or not one of each label.
    """
    labels = labels_of(dataset)
    rows = {
        split: [(row.text, row.target) for row in found if row.target is not None]
        for split, found in rows_by_split(dataset, labelled=True).items()
    }
    model = fit_linear(rows["train"], rows["validation"], seed)
    missing = sorted(set(labels) - set(model.labels if model else ()))
    if model is None or missing:
        raise DataError(
            f"A linear teacher knows the labels of its rows alone, and none of the train split has {missing[0]!r}."
            if missing
            else "A linear teacher needs rows with words in them.",
            path=dataset.path,
            remedy="Give rows of every label, or leave the linear teacher out.",
        )
    model = calibrated(model, rows["validation"])
    model.save(draft.path)
    if rows["validation"]:
        answers = model.answers([text for text, _ in rows["validation"]])
        right = sum(answer == target for answer, (_, target) in zip(answers, rows["validation"], strict=True))
        draft.metrics["validation_accuracy"] = right / len(answers)
    draft.metrics["parameters"] = int(model.weights.size + model.bias.size)
    draft.metrics["temperature"] = model.temperature
