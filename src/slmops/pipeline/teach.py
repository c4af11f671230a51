"""Data, teacher, answers, student: the half of a run that learns."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import (
    MANIFEST_NAME,
    ROWS_NAME,
    SPLITS,
    Artifact,
    Checkpoint,
    Curated,
    Dataset,
    Draft,
    Message,
    Row,
    Signals,
)
from slmops.chat import ChatTokenizer, tokenizer_digest
from slmops.data import (
    FetchHub,
    Source,
    check_unlabelled,
    prepare,
    read_unlabelled,
    source_digests,
    stage_config,
    unlabelled_source,
)
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
    keep_token_signals,
    plan_token_signals,
    vary_texts,
)
from slmops.errors import DataError, RecipeError
from slmops.models import LocalModel, check_memory, fetch_hub_dataset, model_facts
from slmops.pipeline.context import Context
from slmops.recipe import DISTRIBUTION_LOSSES, Recipe, TeacherConfig, TrainConfig, recipe_json
from slmops.runtime import open_classifier, open_generator
from slmops.trust import digest_file

ADAPT_KEYS = {"adapt", "adapt_epochs", "adapt_text_epochs", "adapt_method", "learning_rate", "frozen_share"}
"""What of the teacher's configuration matters for adapting it, and not for asking it. Which model: its digest says."""
OLIVE_CODE = [
    "slmops.train.generator.olive",
    "slmops.train.generator.olive_child",
    "slmops.models.olive",
    "slmops.models.confined",
]
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
    if context.data is not None:
        return context.data
    recipe = context.recipe
    fetch = _hub(context)
    return context.stage(
        "data",
        Dataset,
        {**source_digests(recipe.data, fetch_hub=fetch), **_curated(recipe)},
        stage_config(recipe.data, recipe.task, recipe.seed),
        ["slmops.data"],
        lambda draft: prepare(recipe.data, recipe.task, recipe.seed, draft, fetch_hub=fetch, progress=context.progress),
    )


def _curated(recipe: Recipe) -> dict[str, Artifact]:
    """Rows out of feedback by the artifact that holds them, so that a trace leads back to it."""
    files = {role: getattr(recipe.data, role) for role in ("train", "validation", "test")}
    return {
        f"{role}-feedback": Curated.open(Path(file).parent)
        for role, file in files.items()
        if file is not None and Path(file).name == ROWS_NAME and (Path(file).parent / MANIFEST_NAME).is_file()
    }


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


def check_further_texts(context: Context) -> None:
    """Refuse unlabelled texts that cannot be read, before a teacher is trained to label them.

    Raises:
        DataError: the file is not there, cannot be read, or lacks a column.
    """
    source = _unlabelled(context)
    if source is not None:
        check_unlabelled(context.recipe.data, context.recipe.task, source)


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
        if recipe.teacher.adapt_text_epochs:
            check_memory(
                model_facts(context.base.path),
                work=context.adapt_method,
                precision="fp32",
                batch_tokens=recipe.train.max_tokens,
            )


