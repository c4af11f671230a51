"""Learning to answer: rows as tokens, the loss at the answer's tokens, and what is written in the end."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError
from slmops.models.bottleneck import without_bottlenecks
from slmops.models.scaled_logits import scaled_logits
from slmops.progress import ProgressSink
from slmops.recipe import TrainConfig
from slmops.train.batching import steps_for
from slmops.train.curves import overfitting
from slmops.train.custom_loss import LossFunction
from slmops.train.loop import Batch, LoopConfig, fit, iterate_batches, parameter_groups
from slmops.train.packing import pack, packed_states, packing_works, stop_packing
from slmops.train.tokens import pad

logger = logging.getLogger(__name__)

ToMessages = Callable[[Row], tuple[Message, ...]]

BATCH_SIZE = 8
PROBE_ROWS, PROBE_TOKENS = 3, 64
"""What packing is tried on."""
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


def check_masks(rows: Sequence[EncodedRow], split: str, path: Path | None = None) -> None:
    """Refuse loss masks from which nothing, or the questions too, would be learnt.

    Raises:
        DataError: a mask without a learnt token, or no mask that leaves a token out.
    """
    for number, row in enumerate(rows, start=1):
        if not any(row.supervised[1:]):
            raise DataError(
                f"The loss mask of this row of the {split} split is all zeros: nothing would be learnt from it.",
                path=path,
                row=number,
                remedy="Give it an answer, or leave the row out.",
            )
    if rows and all(all(row.supervised) for row in rows):
        raise DataError(
            f"The loss masks of all {len(rows)} rows of the {split} split are all ones: the model would learn "
            "to ask as well as to answer.",
            path=path,
            remedy="Mark the tokens of the answers alone.",
        )


def supervised_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[supervised positions, vocabulary]`` and their next tokens ``[supervised positions]``.

    The output layer is by far the widest: it is applied where a token is learnt and nowhere else. ``batch``: padded
    (:func:`collate_rows`), or packed (:func:`slmops.train.packing.pack`).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "predict" in batch:
        states, targets = packed_states(base, batch)[batch["predict"]], batch["targets"]
    else:
        hidden = base.base_model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
        ).last_hidden_state
        wanted = batch["supervised"][:, 1:].bool()
        states, targets = hidden[:, :-1][wanted], batch["input_ids"][:, 1:][wanted]
    return scaled_logits(base.get_output_embeddings()(states), base.config), targets


@dataclass
class AnswerObjective:
    """Mean cross-entropy over the answers' tokens, or the user's own loss over them."""

    rows: list[EncodedRow]
    validation_rows: list[EncodedRow]
    packed: bool = False
    loss_function: LossFunction | None = None
    measured_rows: int = BATCH_SIZE

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    @property
    def weights(self) -> list[float]:
        """Learnt tokens of each row: a step's loss is the mean over all of its tokens, however it is divided."""
        return [float(sum(row.supervised[1:])) for row in self.rows]

    def collate(self, indices: Sequence[int]) -> Batch:
        return self._batch([self.rows[i] for i in indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = supervised_logits(model, batch)
        if self.loss_function is not None:
            return self.loss_function(logits.float(), targets, batch)
        return F.cross_entropy(logits.float(), targets)

    def validate(self, model: nn.Module) -> dict[str, float]:
        return self.measure(model, self.validation_rows)

    def measure(self, model: nn.Module, rows: Sequence[EncodedRow]) -> dict[str, float]:
        """Mean cross-entropy (or own loss) of a learnt token, and the share of them foreseen."""
        loss_sum, tokens, right = 0.0, 0, 0
        device = next(model.parameters()).device
        for indices in iterate_batches([len(row.tokens) for row in rows], self.measured_rows):
            batch = {name: part.to(device) for name, part in self._batch([rows[i] for i in indices]).items()}
            logits, targets = supervised_logits(model, batch)
            if self.loss_function is not None:
                loss_sum += self.loss_function(logits.float(), targets, batch).item() * len(targets)
            else:
                loss_sum += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            right += int((logits.argmax(dim=-1) == targets).sum())
            tokens += len(targets)
        return {"loss": loss_sum / max(1, tokens), "accuracy": right / max(1, tokens)}

    def _batch(self, rows: Sequence[EncodedRow]) -> Batch:
        if self.packed:
            return pack([row.tokens for row in rows], [row.supervised for row in rows])
        return collate_rows(rows)


def encode_splits(
    tokenizer: ChatTokenizer, dataset: Dataset, to_messages: ToMessages, max_tokens: int
) -> dict[str, list[EncodedRow]]:
    """The rows for training and for validation.

    Raises:
        DataError: a split without rows, without an answer that fits, or with a loss mask that means nothing.
    """
    encoded: dict[str, list[EncodedRow]] = {}
    for split in ("train", "validation"):
        rows = list(dataset.rows(split))
        if not rows:
            raise DataError(
                f"The {split} split has no rows.",
                path=dataset.path,
                remedy="Give more rows, or raise data.split.validation."
                if split == "validation"
                else "Give more rows.",
            )
        encoded[split] = encode_rows(tokenizer, rows, to_messages, max_tokens)
        if not encoded[split]:
            raise DataError(
                f"No row of the {split} split has an answer that fits into {max_tokens} tokens.",
                path=dataset.path,
                remedy="Raise train.max_tokens, or look at the data with: slmops data RECIPE",
            )
        check_masks(encoded[split], split, dataset.path)
    return encoded


def answer_objective(
    model: Any, rows: Mapping[str, list[EncodedRow]], train: TrainConfig, loss_function: LossFunction | None = None
) -> AnswerObjective:
    """What is trained; packed where that works."""
    return AnswerObjective(rows["train"], rows["validation"], may_pack(model, rows["train"], train), loss_function)


def may_pack(model: Any, rows: Sequence[EncodedRow], train: TrainConfig) -> bool:
    """Whether the recipe allows packing and the model is seen to compute the same so; if so, it packs from now on."""
    return train.packing and packing_works(model, [row.tokens[:PROBE_TOKENS] for row in rows[:PROBE_ROWS]])


def fit_objective(
    model: Any,
    objective: AnswerObjective,
    train: TrainConfig,
    *,
    epochs: float,
    learning_rate: float,
    seed: int,
    draft: Draft,
    task: str,
    progress: ProgressSink,
    max_part_tokens: int | None = None,
    frozen_bf16: bool = False,
    callbacks: Sequence[Any] = (),
) -> list[dict[str, float]]:
    draft.metrics["rows_trained"] = len(objective.rows)
    draft.metrics["tokens_trained_each_epoch"] = sum(objective.lengths)
    draft.metrics["packed"] = objective.packed
    batch_size = train.batch_size or BATCH_SIZE
    steps = steps_for(len(objective.rows), batch_size, epochs)
    # Padding of a batch is masked, so the token behind it does not matter; rotary positions count from the left.
    try:
        history = fit(
            model,
            objective,
            parameter_groups(list(model.parameters()), learning_rate, train.weight_decay),
            LoopConfig(
                steps=steps,
                batch_size=batch_size,
                validate_every_steps=max(1, min(train.checkpoint_every_steps, steps)),
                warmup_share=train.warmup_share,
                schedule=train.schedule,
                patience=train.patience,
                precision=train.precision,
                parts=train.accumulation or 1,
                max_part_tokens=max_part_tokens,
                frozen_bf16=frozen_bf16,
                seed=seed,
            ),
            draft.work,
            task=task,
            progress=progress,
            callbacks=callbacks,
        )
    finally:
        if objective.packed:
            stop_packing(model)
    warn_of_overfitting(history, draft)
    return history


def warn_of_overfitting(history: Sequence[Mapping[str, float]], draft: Draft) -> None:
    warning = overfitting(history)
    if warning is not None:
        logger.warning("%s", warning)
        draft.metrics["warnings"] = [warning]


def collate_rows(rows: Sequence[EncodedRow]) -> Batch:
    """Padded to the longest: ``input_ids``, ``attention_mask`` and ``supervised``, int64 ``[rows, longest]``."""
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
    state = without_bottlenecks(model.state_dict())
    model.save_pretrained(draft.path, state_dict=state)
    (draft.path / "history.json").write_text(json.dumps(history, indent=1), "utf-8")
    draft.metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    last = next((point for point in reversed(history) if "validation_loss" in point), None)
    if last is not None and math.isfinite(last["validation_loss"]):
        draft.metrics["validation_loss"] = last["validation_loss"]
        draft.metrics["validation_perplexity"] = math.exp(min(50.0, last["validation_loss"]))
