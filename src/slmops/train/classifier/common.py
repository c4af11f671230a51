"""What adapting a teacher and teaching a student share."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from slmops.artifacts import Dataset, Draft, Row
from slmops.chat.files import read_object, token_text
from slmops.errors import DataError
from slmops.models.classifier import PooledClassifier, save_classifier
from slmops.train.losses import IGNORED_LABEL
from slmops.train.tokens import load_tokenizer, with_end_token

BATCH_SIZE = 64
SMALLEST_BATCH = 16
VALIDATION_BATCH = 128


def labels_of(dataset: Dataset) -> tuple[str, ...]:
    labels = dataset.labels
    if not labels:
        raise DataError("The data set has no closed label set.", path=dataset.path)
    return labels


def targets_of(rows: Sequence[Row], labels: tuple[str, ...]) -> list[int]:
    index = {label: number for number, label in enumerate(labels)}
    return [IGNORED_LABEL if row.target is None else index[row.target] for row in rows]


def rows_by_split(dataset: Dataset, *, labelled: bool) -> dict[str, list[Row]]:
    """The rows for training and for validation. ``labelled``: the training rows have to teach by their labels alone.

    Raises:
        DataError: a split without rows; no row for training has a label although nothing else teaches.
    """
    rows = {split: list(dataset.rows(split)) for split in ("train", "validation")}
    for split, found in rows.items():
        if not found:
            raise DataError(
                f"The {split} split has no rows.",
                path=dataset.path,
                remedy="Give more rows, or raise data.split.validation.",
            )
    if labelled and all(row.target is None for row in rows["train"]):
        raise DataError("No row of the train split has a label.", path=dataset.path, remedy="Set data.target.")
    return rows


def closing_tokenizer(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    end_token = token_text(read_object(folder / "tokenizer_config.json").get("eos_token"))
    known = end_token is not None and tokenizer.token_to_id(end_token) is not None
    return with_end_token(tokenizer, end_token) if end_token and known else tokenizer


def batch_size_for(rows: int, epochs: float, steps_at_least: int) -> int:
    """Few rows make small batches: what counts is how often the weights move."""
    return max(SMALLEST_BATCH, min(BATCH_SIZE, round(rows * epochs / steps_at_least)))


def save(
    classifier: PooledClassifier, tokenizer: Tokenizer, source: Path, history: list[dict[str, float]], draft: Draft
) -> None:
    save_classifier(classifier, draft.path)
    tokenizer.save(str(draft.path / "tokenizer.json"))
    config = read_object(source / "tokenizer_config.json")
    (draft.path / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False), "utf-8")
    (draft.path / "history.json").write_text(json.dumps(history, indent=1), "utf-8")
    draft.metrics["parameters"] = classifier.parameters_count
    draft.metrics["vocabulary"] = tokenizer.get_vocab_size()
    last = next((point for point in reversed(history) if "validation_accuracy" in point), None)
    if last is not None and math.isfinite(last["validation_accuracy"]):
        draft.metrics["validation_accuracy"] = last["validation_accuracy"]
        draft.metrics["validation_loss"] = last["validation_loss"]


def validate(batches: Iterable[tuple[list[int], Tensor]], targets: Sequence[int]) -> dict[str, float]:
    loss_sum, right, rows = 0.0, 0, 0
    for indices, logits in batches:
        gold = torch.tensor([targets[i] for i in indices])
        loss_sum += F.cross_entropy(logits.float(), gold, reduction="sum").item()
        right += int((logits.argmax(dim=-1) == gold).sum())
        rows += len(indices)
    return {"loss": loss_sum / max(1, rows), "accuracy": right / max(1, rows)}