def make_teacher(context: Context, data: Dataset, number: int = 1) -> Checkpoint | None:
    """The local teacher, adapted to the task; None where a server teaches. ``number`` 2 and more: a further one.

    The student itself, on the labels alone, as a further teacher: T. Furlanello et al., "Born Again Neural Networks",
    arXiv:1805.04770.
    """
    from slmops.train import adapt_classifier, adapt_generator, train_linear

    recipe = context.recipe
    config = recipe.teacher if number == 1 else recipe.teachers[number - 2]
    if config.remote:
        return None
    name = _numbered("teacher", number)
    if config.model == "untaught":
        return make_student(context, "untaught", data, taught=False)
    if config.model == "linear":
        return context.stage(
            name,
            Checkpoint,
            {"data": data},
            {"model": config.model, "seed": recipe.seed},
            ["slmops.train.classifier.linear", "slmops.models.linear"],
            lambda draft: train_linear(data, recipe.seed, draft),
        )
    base: LocalModel | Checkpoint = context.base if number == 1 else context.fetch(config.model)
    if config.adapt_text_epochs:
        base = read_own_texts(context, data, config, base, number)
    if not config.adapt:
        return context.stage(
            name,
            Checkpoint,
            {"model": base.digest},
            {},
            ["slmops.models"],
            lambda draft: _copy_model(base.path, draft),
        )
    adapt: Callable[[Draft], None]
    if recipe.closed:
        adapt = partial(
            adapt_classifier,
            base.path,
            data,
            config,
            recipe.train,
            recipe.seed,
            progress=context.progress,
        )
    else:
        adapt = partial(
            adapt_generator,
            base.path,
            data,
            context.student_messages,
            config,
            recipe.train,
            recipe.seed,
            progress=context.progress,
        )
    return context.stage(
        name,
        Checkpoint,
        {"data": data, "model": base.digest},
        {
            "teacher": config.model_dump(mode="json", include=ADAPT_KEYS),
            "train": recipe.train.model_dump(mode="json", include={"batch_size", "max_tokens", "precision"}),
        },
        [f"slmops.train.{context.form}.teacher", "slmops.models.classifier"],
        lambda draft: adapt(draft=draft),
    )


def read_own_texts(
    context: Context, data: Dataset, config: TeacherConfig, base: LocalModel | Checkpoint, number: int
) -> Checkpoint:
    """``base`` after it has read the texts of the training rows, and those that nobody labelled, as running text.

    No text of the test rows is among them; the validation rows' texts tell how well it went.
    """
    from slmops.train import FinetuneJob, finetune

    recipe = context.recipe
    unlabelled = _unlabelled(context)
    inputs: dict[str, Artifact | str] = {"data": data, "model": base.digest}
    if unlabelled is not None:
        inputs["unlabelled"] = unlabelled.digest()
    train = TrainConfig(
        method=config.adapt_method or ("full" if recipe.closed else "lora"),
        epochs=config.adapt_text_epochs,
        **recipe.train.model_dump(include={"batch_size", "max_tokens", "precision", "accumulation"}),
    )

    def read(draft: Draft) -> None:
        more = [] if unlabelled is None else _further_texts(context, data, unlabelled)
        job = FinetuneJob(
            model_folder=base.path,
            base_name=Path(config.model).name,
            base_digest=base.digest,
            dataset=data,
            to_messages=None,
            train=train,
            seed=recipe.seed,
            draft=draft,
            name="read texts",
            to_text=text_of if recipe.closed else conversation_of,
            more_texts=more,
            judged="validation",
        )
        finetune(job, progress=context.progress)

    return context.stage(
        _numbered("texts", number),
        Checkpoint,
        inputs,
        {"train": train.model_dump(mode="json", exclude={"accumulation"})}
        | ({"input": recipe.data.input, "near_duplicates": recipe.data.near_duplicates} if unlabelled else {}),
        ["slmops.train.finetune", "slmops.data.unlabelled"],
        read,
    )


def text_of(row: Row) -> str:
    """A row's text alone."""
    return row.text


def conversation_of(row: Row) -> str:
    """A row's turns and its answer, one below the other, as nobody's in particular."""
    said = [message.content for message in row.messages if message.role != "system"]
    return "\n\n".join([*said, *([row.target] if row.target else [])])


def _unlabelled(context: Context) -> Source | None:
    recipe = context.recipe
    if recipe.distill.unlabelled is None:
        return None
    return unlabelled_source(recipe.data, recipe.distill.unlabelled, fetch_hub=_hub(context))


def _further_texts(context: Context, data: Dataset, source: Source) -> list[str]:
    """Texts that repeat no row of any split."""
    recipe = context.recipe
    known = [row.text for split in SPLITS for row in data.rows(split)]
    return read_unlabelled(recipe.data, recipe.task, source, known, progress=context.progress)


