"""Answers of one model or two, put on a form for people, and what people made of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from slmops.errors import DataError, UsageError
from slmops.evaluate.rating_form import FormKind, RatingForm, make_form, write_form
from slmops.evaluate.ratings import Rating, RatingResult, find_key, form_of, judge_ratings, read_ratings
from slmops.pipeline.context import Context
from slmops.pipeline.judge import answers_of, model_folder
from slmops.pipeline.teach import prepare_data
from slmops.progress import ProgressSink, ignore
from slmops.recipe import Recipe
from slmops.store import Store

ROWS = 30


def write_rating_form(
    recipe: Recipe,
    store: Store,
    model: Path,
    page: Path,
    *,
    against: Path | None = None,
    kind: FormKind | None = None,
    rows: int = ROWS,
    offline: bool = False,
    progress: ProgressSink = ignore,
) -> tuple[RatingForm, list[Path]]:
    """Ask ``model`` (and ``against``) ``rows`` of the recipe's test rows, drawn with its seed, and write the form.

    ``kind``: None is pairs where there are two models, else scores.

    Raises:
        UsageError: pairs of one model, or a form that is there already (somebody may be filling it in).
        DataError: no test rows.
        SlmopsError: the rows or a model cannot be read.
    """
    kind = kind or ("scores" if against is None else "pairs")
    if kind == "pairs" and against is None:
        raise UsageError(
            "A form of pairs needs two models.", remedy="Name the other with --against, or --rate-as scores."
        )
    if page.exists():
        raise UsageError(f"There is something at {page} already.", remedy="Name another file with --rate.")
    folders = {"model": model_folder(model)}
    if against is not None:
        folders["against"] = model_folder(against)
    context = Context(recipe, store, offline, progress)
    found = context.test_rows(prepare_data(context))
    if not found:
        raise DataError("The test split has no row with a target.", remedy="Give data.test, or more rows.")
    chosen = sorted(random.Random(recipe.seed).sample(range(len(found)), min(rows, len(found))))
    asked = [found[index] for index in chosen]
    names = _names(model, against)
    answers = {
        name: answers_of(context, name, folder, asked) for name, folder in zip(names, folders.values(), strict=True)
    }
    form = make_form(kind, asked, answers, seed=recipe.seed)
    return form, write_form(form, page)


def _names(model: Path, against: Path | None) -> list[str]:
    """What tells the two apart: their last parts, or their whole paths where those are the same."""
    if against is None:
        return [model.name]
    if model.name != against.name:
        return [model.name, against.name]
    if model == against:
        return [f"{model} (1)", f"{against} (2)"]
    return [str(model), str(against)]


def read_rating_forms(files: Sequence[Path], *, key: Path | None = None, seed: int = 0) -> RatingResult:
    """What all raters of one form said. ``key``: None: looked for beside the first file.

    Raises:
        DataError: files of several forms, no key, or ratings that cannot be read.
    """
    if other := next((path for path in files if form_of(path) != form_of(files[0])), None):
        raise DataError(f"{other} fills in another form than {files[0]}.", remedy="Give the files of one form.")
    found = find_key(files[0], key)
    ratings: list[Rating] = [rating for path in files for rating in read_ratings(path, found)]
    return judge_ratings(ratings, found, seed=seed)
