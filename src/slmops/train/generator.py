"""Language models for open tasks: a teacher adapted by LoRA, and a student trained on the teacher's answers.

Both read chats through :mod:`slmops.chat`, learn from the answer's tokens alone, and compute logits at no other
position. Both end as a folder in the layout of transformers, adapters merged.
"""

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
from slmops.models.quiet import quiet_transformers
from slmops.progress import ProgressSink, ignore
from slmops.recipe import StudentConfig, TeacherConfig, TrainConfig
from slmops.train.batching import steps_for
from slmops.train.loop import Batch, LoopConfig, fit, iterate_batches, parameter_groups
from slmops.train.student import shallow_copy
from slmops.train.tokens import load_tokenizer, pad
from slmops.train.vocabulary import trim_vocabulary

ToMessages = Callable[[Row], tuple[Message, ...]]

BATCH_SIZE = 8
LORA_RANK = 16
LORA_LEARNING_RATE = 5e-4
FULL_LEARNING_RATE = 5e-5
STUDENT_LEARNING_RATE = 5e-4
STUDENT_LAYERS = 6
STUDENT_EPOCHS = 3.0
TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class EncodedRow:
    """``supervised`` marks the tokens that are learnt: the answer and what ends the turn."""

    tokens: list[int]
    supervised: list[bool]


def adapt_generator(
    model_folder: Path,
    dataset: Dataset,
    to_messages: ToMessages,
    config: TeacherConfig,
    train: TrainConfig,
    seed: int,
    draft: Draft,
    *,
    progress: ProgressSink = ignore,
) -> None:
    """Adapt the language model at ``model_folder`` to the data set's gold answers, by LoRA unless told otherwise.

    Raises:
        DataError: no row has an answer that fits into ``train.max_tokens``.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    lora = (config.adapt_method or "lora") == "lora"
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    rate = config.learning_rate or (LORA_LEARNING_RATE if lora else FULL_LEARNING_RATE)
    _copy_tokenizer(model_folder, draft.path)
    shutil.copyfile(model_folder / "tokenizer.json", draft.path / "tokenizer.json")
    history = _fit(
        model,
        ChatTokenizer.load(draft.path),
        dataset,
        to_messages,
        train,
        epochs=config.adapt_epochs,
        learning_rate=rate,
        seed=seed,
        draft=draft,
        task="adapt teacher",
        progress=progress,
    )
    _save(model.merge_and_unload() if lora else model, history, draft)


def train_generator_student(
    dataset: Dataset,
    model_folder: Path,
    to_messages: ToMessages,
    student: StudentConfig,
    train: TrainConfig,
    seed: int,
    draft: Draft,
    *,
    task: str = "student",
    progress: ProgressSink = ignore,
) -> None:
    """Train a language model on the data set's answers (the teacher's, or gold for the untaught baseline).

    The student is cut from the model at ``model_folder`` (:func:`shallow_copy`, vocabulary trimmed to the task), or is
    that model whole where the recipe names a student.

    Raises:
        DataError: no row has an answer that fits into ``train.max_tokens``.
    """
    quiet_transformers()
    torch.manual_seed(seed)
    _copy_tokenizer(model_folder, draft.path)
    tokenizer = load_tokenizer(model_folder)
    cut = student.model is None
    kept_ids: tuple[int, ...] | None = None
    if cut and student.vocabulary == "trim":
        full = ChatTokenizer.load(model_folder)
        texts = [
            full.render([*to_messages(row), Message("assistant", row.target or "")], add_generation_prompt=False)
            for split in ("train", "validation")
            for row in dataset.rows(split)
        ]
        vocabulary = trim_vocabulary(tokenizer, texts)
        tokenizer, kept_ids = vocabulary.tokenizer, vocabulary.kept_ids
    tokenizer.save(str(draft.path / "tokenizer.json"))
    if cut:
        model: Any = shallow_copy(model_folder, kept_ids, student.layers or STUDENT_LAYERS)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    history = _fit(
        model,
        ChatTokenizer.load(draft.path),
        dataset,
        to_messages,
        train,
        epochs=train.epochs or STUDENT_EPOCHS,
        learning_rate=train.learning_rate or (STUDENT_LEARNING_RATE if cut else FULL_LEARNING_RATE),
        seed=seed,
        draft=draft,
        task=task,
        progress=progress,
    )
    _save(model, history, draft)


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
class _AnswerObjective:
    """Mean cross-entropy over the answers' tokens."""

    rows: list[EncodedRow]
    validation_rows: list[EncodedRow]

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    def collate(self, indices: Sequence[int]) -> Batch:
        return _collate([self.rows[i] for i in indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, targets = supervised_logits(model, batch)
        return F.cross_entropy(logits.float(), targets)

    def validate(self, model: nn.Module) -> dict[str, float]:
        loss_sum, tokens, right = 0.0, 0, 0
        for indices in iterate_batches([len(row.tokens) for row in self.validation_rows], BATCH_SIZE):
            logits, targets = supervised_logits(model, _collate([self.validation_rows[i] for i in indices]))
            loss_sum += F.cross_entropy(logits.float(), targets, reduction="sum").item()
            right += int((logits.argmax(dim=-1) == targets).sum())
            tokens += len(targets)
        return {"loss": loss_sum / max(1, tokens), "accuracy": right / max(1, tokens)}


def _fit(
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
) -> list[dict[str, float]]:
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
        _AnswerObjective(rows["train"], rows["validation"]),
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


def _collate(rows: Sequence[EncodedRow]) -> Batch:
    input_ids, attention_mask = pad([row.tokens for row in rows])
    supervised = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        supervised[index, : len(row.supervised)] = torch.tensor(row.supervised, dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "supervised": supervised}


def _copy_tokenizer(source: Path, destination: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, destination / name)


def _save(model: Any, history: list[dict[str, float]], draft: Draft) -> None:
    model.config.use_cache = True
    model.save_pretrained(draft.path)
    (draft.path / "history.json").write_text(json.dumps(history, indent=1), "utf-8")
    draft.metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    last = next((point for point in reversed(history) if "validation_loss" in point), None)
    if last is not None and math.isfinite(last["validation_loss"]):
        draft.metrics["validation_loss"] = last["validation_loss"]
        draft.metrics["validation_perplexity"] = math.exp(min(50.0, last["validation_loss"]))
