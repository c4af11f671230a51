"""A pruned or quantized language model, trained again by the model that it was.

The whole model stands beside and says at each token of the answers what it would say next; the pruned one learns that,
and the answer itself. After Muralidharan et al. (Minitron), arXiv:2407.14679: distribution rather than text, no hidden
states where layers are gone. In few bits it is quantization-aware distillation (Liu et al., LLM-QAT, arXiv:2305.17888):
weights are on their grid whenever they are used, and are saved as they lie on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slmops.artifacts import Dataset, Draft
from slmops.chat import ChatTokenizer
from slmops.models.grid import Grid
from slmops.models.quiet import quiet_transformers
from slmops.models.vocabulary import kept_between
from slmops.progress import ProgressSink, ignore
from slmops.recipe import DistillConfig, LossWeights, RecoverConfig, TrainConfig
from slmops.train.generator.answers import ToMessages, copy_tokenizer, encode_splits, fit_objective, save
from slmops.train.generator.taught import OnlineTeacher, TaughtObjective, check_losses
from slmops.train.on_grid import leave_on_grid, put_on_grid
from slmops.train.sparse import keep_zeros
from slmops.train.tokens import load_tokenizer

LEARNING_RATE = 1e-4
EPOCHS = 1.0
LOSSES = LossWeights(gold=0.5, forward_kl=1.0)


def recover_generator(
    pruned: Path,
    whole: Path,
    dataset: Dataset,
    to_messages: ToMessages,
    config: RecoverConfig,
    train: TrainConfig,
    seed: int,
    draft: Draft,
    *,
    grid: Grid | None = None,
    task: str = "recover",
    progress: ProgressSink = ignore,
) -> None:
    """Train the model at ``pruned`` on the data set's answers, beside the model at ``whole``. Its zeros stay.
    ``grid``: the weights are on it.

    Raises:
        DataError: no row has an answer that fits into ``train.max_tokens``.
        ModelError: ``pruned`` was not made from ``whole``; a loss is no number.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    torch.manual_seed(seed)
    copy_tokenizer(pruned, draft.path)
    tokenizer = load_tokenizer(pruned)
    tokenizer.save(str(draft.path / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    keep_zeros(model)
    if grid is not None:
        put_on_grid(model, grid)
    chat = ChatTokenizer.load(draft.path)
    rows = encode_splits(chat, dataset, to_messages, train.max_tokens)
    losses = config.losses or LOSSES
    distill = DistillConfig(losses=losses, top_k=None)
    kept_ids = kept_between(load_tokenizer(whole), tokenizer)
    objective = TaughtObjective(
        rows["train"],
        rows["validation"],
        distill,
        online=OnlineTeacher(whole, kept_ids, attentions=False),
        eos_ids=chat.eos_token_ids,
    )
    check_losses(model, objective)
    history = fit_objective(
        model,
        objective,
        train,
        epochs=config.epochs or EPOCHS,
        learning_rate=config.learning_rate or LEARNING_RATE,
        seed=seed,
        draft=draft,
        task=task,
        progress=progress,
    )
    if grid is not None:
        leave_on_grid(model)
    save(model, history, draft)
