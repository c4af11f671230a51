"""A small language model, trained on a teacher's answers and on what the teacher thinks of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slmops.artifacts import Dataset, Draft, Message
from slmops.artifacts.token_signals import SignalHeader
from slmops.chat import ChatTokenizer, tokenizer_digest
from slmops.errors import ModelError
from slmops.models.quiet import quiet_transformers
from slmops.models.vocabulary import trim_vocabulary
from slmops.progress import ProgressSink, ignore
from slmops.recipe import DISTRIBUTION_LOSSES, DistillConfig, StudentConfig, TrainConfig
from slmops.train.generator.answers import (
    FULL_LEARNING_RATE,
    AnswerObjective,
    EncodedRow,
    ToMessages,
    answer_objective,
    copy_tokenizer,
    encode_splits,
    fit_objective,
    may_pack,
    save,
)
from slmops.train.generator.signals import TeacherTokens, align_teacher_tokens, read_teacher_tokens
from slmops.train.generator.taught import (
    OnlineTeacher,
    Taught,
    TaughtObjective,
    check_layer_map,
    check_losses,
    text_config,
)
from slmops.train.methods import Method, Tuned, learning_rate_of, open_tuned
from slmops.train.student import shallow_copy
from slmops.train.tokens import load_tokenizer

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
    distill: DistillConfig | None = None,
    teacher_folder: Path | None = None,
    signals: Sequence[Path] = (),
    task: str = "student",
    progress: ProgressSink = ignore,
) -> None:
    """Train a language model on the data set's answers (the teacher's, or gold for the untaught baseline).

    With ``distill`` it learns the weighted sum of that section's losses; without, the answers' text alone. ``signals``:
    a folder of token signals for each teacher, where ``distill.cached``. ``teacher_folder``: the first teacher's, which
    stands beside the student where ``distill.online``, and whose tokenizer is needed for ``losses.uld``.

    The student is cut from the model at ``model_folder`` (:func:`shallow_copy`, vocabulary trimmed to the task), or is
    that model whole where the recipe names a student: all of its weights are trained, or by ``train.method`` lora and
    qlora adapters, which are merged in the end.

    Raises:
        DataError: no row has an answer that fits into ``train.max_tokens``; token signals of another tokenizer or of
            other rows.
        ModelError: the teacher's tokens are not the student's where the losses need it; a loss is no number.
        UsageError: ``distill.layer_map`` names a layer that is not there.
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
    from transformers import AutoModelForCausalLM

    method: Method = "full" if cut else train.method or "full"
    tuned = None if cut else open_tuned(model_folder, train, method, AutoModelForCausalLM, task_type="CAUSAL_LM")
    model: Any = shallow_copy(model_folder, kept_ids, student.layers or LAYERS) if tuned is None else tuned.model
    chat = ChatTokenizer.load(draft.path)
    trained: Any = model
    rows = encode_splits(chat, dataset, to_messages, train.max_tokens)
    objective: AnswerObjective
    if distill is not None and (distill.online or distill.cached):
        lessons = _Lessons(distill, dataset, to_messages, train, model_folder, teacher_folder, signals, kept_ids, chat)
        trained, objective = lessons.prepare(model, rows["train"], rows["validation"])
    else:
        objective = answer_objective(model, rows, train)
    history = fit_objective(
        trained,
        objective,
        train,
        epochs=train.epochs or EPOCHS,
        learning_rate=learning_rate_of(train, method, full=LEARNING_RATE if cut else FULL_LEARNING_RATE),
        seed=seed,
        draft=draft,
        task=task,
        progress=progress,
    )
    save(model if tuned is None else merged(tuned, draft), history, draft)


def merged(tuned: Tuned, draft: Draft) -> Any:
    """The whole model that was trained, adapters in its weights."""
    draft.metrics["method"] = tuned.method
    if tuned.method == "full":
        return tuned.model
    adapter = draft.work / "adapter"
    tuned.save_adapter(adapter, "")
    return tuned.whole(adapter)


@dataclass(frozen=True)
class _Lessons:
    """Where the student and its teachers come from; :meth:`prepare` checks that they fit together."""

    distill: DistillConfig
    dataset: Dataset
    to_messages: ToMessages
    train: TrainConfig
    model_folder: Path
    teacher_folder: Path | None
    signals: Sequence[Path]
    kept_ids: tuple[int, ...] | None
    chat: ChatTokenizer

    def prepare(
        self, model: Any, rows: list[EncodedRow], validation_rows: list[EncodedRow]
    ) -> tuple[Any, TaughtObjective]:
        """What is trained (the student, with projections where it needs them), and its objective."""
        distill = self.distill
        weights = distill.weights(closed=False)
        online = self._online(weights) if distill.online else None
        layer_map: dict[int, int] = {}
        if online is not None and weights.keys() & {"hidden", "attention"}:
            layer_map = check_layer_map(distill.layer_map, text_config(model).num_hidden_layers, online.layers)
        if "attention" in weights:
            model.set_attn_implementation("eager")
        trained: Any = model
        if online is not None and "hidden" in weights:
            trained = Taught(model, layer_map, online.hidden_size)
        objective = TaughtObjective(
            rows,
            validation_rows,
            distill,
            teachers=[self._tokens(folder, rows, model, weights) for folder in self.signals] if distill.cached else [],
            online=online,
            layer_map=layer_map,
            eos_ids=self.chat.eos_token_ids,
            packed=online is None and may_pack(model, rows, self.train),
        )
        check_losses(trained, objective)
        return trained, objective

    def _online(self, weights: dict[str, float]) -> OnlineTeacher:
        if self.teacher_folder is None:
            raise ModelError(
                "These losses need the teacher itself: " + ", ".join(sorted(weights)) + ".",
                remedy="Let a local model teach.",
            )
        theirs, ours = tokenizer_digest(self.teacher_folder), tokenizer_digest(self.model_folder)
        if theirs != ours:
            raise ModelError(
                f"The student reads other tokens ({ours[:12]}…) than its teacher ({theirs[:12]}…), and "
                f"{', '.join(sorted(weights.keys() - {'gold'}))} compare token by token.",
                remedy="Choose a student of the teacher's family, or learn by distill.losses.uld.",
            )
        return OnlineTeacher(self.teacher_folder, self.kept_ids, attentions="attention" in weights)

    def _tokens(self, folder: Path, rows: list[EncodedRow], model: Any, weights: dict[str, float]) -> TeacherTokens:
        temperature = self.distill.softness(closed=False)
        digest = tokenizer_digest(self.model_folder)
        same_tokens = SignalHeader.read(folder).tokenizer == digest
        if same_tokens or weights.keys() & set(DISTRIBUTION_LOSSES) or self.teacher_folder is None:
            return read_teacher_tokens(
                folder,
                rows,
                tokenizer_digest=digest,
                kept_ids=self.kept_ids,
                student_vocabulary=model.get_output_embeddings().weight.shape[0],
                temperature=temperature,
                max_tokens=self.train.max_tokens,
            )
        return align_teacher_tokens(
            folder,
            self.dataset,
            rows,
            tokenizer=self.chat,
            teacher_tokenizer=ChatTokenizer.load(self.teacher_folder),
            to_messages=self.to_messages,
            temperature=temperature,
            max_tokens=self.train.max_tokens,
        )
