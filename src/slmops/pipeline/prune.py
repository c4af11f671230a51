"""Pruning and what is trained after it: between the student as it was trained and its export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Artifact, Checkpoint, Dataset, Draft
from slmops.errors import ModelError, RecipeError
from slmops.pipeline.context import Context
from slmops.pipeline.teach import ask_for_answers, make_preferred, make_student, make_teacher
from slmops.recipe import DistillConfig, PruneConfig, Recipe, RecoverConfig, recipe_json


def make_learnt(
    context: Context, data: Dataset, answers: Dataset, teacher: Checkpoint | None
) -> tuple[Checkpoint, Checkpoint]:
    """The student before it is pruned (the teacher itself, where that is what is pruned), and after; twice the same
    where nothing is."""
    prune = context.recipe.compress.prune
    if prune is not None and prune.of == "teacher":
        assert teacher is not None
        whole = teacher
    else:
        student = make_student(context, "student", answers, taught=True, teacher=teacher, data=data)
        whole = make_preferred(context, student)
    return whole, make_pruned(context, data, answers, whole)


def make_pruned(context: Context, data: Dataset, answers: Dataset, whole: Checkpoint) -> Checkpoint:
    """``whole`` without what the recipe removes, trained again; itself where it removes nothing."""
    from slmops.compress.prune.checkpoint import prune_checkpoint

    recipe, prune = context.recipe, context.recipe.compress.prune
    if prune is None or not prune.removes:
        return whole
    source = data if recipe.closed else answers

    def build(draft: Draft) -> None:
        prune_checkpoint(
            whole.path,
            draft,
            prune,
            list(source.rows("train")),
            further=list(source.rows("validation")),
            to_messages=None if recipe.closed else context.student_messages,
            max_tokens=recipe.train.max_tokens,
            seed=recipe.seed,
            progress=context.progress,
        )

    pruned = context.stage(
        "pruned",
        Checkpoint,
        {"whole": whole, "rows": source},
        {"prune": prune.model_dump(mode="json", exclude={"recover", "of"}), "max_tokens": recipe.train.max_tokens},
        ["slmops.compress.prune", "slmops.models.cut", "slmops.models.vocabulary"],
        build,
    )
    return pruned if prune.recover is None else _recovered(context, data, answers, whole, pruned, prune.recover)


def _recovered(
    context: Context, data: Dataset, answers: Dataset, whole: Checkpoint, pruned: Checkpoint, config: RecoverConfig
) -> Checkpoint:
    from slmops.train import recover_generator, train_classifier_student

    recipe = context.recipe
    inputs: dict[str, Artifact | str] = {"pruned": pruned, "answers": answers}
    train = recipe.train.model_copy(update={"epochs": config.epochs, "learning_rate": config.learning_rate})
    distill = closed_lessons(recipe, config)
    build: Any
    if recipe.closed:
        others: list[Dataset] = []
        for number in range(2, 2 + len(recipe.teachers)):
            others.append(ask_for_answers(context, data, make_teacher(context, data, number), number))
            inputs[f"answers-{number}"] = others[-1]
        build = partial(
            train_classifier_student,
            answers,
            pruned.path,
            recipe.student,
            distill,
            train,
            recipe.seed,
            start=pruned.path,
            others=others,
            task="recover",
            progress=context.progress,
        )
    else:
        inputs["whole"] = whole
        build = partial(
            recover_generator,
            pruned.path,
            whole.path,
            answers,
            context.student_messages,
            config,
            train,
            recipe.seed,
            progress=context.progress,
        )

    def recover(draft: Draft) -> None:
        build(draft=draft)
        kept = pruned.manifest.metrics
        draft.metrics |= {name: value for name, value in kept.items() if name != "parameters"}

    return context.stage(
        "recovered",
        Checkpoint,
        inputs,
        {
            "recover": config.model_dump(mode="json"),
            "distill": distill.model_dump(mode="json") if recipe.closed else None,
            "train": recipe_json(recipe)["train"] | {"preferences": None, "epochs": None, "learning_rate": None},
        },
        ["slmops.train.classifier.student", "slmops.models.classifier"]
        if recipe.closed
        else ["slmops.train.generator.recover"],
        recover,
    )


def closed_lessons(recipe: Recipe, config: RecoverConfig) -> DistillConfig:
    """What a pruned classifier learns from: what the student did, with other weights where the recipe gives some."""
    return recipe.distill if config.losses is None else recipe.distill.model_copy(update={"losses": config.losses})


def check_prune(recipe: Recipe) -> None:
    """Refuse what contradicts itself, from the recipe alone.

    Raises:
        RecipeError: nothing would be removed; the teacher is to be pruned and is not here, or a student is asked for.
    """
    prune = recipe.compress.prune
    if prune is None:
        return
    searched = any(key.startswith("compress.prune.") for key in (recipe.search.space if recipe.search else ()))
    if not prune.removes and not searched:
        raise RecipeError(
            "compress.prune removes nothing.",
            remedy="Give depth, heads, channels, hidden, parameters, vocabulary: trim or sparsity.",
        )
    if prune.of == "student":
        return
    if recipe.teacher.remote:
        raise RecipeError(
            f"compress.prune.of is teacher, and {recipe.teacher.model} is behind a server.",
            remedy="Let a local model teach, or prune the student.",
        )
    if recipe.train.preferences is not None:
        raise RecipeError(
            "compress.prune.of is teacher, and train.preferences is about a student that is not trained then.",
            remedy="Leave one of both out.",
        )
    other = [key for key in (recipe.search.space if recipe.search else ()) if not key.startswith("compress.prune.")]
    if other:
        raise RecipeError(
            f"compress.prune.of is teacher, so no student is trained, and search.space.{other[0]} is about one.",
            remedy="Search keys of compress.prune with search.goal: budget.",
        )


def check_prunable(folder: Path, prune: PruneConfig) -> None:
    """Refuse a model of another family before anything is trained.

    Raises:
        ModelError: the family is not known, or its heads are not grouped evenly.
    """
    if prune.removes:
        from slmops.models.cut import Sizes
        from slmops.models.folder import read_config

        try:
            Sizes.of(read_config(folder))
        except KeyError as error:
            raise ModelError(
                f"{folder / 'config.json'} does not say {error}.", remedy="Fetch the model anew."
            ) from None
