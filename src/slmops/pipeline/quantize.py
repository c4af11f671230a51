"""The student in few bits: which rows it is calibrated on, what it learns on the grid, and its export."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Artifact, Checkpoint, Dataset, Draft, Row, Variant
from slmops.distill import language_of
from slmops.errors import RecipeError
from slmops.pipeline.context import Context
from slmops.recipe import QuantizeConfig, Recipe, recipe_json
from slmops.trust import digest_file

logger = logging.getLogger(__name__)

LANGUAGE_ROWS = 50
LANGUAGE_SHARE = 0.5
"""More than this share of the rows surely in one language, and it is the language of all."""


def check_quantize(recipe: Recipe) -> None:
    """Refuse what contradicts itself, from the recipe alone.

    Raises:
        RecipeError: a classifier is to learn on a grid.
    """
    for settings in recipe.compress.quantize:
        if settings.recover is not None and recipe.closed:
            raise RecipeError(
                f"compress.quantize has recover for {settings.variant}, and {recipe.task} has a classifier as its "
                "student, which is not trained on a grid.",
                remedy="Leave recover out; int8 keeps a classifier's answers.",
            )


def check_calibration(context: Context, data: Dataset) -> None:
    """Look at the rows to calibrate on before any work is done; say so where they are in another language.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    compress = context.recipe.compress
    if not any(settings.calibrated for settings in compress.quantize):
        return
    rows = calibration_rows(context, data)
    if compress.calibration.data is None:
        return
    own, given = main_language(list(data.rows("train"))), main_language(rows)
    if own is not None and given is not None and own != given:
        logger.warning(
            "The rows of compress.calibration.data are in another language (%s) than the training rows (%s): what they "
            "make large in the model is not what the task does.",
            given,
            own,
        )


def calibration_rows(context: Context, data: Dataset) -> list[Row]:
    """Rows to calibrate on.

    Raises:
        DataError: there are none, or they cannot be read.
    """
    from slmops.compress.quantize.calibration import read_calibration

    config = context.recipe.compress.calibration
    rows = [row for row in data.rows("train") if row.target is not None or context.recipe.closed]
    return read_calibration(config, rows, context.recipe.seed)


def main_language(rows: Sequence[Row]) -> str | None:
    """ISO 639-1 code of most rows; None where that is not sure."""
    told = [language_of(_words(row)) for row in rows[:LANGUAGE_ROWS]]
    sure = [language for language in told if language is not None]
    most = max(set(sure), key=sure.count, default=None)
    return most if most is not None and sure.count(most) > LANGUAGE_SHARE * len(told) else None


def _words(row: Row) -> str:
    return " ".join([*(message.content for message in row.messages), row.target or ""])


def quantized(context: Context, who: str, checkpoint: Checkpoint, data: Dataset, settings: QuantizeConfig) -> Variant:
    """The checkpoint as ``settings`` say, trained on the grid first where they do.

    Raises:
        DataError: rows to calibrate on cannot be used.
        ConversionError: as :func:`slmops.compress.quantize.export.export_quantized`.
    """
    from slmops.compress.quantize.calibration import token_rows
    from slmops.compress.quantize.export import export_quantized

    recipe = context.recipe
    if settings.recover is not None:
        checkpoint = _on_grid(context, checkpoint, data, settings)
    calibration = recipe.compress.calibration
    inputs: dict[str, Artifact | str] = {"checkpoint": checkpoint}
    if settings.calibrated:
        inputs["rows"] = data if calibration.data is None else digest_file(Path(calibration.data)).sha256

    def build(draft: Draft) -> None:
        rows = []
        if settings.calibrated:
            chosen = calibration_rows(context, data)
            to_messages = None if recipe.closed else partial(_shown, context)
            rows = token_rows(checkpoint.path, chosen, to_messages, recipe.train.max_tokens)
        export_quantized(
            checkpoint.path,
            draft,
            settings,
            rows,
            closed=recipe.closed,
            task=recipe.task,
            name=recipe.name,
            max_tokens=recipe.train.max_tokens,
            system=context.system,
            progress=context.progress,
        )

    return context.stage(
        f"{who}-{settings.variant}",
        Variant,
        inputs,
        {
            "quantize": settings.model_dump(mode="json", exclude={"name", "recover"}),
            "rows": calibration.rows if settings.calibrated else 0,
            "seed": recipe.seed if settings.calibrated else 0,
            "name": recipe.name,
            "max_tokens": recipe.train.max_tokens,
        },
        ["slmops.compress"],
        build,
    )


def _shown(context: Context, row: Row) -> Any:
    """What the student is shown for a row; rows of a file bring their own messages."""
    return context.student_messages(row) if context.recipe.compress.calibration.data is None else row.messages


def _on_grid(context: Context, whole: Checkpoint, data: Dataset, settings: QuantizeConfig) -> Checkpoint:
    """``whole`` trained with its weights on the grid, beside itself as it was."""
    from slmops.models.grid import Grid
    from slmops.train import recover_generator

    recipe, config = context.recipe, settings.recover
    assert config is not None
    grid = Grid(settings.bits, settings.block_size)
    train = recipe.train.model_copy(update={"epochs": config.epochs, "learning_rate": config.learning_rate})

    def build(draft: Draft) -> None:
        recover_generator(
            whole.path,
            whole.path,
            data,
            context.student_messages,
            config,
            train,
            recipe.seed,
            draft,
            grid=grid,
            task=f"train on {settings.bits} bits",
            progress=context.progress,
        )

    return context.stage(
        f"on-grid-{settings.bits}-{settings.block_size}",
        Checkpoint,
        {"whole": whole, "rows": data},
        {
            "recover": config.model_dump(mode="json"),
            "grid": [grid.bits, grid.block_size],
            "train": recipe_json(recipe)["train"] | {"preferences": None, "epochs": None, "learning_rate": None},
        },
        ["slmops.train.generator.recover", "slmops.models.grid"],
        build,
    )
