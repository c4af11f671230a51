"""Fine-tuning alone: data → checkpoint, without a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.artifacts import Artifact, Checkpoint, Draft
from slmops.distill import student_messages
from slmops.errors import RecipeError
from slmops.pipeline.context import Context
from slmops.pipeline.teach import OLIVE_CODE, check_engines, make_preferred, prepare_data, text_of
from slmops.progress import ProgressSink, ignore
from slmops.recipe import Recipe
from slmops.store import Store
from slmops.trust import digest_file

if TYPE_CHECKING:
    from torch import Tensor

NOT_IN_THE_RESULT = {"loss", "trackers", "tracking_folder", "processes", "preferences"}
"""What of ``train`` does not decide what is learnt (the loss counts by its file's contents; pairs are learnt after)."""


@dataclass(frozen=True)
class TrainResult:
    """``metrics``: of the checkpoint's manifest. ``reused``: it was found done."""

    checkpoint: Checkpoint
    reused: bool

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self.checkpoint.manifest.metrics


def train_recipe(
    recipe: Recipe,
    store: Store,
    *,
    loss: Callable[..., Tensor] | None = None,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> TrainResult:
    """Fine-tune the recipe's model (``student.model``, else the teacher's) on the gold answers of its data, or on every
    token of its running text (``data.text``).

    ``loss`` replaces ``train.loss``; a function cannot be told from another by its contents, so nothing is reused then.

    Raises:
        SlmopsError: as :func:`slmops.train.finetune`, and what reading data and model raises.
    """
    from slmops.train import FinetuneJob, finetune

    if recipe.data.target is None and recipe.data.messages is None and recipe.data.text is None:
        raise RecipeError(
            "data.target is null: there are no gold answers to train on.",
            remedy="Name their column, or set data.text to learn every token of running text.",
        )
    context = Context(recipe, store, offline, progress)
    check_engines(context)
    if recipe.train.engine == "olive" and loss is not None:
        raise RecipeError("train.engine is olive, which takes no loss of yours.", remedy="Leave one of both out.")
    data = prepare_data(context)
    model = context.named_student or context.base
    train, running = recipe.train, recipe.data.text is not None
    inputs: dict[str, Artifact | str] = {"data": data, "model": model.digest}
    if loss is not None:
        inputs["loss"] = _once(loss)
    elif train.loss is not None:
        file = Path(train.loss.rpartition(":")[0])
        inputs["loss"] = f"{digest_file(file).sha256}:{train.loss.rpartition(':')[2]}" if file.is_file() else train.loss
    if train.forgetting is not None and Path(train.forgetting.data).is_file():
        inputs["general"] = digest_file(Path(train.forgetting.data)).sha256
    settings = train.model_dump(mode="json", exclude=NOT_IN_THE_RESULT)
    if settings["forgetting"]:
        del settings["forgetting"]["data"]

    def build_with_olive(draft: Draft) -> None:
        from slmops.train.generator.olive import train_with_olive

        train_with_olive(
            data,
            model.path,
            context.student_messages,
            train,
            recipe.seed,
            draft,
            task=recipe.name,
            progress=progress,
        )

    def build(draft: Draft) -> None:
        job = FinetuneJob(
            model_folder=model.path,
            base_name=model.source if ":" in model.source else model.path.name,
            base_digest=model.digest,
            dataset=data,
            to_messages=None if recipe.closed or running else partial(student_messages, recipe.task, None),
            train=train,
            seed=recipe.seed,
            draft=draft,
            name=recipe.name,
            loss=loss,
            to_text=text_of if running else None,
            tracking=Path(train.tracking_folder) if train.tracking_folder else store.root / "tracking",
        )
        finetune(job, progress=progress)

    checkpoint = context.stage(
        "finetuned",
        Checkpoint,
        inputs,
        {"train": settings, "running_text": running},
        OLIVE_CODE
        if train.engine == "olive"
        else ["slmops.train.finetune", "slmops.models.classifier", "slmops.models.bottleneck"],
        build_with_olive if train.engine == "olive" else build,
    )
    checkpoint = make_preferred(context, checkpoint)
    return TrainResult(checkpoint, "finetuned" in context.wall_s and context.reused)


def _once(loss: Callable[..., Any]) -> str:
    """An input's name for a function in memory that no other run will have."""
    import uuid

    return f"{getattr(loss, '__qualname__', 'loss')}-{uuid.uuid4().hex}"
