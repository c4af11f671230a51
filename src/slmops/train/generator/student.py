"""A small language model, trained on a teacher's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slmops.artifacts import Dataset, Draft, Message
from slmops.chat import ChatTokenizer
from slmops.models.quiet import quiet_transformers
from slmops.progress import ProgressSink, ignore
from slmops.recipe import StudentConfig, TrainConfig
from slmops.train.generator.answers import FULL_LEARNING_RATE, ToMessages, copy_tokenizer, fit_answers, save
from slmops.train.student import shallow_copy
from slmops.train.tokens import load_tokenizer
from slmops.train.vocabulary import trim_vocabulary

LEARNING_RATE = 5e-4
LAYERS = 6
EPOCHS = 3.0


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
    copy_tokenizer(model_folder, draft.path)
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
        model: Any = shallow_copy(model_folder, kept_ids, student.layers or LAYERS)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    history = fit_answers(
        model,
        ChatTokenizer.load(draft.path),
        dataset,
        to_messages,
        train,
        epochs=train.epochs or EPOCHS,
        learning_rate=train.learning_rate or (LEARNING_RATE if cut else FULL_LEARNING_RATE),
        seed=seed,
        draft=draft,
        task=task,
        progress=progress,
    )
    save(model, history, draft)