def ask_for_answers(context: Context, data: Dataset, teacher: Checkpoint | None, number: int = 1) -> Dataset:
    """What the teacher says to the rows. ``number`` 2 and more: of the further ones (closed label sets)."""
    recipe = context.recipe
    asked = asked_config(context)
    inputs: dict[str, Artifact | str]
    if teacher is not None and recipe.closed:
        transfer_rows, states = recipe.distill.transfer_rows, number == 1 and recipe.distill.losses.hidden != 0
        inputs = {"data": data, "teacher": teacher}
        unlabelled = _unlabelled(context)
        if unlabelled is not None:
            inputs["unlabelled"] = unlabelled.digest()

        def keep(draft: Draft) -> None:
            texts = [row.text for row in data.rows("train")]
            further = vary_texts(texts, rows_each=transfer_rows, seed=recipe.seed)
            if unlabelled is not None:
                further += _further_texts(context, data, unlabelled)
            keep_distribution(
                data,
                open_classifier(teacher.path),
                draft,
                extra_texts=further,
                states=states,
                progress=context.progress,
            )

        return context.stage(
            _numbered("answers", number),
            Dataset,
            inputs,
            {"transfer_rows": transfer_rows, "states": states}
            | ({"input": recipe.data.input, "near_duplicates": recipe.data.near_duplicates} if unlabelled else {}),
            ["slmops.distill.distribution", "slmops.distill.transfer", "slmops.data.unlabelled"],
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

    inputs = {"data": data}
    if teacher is not None:
        inputs["teacher"] = teacher
    code = ["slmops.distill", "slmops.privacy.redact", "slmops.data.similar"]
    return context.stage("answers", Dataset, inputs, {"teacher": asked}, code, ask)


def asked_config(context: Context) -> dict[str, Any]:
    """What of the teacher's configuration its answers depend on. The identity of a local one is its digest."""
    asked = context.recipe.teacher.model_dump(mode="json", exclude={*ADAPT_KEYS, *MEANS_KEYS})
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


def check_signals(context: Context) -> None:
    """Refuse signals that cannot be had, and adapters that do not fit the student, before any work is done.

    Raises:
        RecipeError: the task or the teacher does not show what a loss needs.
        ModelError: a rank larger than a matrix of the student, or ``train.lora.targets`` that it has not.
        UsageError: ``distill.layer_map`` names a layer that is not there.
    """
    recipe, distill = context.recipe, context.recipe.distill
    weights = distill.weights(closed=recipe.closed)
    if problem := impossible_signals(recipe):
        raise problem
    if learns_by_adapters(recipe) and context.named_student is not None:
        from slmops.train.methods import check_lora

        check_lora(context.named_student.path, recipe.train.lora)
    if recipe.closed or not (distill.online or distill.cached):
        return
    student = context.named_student or context.base
    teachers = [context.base, *(context.fetch(teacher.model) for teacher in recipe.teachers)]
    compared = weights.keys() - {"gold", "uld"}
    if compared or distill.on_policy_share:
        ours = tokenizer_digest(student.path)
        for teacher in teachers:
            if tokenizer_digest(teacher.path) != ours:
                raise RecipeError(
                    f"distill.losses.{min(compared or {'uld'})} compares token by token, but the tokenizer of the "
                    "teacher is not the student's.",
                    remedy="Choose a student of the teacher's family, or learn by distill.losses.uld.",
                )
    if weights.keys() & {"hidden", "attention"}:
        from slmops.train.generator.student import LAYERS
        from slmops.train.generator.taught import check_layer_map

        facts = model_facts(student.path)
        layers = facts.layers if context.named_student else recipe.student.layers or LAYERS
        check_layer_map(distill.layer_map, layers, model_facts(context.base.path).layers)


def impossible_signals(recipe: Recipe) -> RecipeError | None:
    """Why the recipe's signals cannot be had, from the recipe alone; None where they can."""
    distill = recipe.distill
    weights = distill.weights(closed=recipe.closed)
    if not weights and not (recipe.closed and distill.losses.hidden is None):
        return RecipeError("All of distill.losses are 0 for this task, so nothing would be learnt.")
    read = recipe.teacher.adapt_text_epochs > 0 or any(one.adapt_text_epochs for one in recipe.teachers)
    if distill.unlabelled is not None and not read and (recipe.teacher.remote or not recipe.closed):
        return RecipeError(
            f"distill.unlabelled is {distill.unlabelled}, but "
            + ("a teacher behind a server" if recipe.teacher.remote else f"the teacher of {recipe.task}")
            + " does not give its distribution over the labels.",
            remedy="Let a local model teach a closed label set, or read them (teacher.adapt_text_epochs); or give the "
            "texts as data.train, data.target: null.",
        )
    if recipe.teachers and any(teacher.remote for teacher in (recipe.teacher, *recipe.teachers)):
        return RecipeError(
            "Several teachers are given, and one of them is behind a server.",
            remedy="Several teachers have to be local models: name one, or local ones alone.",
        )
    if recipe.closed:
        if recipe.teacher.remote and "hidden" in weights:
            return RecipeError(
                f"distill.losses.hidden is {weights['hidden']}, but a teacher behind a server does not show its hidden "
                "states.",
                remedy="Leave it out, or let a local model teach.",
            )
        for name in ("attention", "uld"):
            if name in weights:
                return RecipeError(
                    f"distill.losses.{name} is {weights[name]}, but it compares tokens, and the answer to "
                    f"{recipe.task} is one label.",
                    remedy="Leave it out: forward_kl, reverse_kl, jsd and hidden work for closed label sets.",
                )
        if distill.on_policy_share or distill.layer_map is not None:
            name = "on_policy_share" if distill.on_policy_share else "layer_map"
            return RecipeError(
                f"distill.{name} is for open tasks, and the task is {recipe.task}.", remedy="Leave it out."
            )
        return None
    if recipe.train.engine == "olive" and (distill.online or distill.cached):
        return RecipeError(
            "train.engine is olive, which learns from the answers' text alone, and distill asks for what the teacher "
            "thinks of each token.",
            remedy="Leave train.engine out, or all of distill.losses but gold, and distill.on_policy_share.",
        )
    if distill.on_policy_share and not weights.keys() & set(DISTRIBUTION_LOSSES):
        return RecipeError(
            f"distill.on_policy_share is {distill.on_policy_share}, but no loss judges what the student writes.",
            remedy="Give distill.losses.reverse_kl, forward_kl or jsd a weight.",
        )
    if "uld" in weights and distill.online:
        return RecipeError(
            "distill.losses.uld reads what the teacher left on disk, and other settings put the teacher beside the "
            "student.",
            remedy="Leave out hidden, attention and on_policy_share, and give distill.top_k.",
        )
    if recipe.teachers and (distill.online or not distill.cached):
        return RecipeError(
            "Several teachers are given, but they teach an open task by what they left on disk alone.",
            remedy="Give distill.losses.forward_kl a weight; leave out hidden, attention and on_policy_share.",
        )
    if recipe.teacher.remote and (distill.online or distill.cached):
        return RecipeError(
            f"distill.losses has {', '.join(sorted(weights.keys() - {'gold'}))}, but a teacher behind a server does "
            "not show what it thinks of each token.",
            remedy="Leave it out, or let a local model teach.",
        )
    return None


def keep_signals(context: Context, answers: Dataset, teacher: Checkpoint, number: int = 1) -> Signals:
    """What the teacher thinks of each token of the answers, on disk."""
    from slmops.runtime.token_teacher import TokenTeacher

    recipe, distill = context.recipe, context.recipe.distill
    top_k, temperature = distill.top_k or 0, distill.softness(closed=False)

    def keep(draft: Draft) -> None:
        plan = plan_token_signals(
            answers,
            ChatTokenizer.load(teacher.path),
            context.student_messages,
            tokenizer_digest=tokenizer_digest(teacher.path),
            vocabulary=model_facts(teacher.path).vocab_size,
            top_k=top_k,
            temperature=temperature,
            max_tokens=recipe.train.max_tokens,
        )
        precision = recipe.train.precision
        keep_token_signals(
            plan, lambda: TokenTeacher(teacher.path, precision=precision), draft, progress=context.progress
        )

    return context.stage(
        _numbered("signals", number),
        Signals,
        {"answers": answers, "teacher": teacher},
        {
            "top_k": top_k,
            "temperature": temperature,
            "max_tokens": recipe.train.max_tokens,
            "precision": recipe.train.precision,
        },
        [
            "slmops.distill.token_signals",
            "slmops.runtime.token_teacher",
            "slmops.models.scaled_logits",
            "slmops.artifacts.token_signals",
        ],
        keep,
    )


def make_student(
    context: Context,
    name: str,
    answers: Dataset,
    *,
    taught: bool,
    teacher: Checkpoint | None = None,
    data: Dataset | None = None,
) -> Checkpoint:
    """A student of the answers. ``teacher`` and ``data``: what further signals are made of."""
    from slmops.train import train_classifier_student, train_generator_student

    recipe = context.recipe
    model = context.named_student or context.base
    inputs: dict[str, Artifact | str] = {"answers" if taught else "data": answers, "model": model.digest}
    build: Callable[[Draft], None]
    if recipe.closed:
        others: list[Dataset] = []
        start = context.start if taught else None
        if start is not None:
            inputs["start"] = start
        if taught and data is not None:
            for number in range(2, 2 + len(recipe.teachers)):
                others.append(ask_for_answers(context, data, make_teacher(context, data, number), number))
                inputs[f"answers-{number}"] = others[-1]
        build = partial(
            train_classifier_student,
            answers,
            model.path,
            recipe.student,
            recipe.distill if taught else None,
            recipe.train,
            recipe.seed,
            named_model=context.named_student.path if context.named_student else None,
            start=start.path if start else None,
            others=others,
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
        distill = recipe.distill if taught and teacher is not None else None
        signals: list[Signals] = []
        if distill is not None and teacher is not None and data is not None:
            if distill.online:
                inputs["teacher"] = teacher
            for number in range(1, 2 + len(recipe.teachers)) if distill.cached else ():
                one = teacher if number == 1 else make_teacher(context, data, number)
                if one is not None:
                    signals.append(keep_signals(context, answers, one, number))
                    inputs[_numbered("signals", number)] = signals[-1]
        build = partial(
            train_generator_student,
            answers,
            model.path,
            context.student_messages,
            recipe.student,
            recipe.train,
            recipe.seed,
            distill=distill,
            teacher_folder=None if teacher is None else teacher.path,
            signals=[one.path for one in signals],
            task=name,
            progress=context.progress,
        )
    config = {
        # Which model it is says its digest among the inputs; where it lies changes nothing.
        "student": {**recipe_json(recipe)["student"], "model": recipe.student.model is not None},
        "distill": recipe.distill.model_dump(mode="json") if taught else None,
        "train": recipe.train.model_dump(mode="json", exclude={"preferences"}),
    }
    return context.stage(
        name,
        Checkpoint,
        inputs,
        config,
        OLIVE_CODE
        if recipe.train.engine == "olive"
        else [f"slmops.train.{context.form}.student", "slmops.models.classifier"],
        lambda draft: build(draft=draft),
    )


def learns_by_adapters(recipe: Recipe) -> bool:
    """Whether a run's student is a whole named model that is taught through LoRA or QLoRA, merged in the end."""
    named = recipe.student.model is not None and not recipe.closed and recipe.train.engine == "slmops"
    return named and recipe.train.method in ("lora", "qlora")


def _hub(context: Context) -> FetchHub:
    return partial(fetch_hub_dataset, offline=context.offline)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


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
    elif learns_by_adapters(context.recipe) and train.method == "qlora":
        from slmops.train.quantized_base import check_bitsandbytes

        check_bitsandbytes()
    if context.recipe.search is not None and context.recipe.search.goal == "loss":
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
