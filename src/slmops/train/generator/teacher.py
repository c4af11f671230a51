"""A language model adapted to a task's gold answers, so that it can teach."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from slmops.artifacts import Dataset, Draft
from slmops.chat import ChatTokenizer
from slmops.models.quiet import quiet_transformers
from slmops.progress import ProgressSink, ignore
from slmops.recipe import TeacherConfig, TrainConfig
from slmops.train.generator.answers import (
    FULL_LEARNING_RATE,
    ToMessages,
    answer_objective,
    copy_tokenizer,
    encode_splits,
    fit_objective,
    save,
)

LORA_RANK = 16
LORA_LEARNING_RATE = 5e-4


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
    copy_tokenizer(model_folder, draft.path)
    shutil.copyfile(model_folder / "tokenizer.json", draft.path / "tokenizer.json")
    rows = encode_splits(ChatTokenizer.load(draft.path), dataset, to_messages, train.max_tokens)
    history = fit_objective(
        model,
        answer_objective(model, rows, train),
        train,
        epochs=config.adapt_epochs,
        learning_rate=rate,
        seed=seed,
        draft=draft,
        task="adapt teacher",
        progress=progress,
    )
    save(model.merge_and_unload() if lora else model, history, draft)
