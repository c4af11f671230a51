"""Data, teacher, answers, student: the half of a run that learns."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from slmops.artifacts import Artifact, Checkpoint, Dataset, Draft
from slmops.data import prepare, source_digests, stage_config
from slmops.distill import LocalTeacher, OpenAITeacher, ask_teacher, keep_distribution, vary_texts
from slmops.errors import DataError
from slmops.models import check_memory, fetch_hub_dataset, model_facts
from slmops.pipeline.context import Context
from slmops.recipe import recipe_json
from slmops.runtime import open_classifier, open_generator
from slmops.trust import digest_file

ADAPT_KEYS = {"model", "adapt", "adapt_epochs", "adapt_method", "learning_rate", "frozen_share"}
"""What of the teacher's configuration matters for adapting it, and not for asking it."""


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
    asked = recipe.teacher.model_dump(mode="json", exclude={*ADAPT_KEYS, "api_key_env"})
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
        try:
            ask_teacher(
                data,
                recipe.task,
                recipe.teacher,
                asker,
                draft,
                to_messages=context.student_messages if recipe.teacher.adapt and local is not None else None,
                redact=context.redact,
                journal_folder=context.store.root / "answers",
                progress=context.progress,
            )
        finally:
            if local is not None:
                local.close()

    inputs: dict[str, Artifact | str] = {"data": data}
    if teacher is not None:
        inputs["teacher"] = teacher
    return context.stage("answers", Dataset, inputs, {"teacher": asked}, ["slmops.distill", "slmops.data.redact"], ask)


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
    elif recipe.train.engine == "olive":
        from slmops.train.generator.olive import train_with_olive

        build = partial(
            train_with_olive,
            answers,
            model.path,
            context.student_messages,
            recipe.train,
            recipe.seed,
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
        "train": recipe.train.model_dump(mode="json", exclude={"preferences"}),
    }
    return context.stage(
        name,
        Checkpoint,
        {"answers" if taught else "data": answers, "model": model.digest},
        config,
        ["slmops.train.generator.olive", "slmops.train.generator.olive_child", "slmops.models.olive"]
        if recipe.train.engine == "olive"
        else [f"slmops.train.{context.form}.student", "slmops.models.classifier"],
        lambda draft: build(draft=draft),
    )


def check_engines(context: Context) -> None:
    """Refuse what cannot be trained with here, and pairs that cannot be learnt from, before any work is done.

    Raises:
        MissingExtraError: olive-ai, trl or optuna is not installed.
        DataError: there are no pairs, or a bad one; names the row.
    """
    train = context.recipe.train
    if train.engine == "olive":
        from slmops.train.generator.olive import check_olive

        check_olive(quantized=train.method == "qlora")
    if context.recipe.search is not None:
        from slmops.train.search import check_optuna

        check_optuna()
    wanted = context.recipe.train.preferences
    if wanted is None:
        return
    from slmops.train.generator.preferences import check_trl, read_pairs

    read_pairs(Path(wanted.file))
    check_trl()


def make_preferred(context: Context, student: Checkpoint) -> Checkpoint:
    """The student after it has learnt from pairs; itself where the recipe has none."""
    recipe = context.recipe
    wanted = recipe.train.preferences
    if wanted is None:
        return student
    from slmops.train.generator.preferences import learn_preferences

    path = Path(wanted.file)
    return context.stage(
        "preferred",
        Checkpoint,
        {"student": student, "pairs": digest_file(path).sha256},
        {
            "preferences": wanted.model_dump(mode="json", exclude={"file"}),
            "train": recipe.train.model_dump(mode="json", include={"max_tokens", "precision"}),
        },
        ["slmops.train.generator.preferences"],
        lambda draft: learn_preferences(
            student.path,
            path,
            wanted,
            recipe.train,
            context.student_messages,
            recipe.seed,
            draft,
            progress=context.progress,
        ),
    )


def _copy_model(source: Path, draft: Draft) -> None:
    shutil.copytree(source, draft.path, dirs_exist_ok=True)
