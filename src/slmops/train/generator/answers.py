"""Learning to answer: rows as tokens, the loss at the answer's tokens, and what is written in the end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError
from slmops.progress import ProgressSink
from slmops.recipe import TrainConfig
from slmops.train.batching import steps_for
from slmops.train.loop import Batch, LoopConfig, Objective, fit, iterate_batches, parameter_groups
from slmops.train.tokens import pad

ToMessages = Callable[[Row], tuple[Message, ...]]

BATCH_SIZE = 8
FULL_LEARNING_RATE = 5e-5
"""Of weights that are trained whole from where they are."""
TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class EncodedRow:
    """``supervised`` marks the tokens that are learnt: the answer and what ends the turn."""

    tokens: list[int]
    supervised: list[bool]


def encode_rows(
    tokenizer: ChatTokenizer, rows: Sequence[Row], to_messages: ToMessages, max_tokens: int
) -> list[EncodedRow]:
    """Rows with an answer, cut to ``max_tokens``; rows whose answer lies beyond the cut are left out."""
    encoded = []
    for row in rows:
        if row.target is None:
            continue
        chat = tokenizer.encode_training(to_messages(row), row.target)
        tokens, supervised = list(chat.input_ids[:max_tokens]), list(chat.loss_mask[:max_tokens])
        if any(supervised[1:]):
            encoded.append(EncodedRow(tokens, supervised))
    return encoded


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[supervised positions, vocabulary]`` and their next tokens ``[supervised positions]``.

    The output layer is by far the widest: it is applied where a token is learnt and nowhere else.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = base.model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    wanted = batch["supervised"][:, 1:].bool()
    logits = base.lm_head(states[:, :-1][wanted])
    return cast(Tensor, logits), batch["input_ids"][:, 1:][wanted]


@dataclass
class AnswerObjective:
    """Mean cross-entropy over the answers' tokens."""

    rows: list[EncodedRow]
    validation_rows: list[EncodedRow]

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    def collate(self, indices: Sequence[int]) -> Batch:
        return collate_rows([self.rows[i] for i in indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = supervised_logits(model, batch)
        return F.cross_entropy(logits.float(), targets)

    def validate(self, model: nn.Module) -> dict[str, float]:
        loss_sum, tokens, right = 0.0, 0, 0
        for indices in iterate_batches([len(row.tokens) for row in self.validation_rows], BATCH_SIZE):
            logits, targets = supervised_logits(model, collate_rows([self.validation_rows[i] for i in indices]))
            loss_sum += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            right += int((logits.argmax(dim=-1) == targets).sum())
            tokens += len(targets)
        return {"loss": loss_sum / max(1, tokens), "accuracy": right / max(1, tokens)}


def fit_answers(
    model: Any,
    tokenizer: ChatTokenizer,
    dataset: Dataset,
    to_messages: ToMessages,
    train: TrainConfig,
    *,
    epochs: float,
    learning_rate: float,
    seed: int,
    draft: Draft,
    task: str,
    progress: ProgressSink,
    objective_for: Callable[[list[EncodedRow], list[EncodedRow]], Objective] | None = None,
) -> list[dict[str, float]]:
    """``objective_for``: of training and validation rows; None learns the answers alone."""
    rows = {
        split: encode_rows(tokenizer, list(dataset.rows(split)), to_messages, train.max_tokens)
        for split in ("train", "validation")
    }
    for split, encoded in rows.items():
        if not encoded:
            raise DataError(
                f"No row of the {split} split has an answer that fits into {train.max_tokens} tokens.",
                path=dataset.path,
                remedy="Raise train.max_tokens, or look at the data with: slmops data RECIPE",
            )
    draft.metrics["rows_trained"] = len(rows["train"])
    draft.metrics["tokens_trained_each_epoch"] = sum(len(row.tokens) for row in rows["train"])
    batch_size = train.batch_size or BATCH_SIZE
    steps = steps_for(len(rows["train"]), batch_size, epochs)
    # Padding of a batch is masked, so the token behind it does not matter; rotary positions count from the left.
    return fit(
        model,
        (objective_for or AnswerObjective)(rows["train"], rows["validation"]),
        parameter_groups(list(model.parameters()), learning_rate, 0.01),
        LoopConfig(
            steps=steps,
            batch_size=batch_size,
            validate_every_steps=max(1, min(train.checkpoint_every_steps, steps)),
            patience=train.patience,
            precision=train.precision,
            seed=seed,
        ),
        draft.work,
        task=task,
        progress=progress,
    )


def collate_rows(rows: Sequence[EncodedRow]) -> Batch:
    input_ids, attention_mask = pad([row.tokens for row in rows])
    supervised = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        supervised[index, : len(row.supervised)] = torch.tensor(row.supervised, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "supervised": supervised}


def copy_tokenizer(source: Path, destination: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


def save(model: Any, history: list[dict[str, float]], draft: Draft) -> None:
    model.config.use_cache = True
    model.save_pretrained(draft.path)
    (draft.path / "history.json").write_text(json.dumps(history, indent=1), "utf-8")
    draft.metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    last = next((point for point in reversed(history) if "validation_loss" in point), None)
    if last is not None and math.isfinite(last["validation_loss"]):
        draft.metrics["validation_loss"] = last["validation_loss"]
        draft.metrics["validation_perplexity"] = math.exp(min(50.0, last["validation_loss"]))
