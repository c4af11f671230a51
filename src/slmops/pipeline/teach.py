"""Data, teacher, answers, student: the half of a run that learns."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Artifact, Checkpoint, Dataset, Draft, Message, Row
from slmops.data import prepare, source_digests, stage_config
from slmops.data.similar import repeats
from slmops.distill import (
    Estimate,
    LocalTeacher,
    OpenAITeacher,
    TextTeacher,
    ask_teacher,
    estimate,
    judge_config,
    keep_distribution,
    vary_texts,
)
from slmops.errors import DataError
from slmops.models import check_memory, fetch_hub_dataset, model_facts
from slmops.pipeline.context import Context
from slmops.recipe import recipe_json
from slmops.runtime import open_classifier, open_generator

ADAPT_KEYS = {"model", "adapt", "adapt_epochs", "adapt_method", "learning_rate", "frozen_share"}
"""What of the teacher's configuration matters for adapting it, and not for asking it."""
ANSWERS_FOLDER = "answers"
MEANS_KEYS = {
    "api_key_env",
    "concurrency",
    "timeout_s",
    "time_limit_s",
    "retries",
    "budget_tokens",
    "budget_money",
    "prices",
}
"""What matters for how it is asked, and not for what it answers: other limits do no work again."""


def prepare_data(context: Context) -> Dataset:
    recipe = context.recipe
    fetch = partial(fetch_hub_dataset, offline=context.offline)
    return context.stage(
        "data",
        Dataset,
        source_digests(recipe.data, fetch_hub=fetch),
        stage_config(recipe.data, recipe.task, recipe.seed),
        ["slmops.data"],
        lambda draft: prepare(recipe.data, recipe.task, recipe.seed, draft, fetch_hub=fetch, progress=context.progress),
    )


def check_judgeable(context: Context, data: Dataset) -> None:
    """Refuse data that could teach but not tell how well it was learnt.

    Raises:
        DataError: no test row has an answer.
    """
    if not context.test_rows(data):
        raise DataError(
            "No row of the test split has an answer that a model could be judged by.",
            path=data.path,
            remedy="Set data.target, or give data.test rows with answers.",
        )


def check_fits(context: Context) -> None:
    """Refuse work that cannot fit in memory, before any of it is done."""
    recipe = context.recipe
    if not recipe.teacher.remote and recipe.teacher.adapt:
        check_memory(
            model_facts(context.base.path),
            work=context.adapt_method,
            precision="fp32",
            batch_tokens=1024 if recipe.closed else 2048,
            logit_tokens=64 if recipe.closed else None,
        )


def make_teacher(context: Context, data: Dataset) -> Checkpoint | None:
    """The local teacher, adapted to the task; None where a server teaches."""
    from slmops.train import adapt_classifier, adapt_generator

    recipe = context.recipe
    if recipe.teacher.remote:
        return None
    if not recipe.teacher.adapt:
        return context.stage(
            "teacher",
            Checkpoint,
            {"model": context.base.digest},
            {},
            ["slmops.models"],
            lambda draft: _copy_model(context.base.path, draft),
        )
    adapt: Callable[[Draft], None]
    if recipe.closed:
        adapt = partial(
            adapt_classifier,
            context.base.path,
            data,
            recipe.teacher,
            recipe.train,
            recipe.seed,
            progress=context.progress,
        )
    else:
        adapt = partial(
            adapt_generator,
            context.base.path,
            data,
            context.student_messages,
            recipe.teacher,
            recipe.train,
            recipe.seed,
            progress=context.progress,
        )
    return context.stage(
        "teacher",
        Checkpoint,
        {"data": data, "model": context.base.digest},
        {
            "teacher": recipe.teacher.model_dump(mode="json", include=ADAPT_KEYS),
            "train": recipe.train.model_dump(mode="json", include={"batch_size", "max_tokens", "precision"}),
        },
        [f"slmops.train.{context.form}.teacher", "slmops.models.classifier"],
        lambda draft: adapt(draft=draft),
    )


