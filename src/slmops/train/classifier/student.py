"""A small classifier, taught by gold, by a teacher's distribution over the labels, and by the state it decides from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from slmops.artifacts import Dataset, Draft, read_jsonl
from slmops.models.classifier import PooledClassifier, classifier_from_language_model, load_classifier
from slmops.models.vocabulary import TrimmedVocabulary, trim_vocabulary
from slmops.progress import ProgressSink, ignore
from slmops.recipe import DistillConfig, StudentConfig, TrainConfig
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
from slmops.train.classifier.signals import TeacherSignals
from slmops.train.loop import Batch, LoopConfig, fit, iterate_batches, parameter_groups
from slmops.train.losses import (
    IGNORED_LABEL,
    confidence_weights,
    doubt_of,
    generalized_jsd,
    gold_cross_entropy,
    hidden_state_distance,
    reverse_divergence,
    softened_divergence,
    weighted_sum,
)
from slmops.train.sparse import keep_zeros
from slmops.train.student import StudentShape, narrow_encoder
from slmops.train.tokens import encode_texts, load_tokenizer, pad

LEARNING_RATE = 1e-3
NAMED_LEARNING_RATE = 1e-4
SHAPE = StudentShape(layers=2, hidden_size=256, intermediate_size=512)
STEPS_AT_LEAST = 800
EPOCHS = 20.0
NAMED_EPOCHS = 3.0
RECOVERY_LEARNING_RATE = 2e-4
RECOVERY_EPOCHS = 5.0
DROPOUT = 0.1
HIDDEN_WEIGHT = 1.0
FEW_ROWS = 4000
COMMON_MERGES = 8000
"""Fewer training rows than this leave many everyday words unseen, so the student keeps the commonest ones too."""


def train_classifier_student(
    dataset: Dataset,
    teacher_folder: Path,
    student: StudentConfig,
    distill: DistillConfig | None,
    train: TrainConfig,
    seed: int,
    draft: Draft,
    *,
    named_model: Path | None = None,
    start: Path | None = None,
    others: Sequence[Dataset] = (),
    task: str = "student",
    progress: ProgressSink = ignore,
) -> None:
    """Train a small classifier on the teacher's distribution and the gold labels; on gold alone without ``distill``.

    ``dataset`` holds the teacher's signals where ``distill`` is given: log-probabilities, and its states if they were
    kept (see :class:`Dataset`). The student is cut from the model at ``teacher_folder`` unless ``named_model`` is the
    folder of another to start from, or ``start`` that of a classifier to go on from (its zeros stay; labels that it
    does not have are added).
    ``others``: the same rows with the distributions of further teachers.

    Raises:
        DataError: no labelled rows, or no teacher signals although ``distill`` asks for them.
    """
    torch.manual_seed(seed)
    labels = labels_of(dataset)
    rows = rows_by_split(dataset, labelled=distill is None)
    texts = [row.text for row in rows["train"]]
    targets = targets_of(rows["train"], labels)
    signals: TeacherSignals | None = None
    further: list[TeacherSignals] = []
    if distill is not None:
        transfer_path = dataset.path / "transfer.jsonl"
        transfer = [raw["text"] for raw in read_jsonl(transfer_path)] if transfer_path.exists() else []
        splits = {"train": len(texts), **({"transfer": len(transfer)} if transfer else {})}
        signals = TeacherSignals.read(dataset, splits, len(labels), states=distill.losses.hidden)
        further = [TeacherSignals.read(other, splits, len(labels), states=0) for other in others]
        texts += transfer
        targets += [IGNORED_LABEL] * len(transfer)
    source = named_model or teacher_folder
    tokenizer = closing_tokenizer(source)
    if start is not None:
        classifier, source, tokenizer = load_classifier(start), start, load_tokenizer(start)
        if classifier.labels != labels:
            classifier = classifier.with_labels(labels)
        keep_zeros(classifier)
        rate = train.learning_rate or RECOVERY_LEARNING_RATE
    elif named_model is not None:
        classifier = classifier_from_language_model(named_model, labels)
        rate = train.learning_rate or NAMED_LEARNING_RATE
    else:
        # The vocabulary comes from the labelled rows alone, so that a student and its untaught twin are the same net.
        vocabulary = _vocabulary(tokenizer, [row.text for row in rows["train"]], student)
        tokenizer = vocabulary.tokenizer
        classifier = PooledClassifier(narrow_encoder(source, vocabulary.kept_ids, student_shape(student)), labels)
        rate = train.learning_rate or LEARNING_RATE
    classifier.dropout.p = DROPOUT
    model = _Taught(classifier, signals.hidden_size if signals else 0)
    objective = _TokenObjective(
        encode_texts(tokenizer, texts, train.max_tokens),
        targets,
        signals,
        encode_texts(tokenizer, [row.text for row in rows["validation"]], train.max_tokens),
        targets_of(rows["validation"], labels),
        distill,
        further,
    )
    default = EPOCHS if named_model is None else NAMED_EPOCHS
    epochs = train.epochs or (default if start is None else RECOVERY_EPOCHS)
    batch_size = train.batch_size or batch_size_for(len(texts), epochs, STEPS_AT_LEAST)
    steps = steps_for(len(texts), batch_size, epochs)
    history = fit(
        model,
        objective,
        parameter_groups(list(model.parameters()), rate, 0.05),
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
    save(classifier, tokenizer, source, history, draft)


def student_shape(student: StudentConfig) -> StudentShape:
    """The shape that the recipe asks for, with the defaults of closed label sets."""
    hidden_size = student.hidden_size or SHAPE.hidden_size
    return StudentShape(
        layers=student.layers or SHAPE.layers,
        hidden_size=hidden_size,
        intermediate_size=student.intermediate_size or 2 * hidden_size,
    )


class _Taught(nn.Module):
    """The student and, where it follows the teacher's states, the projection onto them that only training needs.

    ``teacher_hidden_size``: 0 for no projection.
    """

    def __init__(self, classifier: PooledClassifier, teacher_hidden_size: int) -> None:
        super().__init__()
        self.classifier = classifier
        self.projection = nn.Linear(classifier.head.in_features, teacher_hidden_size) if teacher_hidden_size else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits ``[rows, labels]``, and states ``[rows, teacher's hidden]`` where there is a projection."""
        pooled = self.classifier.pooled(input_ids, attention_mask)
        return self.classifier.classify(pooled), None if self.projection is None else self.projection(pooled)


