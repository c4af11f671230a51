"""A language model adapted to a closed label set, so that it can teach."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.artifacts import Dataset, Draft
from slmops.models.classifier import PooledClassifier, classifier_from_language_model
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import TeacherConfig, TrainConfig
from slmops.train.batching import steps_for
from slmops.train.classifier.common import (
    VALIDATION_BATCH,
    batch_size_for,
    closing_tokenizer,
    labels_of,
    rows_by_split,
    save,
    targets_of,
    validate,
)
from slmops.train.loop import Batch, LoopConfig, autocast, fit, iterate_batches, parameter_groups
from slmops.train.tokens import encode_texts, pad

LEARNING_RATE = 2e-4
LABEL_SMOOTHING = 0.1
"""Measured on intent data with a third of the layers frozen: 2e-4 with smoothing ends 1.2 points of validation
accuracy above 1e-4 without."""
HEAD_LEARNING_RATE = 2e-3
STEPS_AT_LEAST = 250


def adapt_classifier(
    model_folder: Path,
    dataset: Dataset,
    config: TeacherConfig,
    train: TrainConfig,
    seed: int,
    draft: Draft,
    *,
    progress: ProgressSink = ignore,
) -> None:
    """Fine-tune the language model at ``model_folder`` into a classifier of the data set's labels.

    The lowest layers (``config.frozen_share`` of them) and the embeddings stay as they are; what they compute is
    computed once and kept, in bf16, for all epochs.

    Raises:
        DataError: no labelled rows.
    """
    torch.manual_seed(seed)
    labels = labels_of(dataset)
    tokenizer = closing_tokenizer(model_folder)
    classifier = classifier_from_language_model(model_folder, labels)
    layers: int = cast(Any, classifier.backbone).config.num_hidden_layers
    lower, upper = split_at(classifier, round(config.frozen_share * layers))
    rows = rows_by_split(dataset, labelled=True)
    tokens = {split: encode_texts(tokenizer, [row.text for row in rows[split]], train.max_tokens) for split in rows}
    precision = "bf16" if train.precision == "auto" else train.precision
    states = {split: lower_states(lower, tokens[split], precision, split, progress) for split in tokens}
    objective = _StateObjective(
        states["train"], targets_of(rows["train"], labels), states["validation"], targets_of(rows["validation"], labels)
    )
    batch_size = train.batch_size or batch_size_for(len(rows["train"]), config.adapt_epochs, STEPS_AT_LEAST)
    steps = steps_for(len(rows["train"]), batch_size, config.adapt_epochs)
    head = list(upper.head.parameters())
    body = [p for p in upper.backbone.parameters() if p.requires_grad]
    history = fit(
        upper,
        objective,
        [
            *parameter_groups(body, config.learning_rate or LEARNING_RATE, 0.01),
            *parameter_groups(head, HEAD_LEARNING_RATE, 0.0),
        ],
        LoopConfig(
            steps=steps,
            batch_size=batch_size,
            validate_every_steps=steps_for(len(rows["train"]), batch_size, 1),
            warmup_share=0.1,
            precision=train.precision,
            seed=seed,
        ),
        draft.work,
        task="adapt teacher",
        progress=progress,
    )
    classifier.head = upper.head
    save(classifier, tokenizer, model_folder, history, draft)


def split_at(classifier: PooledClassifier, layer: int) -> tuple[nn.Module, PooledClassifier]:
    """Two halves that share the classifier's weights: layers below ``layer``, frozen, and the rest with the head.

    The lower half maps token ids to hidden states, without the final norm; the upper half takes those as
    ``inputs_embeds``. One after the other they compute what the whole does.
    """
    whole = cast(Any, classifier.backbone)
    lower, backbone = copy.copy(whole), copy.copy(whole)
    for part, layers in ((lower, whole.layers[:layer]), (backbone, whole.layers[layer:])):
        part._modules = dict(whole._modules)
        part.config = copy.deepcopy(whole.config)
        part.config.num_hidden_layers = len(layers)
        part.layers = layers
    lower.norm = nn.Identity()
    backbone.embed_tokens = nn.Identity()
    for parameter in lower.parameters():
        parameter.requires_grad_(False)
    upper = PooledClassifier(backbone, classifier.labels)
    upper.head = classifier.head
    return lower, upper


def lower_states(
    lower: nn.Module, tokens: Sequence[list[int]], precision: str, split: str, progress: ProgressSink = ignore
) -> list[Tensor]:
    """Hidden states of each sequence after the frozen layers: bf16 ``[tokens, hidden]``, in the order given."""
    states: list[Tensor | None] = [None] * len(tokens)
    done = 0
    with torch.no_grad(), autocast(precision):
        for indices in iterate_batches([len(t) for t in tokens], 64):
            input_ids, attention_mask = pad([tokens[i] for i in indices])
            hidden = lower(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            for row, index in enumerate(indices):
                states[index] = hidden[row, : len(tokens[index])].to(torch.bfloat16).clone()
            done += len(indices)
            progress(Progress(f"frozen layers, {split}", done, len(tokens)))
    return cast(list[Tensor], states)


@dataclass
class _StateObjective:
    """Cross-entropy of the upper half, on hidden states that were computed once."""

    states: list[Tensor]
    targets: list[int]
    validation_states: list[Tensor]
    validation_targets: list[int]

    @property
    def lengths(self) -> list[int]:
        return [len(state) for state in self.states]

    def collate(self, indices: Sequence[int]) -> Batch:
        batch = _pad_states([self.states[i] for i in indices])
        return {**batch, "labels": torch.tensor([self.targets[i] for i in indices])}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(inputs_embeds=batch["inputs_embeds"], attention_mask=batch["attention_mask"])
        return F.cross_entropy(logits, batch["labels"], label_smoothing=LABEL_SMOOTHING)

    def validate(self, model: nn.Module) -> dict[str, float]:
        batches = iterate_batches([len(state) for state in self.validation_states], VALIDATION_BATCH)
        return validate(
            ((indices, model(**_pad_states([self.validation_states[i] for i in indices]))) for indices in batches),
            self.validation_targets,
        )


def _pad_states(states: Sequence[Tensor]) -> Batch:
    longest = max(len(state) for state in states)
    padded = torch.zeros(len(states), longest, states[0].shape[-1])
    attention_mask = torch.zeros(len(states), longest, dtype=torch.int64)
    for row, state in enumerate(states):
        padded[row, : len(state)] = state
        attention_mask[row, : len(state)] = 1
    return {"inputs_embeds": padded, "attention_mask": attention_mask}
