"""Fine-tuning alone: a model and gold answers in, a checkpoint out, by any method that the recipe names.

For a closed label set the model gets a linear layer over the mean of its states; for open tasks it learns the answers'
tokens, of running text every token. What is written is the whole model in transformers' layout, and the adapter for
itself in ``adapter/`` (peft's layout, or ``bottleneck/``), ``adapter/slmops.json`` saying which base it belongs to.

Guarantees: input that cannot be trained on is refused before the first step; a killed run goes on from its last
checkpoint with the curve it would have had. Not covered: teachers and students (:mod:`.classifier`, :mod:`.generator`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.artifacts import Dataset, Draft, Row
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, RecipeError
from slmops.models.classifier import PooledClassifier
from slmops.progress import ProgressSink, ignore
from slmops.recipe import TrainConfig
from slmops.train.adapters import AdapterInfo
from slmops.train.batch_size import part_tokens
from slmops.train.batching import steps_for
from slmops.train.classifier.common import (
    VALIDATION_BATCH,
    batch_size_for,
    closing_tokenizer,
    labels_of,
    targets_of,
    validate,
)
from slmops.train.classifier.common import save as save_trained_classifier
from slmops.train.custom_loss import LossFunction, adapt_signature, check_loss, load_loss
from slmops.train.forgetting import Forgetting, check_forgetting, read_general_rows
from slmops.train.generator.answers import (
    FULL_LEARNING_RATE,
    EncodedRow,
    ToMessages,
    answer_objective,
    copy_tokenizer,
    encode_splits,
    fit_objective,
    save,
    warn_of_overfitting,
)
from slmops.train.generator.running_text import MEASURED_ROWS, judged_pieces, learnt_and_judged, perplexity
from slmops.train.loop import Batch, LoopConfig, ParameterGroup, autocast, fit, iterate_batches, parameter_groups
from slmops.train.methods import Method, Tuned, learning_rate_of, open_tuned
from slmops.train.processes import ProcessGroup, run_together
from slmops.train.quantized_base import check_bitsandbytes
from slmops.train.tokens import encode_texts, pad
from slmops.train.trackers import check_trackers, open_trackers

EPOCHS = 3.0
CLASSIFIER_LEARNING_RATE = 1e-4
HEAD_LEARNING_RATE = 2e-3
STEPS_AT_LEAST = 250
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class FinetuneJob:
    """Everything that a training needs; survives pickling where its functions do.

    ``base_name`` and ``base_digest``: which model ``model_folder`` is, for the adapter. ``to_messages``: None for a
    closed label set and for running text. ``to_text``: a row as a document of running text, of which every token is
    learnt; ``more_texts``: further documents to learn; ``judged``: the split whose documents are judged before and
    after. ``loss``: instead of ``train.loss``. ``tracking``: where curves go; None: into the draft's work.
    """

    model_folder: Path
    base_name: str
    base_digest: str
    dataset: Dataset
    to_messages: ToMessages | None
    train: TrainConfig
    seed: int
    draft: Draft
    name: str = "train"
    loss: Callable[..., Tensor] | None = None
    tracking: Path | None = None
    to_text: Callable[[Row], str] | None = None
    more_texts: Sequence[str] = ()
    judged: Literal["validation", "test"] = "test"

    @property
    def closed(self) -> bool:
        return self.to_messages is None and self.to_text is None

    @property
    def method(self) -> Method:
        return self.train.method or ("full" if self.closed else "lora")


def finetune(job: FinetuneJob, *, progress: ProgressSink = ignore) -> None:
    """Train, and fill ``job.draft``.

    Raises:
        RecipeError: settings that do not go together, or a loss that cannot be loaded.
        MissingExtraError: a tracker or 4-bit training without its library.
        DataError: rows, splits or masks that cannot be trained on.
        ModelError: an adapter that does not fit the model, a loss that is no number.
        MemoryBudgetError: not even one row fits.
        GateError: more was forgotten than the budget allows.
    """
    check_trackers(job.train.trackers)
    if job.method == "qlora":
        check_bitsandbytes()
    if job.closed and job.train.forgetting is not None:
        raise RecipeError(
            "train.forgetting is set, but a classifier keeps no output layer over tokens: it has no loss on general "
            "text, before training or after, that a budget could hold.",
            remedy="Leave it out for classification and nli.",
        )
    loss_function(job)
    if job.train.processes == 1:
        train_alone(job, progress)
        return
    run_together(partial(_train_member, job), job.train.processes, progress)
    job.draft.metrics.update(json.loads((job.draft.work / "metrics.json").read_text("utf-8")))


def loss_function(job: FinetuneJob) -> LossFunction | None:
    if job.loss is not None:
        return adapt_signature(job.loss)
    return load_loss(job.train.loss) if job.train.loss else None


def _train_member(job: FinetuneJob, progress: ProgressSink) -> None:
    group = ProcessGroup.current()
    if group.rank:
        # The first process alone writes the artifact; the others need a place for what they would have written.
        elsewhere = job.draft.work / f"process-{group.rank}"
        shutil.rmtree(elsewhere, ignore_errors=True)
        elsewhere.mkdir(parents=True)
        job = replace(job, draft=Draft(elsewhere, job.draft.work), tracking=elsewhere)
    train_alone(job, progress)
    if group.rank == 0:
        (job.draft.work / "metrics.json").write_text(json.dumps(job.draft.metrics), "utf-8")


def train_alone(job: FinetuneJob, progress: ProgressSink) -> None:
    """The work of one process, alone or in a group."""
    torch.manual_seed(job.seed)
    if job.closed:
        _train_classifier(job, progress)
    else:
        _train_generator(job, progress)


# --- open tasks -------------------------------------------------------------------------------------------------


def _train_generator(job: FinetuneJob, progress: ProgressSink) -> None:
    from transformers import AutoModelForCausalLM

    train, draft = job.train, job.draft
    tokenizer = ChatTokenizer.load(job.model_folder)
    rows = _encoded(job, tokenizer)
    general = read_general_rows(train.forgetting, tokenizer, train.max_tokens) if train.forgetting else []
    judged = _judged(job, tokenizer)
    lengths = [len(row.tokens) for row in rows["train"]]
    limit = _part_tokens(job, lengths, logit_share=1.0 if job.to_text else 0.5)
    tuned = open_tuned(job.model_folder, train, job.method, AutoModelForCausalLM, task_type="CAUSAL_LM")
    objective = answer_objective(tuned.model, rows, train, loss_function(job))
    objective.measured_rows = MEASURED_ROWS if job.to_text else objective.measured_rows
    if objective.loss_function is not None:
        check_loss(objective.loss(tuned.model, objective.collate([0])), "The loss function")
    plain = replace(objective, loss_function=None)
    before, judged_before = _measure(plain, tuned.model, general), _measure(plain, tuned.model, judged)
    history = fit_objective(
        tuned.model,
        objective,
        train,
        epochs=train.epochs or EPOCHS,
        learning_rate=learning_rate_of(train, job.method, full=FULL_LEARNING_RATE),
        seed=job.seed,
        draft=draft,
        task=job.name,
        progress=progress,
        max_part_tokens=limit,
        frozen_bf16=job.method == "lora",
        callbacks=_callbacks(job),
    )
    plain.packed = False
    if judged:
        judged_after = _measure(plain, tuned.model, judged)
        draft.metrics["perplexity_before"] = perplexity(judged_before["loss"])
        draft.metrics["perplexity_after"] = perplexity(judged_after["loss"])
        draft.metrics["tokens_judged"] = sum(sum(piece.supervised) for piece in judged)
    if train.forgetting is not None:
        after = _measure(plain, tuned.model, general)
        found = Forgetting(before["loss"], after["loss"], before["accuracy"], after["accuracy"])
        draft.metrics["forgetting"] = found.to_json()
        check_forgetting(found, train.forgetting.budget)
    copy_tokenizer(job.model_folder, draft.path)
    shutil.copyfile(job.model_folder / "tokenizer.json", draft.path / "tokenizer.json")
    save(_save_adapter(job, tuned, history), history, draft)


def _encoded(job: FinetuneJob, tokenizer: ChatTokenizer) -> dict[str, list[EncodedRow]]:
    """What is learnt, and what is judged while training."""
    if job.to_messages is not None:
        return encode_splits(tokenizer, job.dataset, job.to_messages, job.train.max_tokens)
    if job.to_text is None:
        raise ValueError("an open task needs to_messages or to_text")
    learnt, judged = ([job.to_text(row) for row in job.dataset.rows(split)] for split in ("train", "validation"))
    learnt += job.more_texts
    job.draft.metrics["documents_trained"] = len(learnt)
    return learnt_and_judged(tokenizer, learnt, judged, job.train.max_tokens, job.dataset.path)


def _judged(job: FinetuneJob, tokenizer: ChatTokenizer) -> list[EncodedRow]:
    """Pieces of the documents that nothing is learnt from; none where rows have answers."""
    if job.to_text is None:
        return []
    texts = [job.to_text(row) for row in job.dataset.rows(job.judged)]
    return judged_pieces(tokenizer, texts, job.train.max_tokens)


def _measure(objective: Any, model: Any, rows: Sequence[Any]) -> dict[str, float]:
    if not rows:
        return {"loss": 0.0, "accuracy": 0.0}
    model.eval()
    kept = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    with torch.no_grad(), autocast("bf16" if torch.bfloat16 in kept else "fp32"):
        figures: dict[str, float] = objective.measure(model, rows)
    return figures


def _save_adapter(job: FinetuneJob, tuned: Tuned, history: Sequence[dict[str, float]]) -> Any:
    """Write the adapter beside; the whole model, to be written by the caller."""
    job.draft.metrics["method"] = job.method
    job.draft.metrics["parameters_trained"] = sum(parameter.numel() for parameter in tuned.trained)
    if tuned.method == "full":
        return tuned.model
    losses = [point["validation_loss"] for point in history if "validation_loss" in point]
    info = AdapterInfo(job.name, job.method, job.base_name, job.base_digest, losses[-1] if losses else None)
    if tuned.method == "bottleneck":
        tuned.save_adapter(job.draft.path, job.base_name)
        info.write(job.draft.path / "bottleneck")
        return tuned.model
    folder = job.draft.path / ADAPTER_FOLDER
    tuned.save_adapter(folder, job.base_name)
    info.write(folder)
    return tuned.whole(folder)


def _callbacks(job: FinetuneJob) -> list[Any]:
    settings = {"method": job.method, "base": job.base_name, "seed": job.seed} | {
        name: value
        for name, value in job.train.model_dump(mode="json").items()
        if isinstance(value, int | float | str) and name not in {"loss", "method", "tracking_folder"}
    }
    folder = job.tracking or job.draft.work / "tracking"
    return open_trackers(job.train.trackers, folder, job.name, settings, job.draft.work)


def _part_tokens(job: FinetuneJob, lengths: Sequence[int], logit_share: float = 0.5) -> int | None:
    if job.train.accumulation is not None:
        return None
    group = ProcessGroup.current()
    return group.agree(
        lambda: part_tokens(
            job.model_folder, job.method, longest=max(lengths), logit_share=logit_share, work=job.draft.work
        )
    )


# --- closed label sets ------------------------------------------------------------------------------------------


def _train_classifier(job: FinetuneJob, progress: ProgressSink) -> None:
    from transformers import AutoModel

    train, dataset, draft = job.train, job.dataset, job.draft
    labels = labels_of(dataset)
    rows = {split: [row for row in dataset.rows(split) if row.target is not None] for split in ("train", "validation")}
    for split, found in rows.items():
        if not found:
            raise DataError(
                f"The {split} split has no labelled rows.",
                path=dataset.path,
                remedy="Give more rows, or raise data.split.validation.",
            )
    tokenizer = closing_tokenizer(job.model_folder)
    tokens = {split: encode_texts(tokenizer, [row.text for row in rows[split]], train.max_tokens) for split in rows}
    limit = _part_tokens(job, [len(sequence) for sequence in tokens["train"]], logit_share=0.0)
    tuned = open_tuned(job.model_folder, train, job.method, AutoModel, task_type="FEATURE_EXTRACTION")
    classifier = PooledClassifier(tuned.model, labels)
    objective = _LabelObjective(
        tokens["train"],
        targets_of(rows["train"], labels),
        tokens["validation"],
        targets_of(rows["validation"], labels),
        loss_function(job),
    )
    if objective.loss_function is not None:
        check_loss(objective.loss(classifier, objective.collate([0])), "The loss function")
    epochs = train.epochs or EPOCHS
    batch_size = train.batch_size or batch_size_for(len(rows["train"]), epochs, STEPS_AT_LEAST)
    steps = steps_for(len(rows["train"]), batch_size, epochs)
    draft.metrics["rows_trained"] = len(rows["train"])
    rate = learning_rate_of(train, job.method, full=CLASSIFIER_LEARNING_RATE)
    groups: list[ParameterGroup] = [
        *parameter_groups(tuned.trained, rate, train.weight_decay),
        *parameter_groups(list(classifier.head.parameters()), HEAD_LEARNING_RATE, 0.0),
    ]
    history = fit(
        classifier,
        objective,
        groups,
        LoopConfig(
            steps=steps,
            batch_size=batch_size,
            validate_every_steps=max(1, min(train.checkpoint_every_steps, steps)),
            warmup_share=train.warmup_share,
            schedule=train.schedule,
            patience=train.patience,
            precision=train.precision,
            parts=train.accumulation or 1,
            max_part_tokens=limit,
            frozen_bf16=job.method == "lora",
            seed=job.seed,
        ),
        draft.work,
        task=job.name,
        progress=progress,
        callbacks=_callbacks(job),
    )
    warn_of_overfitting(history, draft)
    classifier.backbone = _save_adapter(job, tuned, history)
    save_trained_classifier(classifier, tokenizer, job.model_folder, history, draft)


@dataclass
class _LabelObjective:
    """Cross-entropy of the labels, or the user's own loss."""

    tokens: list[list[int]]
    targets: list[int]
    validation_tokens: list[list[int]]
    validation_targets: list[int]
    loss_function: LossFunction | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.tokens]

    def collate(self, indices: Sequence[int]) -> Batch:
        input_ids, attention_mask = pad([self.tokens[i] for i in indices])
        labels = torch.tensor([self.targets[i] for i in indices])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch["input_ids"], batch["attention_mask"])
        if self.loss_function is not None:
            return self.loss_function(logits, batch["labels"], batch)
        return F.cross_entropy(logits, batch["labels"])

    def validate(self, model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device

        def logits(indices: list[int]) -> Tensor:
            input_ids, attention_mask = pad([self.validation_tokens[i] for i in indices])
            found: Tensor = model(input_ids.to(device), attention_mask.to(device)).cpu()
            return found

        batches = iterate_batches([len(sequence) for sequence in self.validation_tokens], VALIDATION_BATCH)
        return validate(((indices, logits(indices)) for indices in batches), self.validation_targets)