@dataclass
class _TokenObjective:
    """The weighted sum of the signals: gold where it is known, the teacher where it spoke."""

    tokens: list[list[int]]
    targets: list[int]
    signals: TeacherSignals | None
    validation_tokens: list[list[int]]
    validation_targets: list[int]
    distill: DistillConfig | None
    further: Sequence[TeacherSignals] = ()

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.tokens]

    def collate(self, indices: Sequence[int]) -> Batch:
        input_ids, attention_mask = pad([self.tokens[i] for i in indices])
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.tensor([self.targets[i] for i in indices]),
        }
        if self.signals is None:
            return batch
        for number, other in enumerate(self.further):
            batch[f"teacher{number}_log_probabilities"] = other.batch(indices)["teacher_log_probabilities"]
        return {**batch, **self.signals.batch(indices)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        gold = gold_cross_entropy(logits, batch["labels"])
        if self.distill is None:
            return gold
        weights = {**self.distill.weights(closed=True)}
        parts = {"gold": gold} if "gold" in weights else {}
        for name, value in self._divergences(logits, batch, weights):
            parts[name] = parts[name] + value if name in parts else value
        if states is not None:
            weights.setdefault("hidden", HIDDEN_WEIGHT)
            parts["hidden"] = hidden_state_distance(states, batch["teacher_states"])
        return weighted_sum(parts, weights)

    def _divergences(self, logits: Tensor, batch: Batch, weights: Mapping[str, float]) -> Iterator[tuple[str, Tensor]]:
        """Of each teacher; several are weighed row by row."""
        config = cast(DistillConfig, self.distill)
        temperature = config.softness(closed=True)
        others = [batch[f"teacher{number}_log_probabilities"] for number in range(len(self.further))]
        teachers = [batch["teacher_log_probabilities"], *others]
        counts: list[Tensor | None] = [None]
        if others:
            right = [-doubt_of(logs, batch["labels"]) for logs in teachers]
            counts = list(confidence_weights(right, equal=config.teacher_weights == "equal"))
        for logs, count in zip(teachers, counts, strict=True):
            if "forward_kl" in weights:
                yield "forward_kl", softened_divergence(logits, logs, temperature, count)
            if "reverse_kl" in weights:
                yield "reverse_kl", reverse_divergence(logits, logs, temperature, count)
            if "jsd" in weights:
                yield "jsd", generalized_jsd(logits, logs, config.jsd_beta, temperature, count)

    def validate(self, model: nn.Module) -> dict[str, float]:
        def logits_of(indices: list[int]) -> Tensor:
            input_ids, attention_mask = pad([self.validation_tokens[i] for i in indices])
            return cast(Tensor, model(input_ids=input_ids, attention_mask=attention_mask)[0])

        batches = iterate_batches([len(sequence) for sequence in self.validation_tokens], VALIDATION_BATCH)
        return validate(((indices, logits_of(indices)) for indices in batches), self.validation_targets)


def _vocabulary(tokenizer: Tokenizer, texts: Sequence[str], student: StudentConfig) -> TrimmedVocabulary:
    if student.vocabulary == "keep":
        return TrimmedVocabulary(tokenizer, tuple(range(tokenizer.get_vocab_size())))
    return trim_vocabulary(tokenizer, texts, common_merges=COMMON_MERGES if len(texts) < FEW_ROWS else 0)