def ask_for_answers(context: Context, data: Dataset, teacher: Checkpoint | None) -> Dataset:
    recipe = context.recipe
    asked = asked_config(context)
    if teacher is not None and recipe.closed:
        transfer_rows, states = recipe.distill.transfer_rows, recipe.distill.losses.hidden != 0

        def keep(draft: Draft) -> None:
            texts = [row.text for row in data.rows("train")]
            keep_distribution(
                data,
                open_classifier(teacher.path),
                draft,
                extra_texts=vary_texts(texts, rows_each=transfer_rows, seed=recipe.seed),
                states=states,
                progress=context.progress,
            )

        return context.stage(
            "answers",
            Dataset,
            {"data": data, "teacher": teacher},
            {"transfer_rows": transfer_rows, "states": states},
            ["slmops.distill.distribution", "slmops.distill.transfer"],
            keep,
        )

    def ask(draft: Draft) -> None:
        local = None if teacher is None else open_generator(teacher.path, threads=recipe.evaluate.threads)
        asker = (
            OpenAITeacher(recipe.teacher, seed=recipe.seed)
            if local is None
            else LocalTeacher(local, identity=teacher.digest if teacher else "")
        )
        judged_by = judge_config(recipe.teacher)
        judge: TextTeacher | None = None
        if judged_by is not None and judged_by.remote:
            judge = OpenAITeacher(judged_by, seed=recipe.seed)
        try:
            ask_teacher(
                data,
                recipe.task,
                recipe.teacher,
                asker,
                draft,
                judge=judge,
                to_messages=_shown(context),
                redact=context.redact,
                repeats=repeats,
                seed=recipe.seed,
                journal_folder=context.store.root / ANSWERS_FOLDER,
                progress=context.progress,
            )
        finally:
            if local is not None:
                local.close()

    inputs: dict[str, Artifact | str] = {"data": data}
    if teacher is not None:
        inputs["teacher"] = teacher
    code = ["slmops.distill", "slmops.data.redact", "slmops.data.similar"]
    return context.stage("answers", Dataset, inputs, {"teacher": asked}, code, ask)


def asked_config(context: Context) -> dict[str, Any]:
    """What of the teacher's configuration its answers depend on. The identity of a local one is its digest."""
    asked = context.recipe.teacher.model_dump(mode="json", exclude={*ADAPT_KEYS, *MEANS_KEYS} - {"model"})
    if not context.recipe.teacher.remote:
        del asked["model"]
    if asked["judge"] is not None:
        asked["judge"] = {key: value for key, value in asked["judge"].items() if key not in MEANS_KEYS}
    return asked


def estimate_answers(context: Context, data: Dataset) -> Estimate | None:
    """What asking a text teacher would take; None where a local one gives its distribution over the labels.

    Nothing is asked and no model is fetched: a local teacher's answers of earlier runs are not known here.
    """
    recipe = context.recipe
    if recipe.closed and not recipe.teacher.remote:
        return None
    identity = OpenAITeacher(recipe.teacher).identity if recipe.teacher.remote else "not yet there"
    return estimate(
        data,
        recipe.task,
        recipe.teacher,
        identity=identity,
        to_messages=_shown(context),
        redact=context.redact,
        journal_folder=context.store.root / ANSWERS_FOLDER,
    )


def _shown(context: Context) -> Callable[[Row], tuple[Message, ...]] | None:
    """What a teacher that was adapted is shown; None for one that has to be told the form of the answer."""
    teacher = context.recipe.teacher
    return context.student_messages if teacher.adapt and not teacher.remote else None


def make_student(context: Context, name: str, answers: Dataset, *, taught: bool) -> Checkpoint:
    from slmops.train import train_classifier_student, train_generator_student

    recipe = context.recipe
    model = context.named_student or context.base
    build: Callable[[Draft], None]
    if recipe.closed:
        build = partial(
            train_classifier_student,
            answers,
            model.path,
            recipe.student,
            recipe.distill if taught else None,
            recipe.train,
            recipe.seed,
            named_model=context.named_student.path if context.named_student else None,
            task=name,
            progress=context.progress,
        )
    else:
        build = partial(
            train_generator_student,
            answers,
            model.path,
            context.student_messages,
            recipe.student,
            recipe.train,
            recipe.seed,
            task=name,
            progress=context.progress,
        )
    config = {
        "student": recipe_json(recipe)["student"],
        "distill": recipe.distill.model_dump(mode="json") if taught else None,
        "train": recipe.train.model_dump(mode="json"),
    }
    return context.stage(
        name,
        Checkpoint,
        {"answers" if taught else "data": answers, "model": model.digest},
        config,
        [f"slmops.train.{context.form}.student", "slmops.models.classifier"],
        lambda draft: build(draft=draft),
    )


def _copy_model(source: Path, draft: Draft) -> None:
    shutil.copytree(source, draft.path, dirs_exist_ok=True)
