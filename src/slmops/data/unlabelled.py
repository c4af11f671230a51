"""Texts that nobody has labelled, for a teacher to label: a file's input column, cleaned as the rows are.

Guarantees: no text that repeats a row of the data set, its test and validation splits above all, or an earlier text;
rows that cannot be used are counted, and none of them ends the reading.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from slmops.data.build import ROWS_TO_SEE_COLUMNS, ColumnWatch, RowBuilder, UnusableRowError
from slmops.data.intake import records_of
from slmops.data.readers import BadRecord
from slmops.data.similar import repeats
from slmops.data.sources import FetchHub, Source, resolve_one
from slmops.errors import DataError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import DataConfig, Task

logger = logging.getLogger(__name__)

PROGRESS_EVERY_ROWS = 1000
EXACT_ONLY = 1.0


def unlabelled_source(config: DataConfig, place: str, *, fetch_hub: FetchHub | None = None) -> Source:
    """Where the texts are read from.

    Raises:
        DataError: it is not there.
        RecipeError: it cannot be understood.
    """
    return resolve_one("train", place, fetch_hub, key="distill.unlabelled")


def check_unlabelled(config: DataConfig, task: Task, source: Source) -> None:
    """Look at the first rows, so that a wrong file is known before a teacher is trained.

    Raises:
        DataError: it cannot be read, or lacks a column of ``config.input``.
    """
    builder = _builder(config, task)
    watch: ColumnWatch | None = None
    for reading, record in records_of(source, builder, config.encoding):
        if watch is None:
            watch = ColumnWatch(reading.path, builder.names)
            if reading.header is not None:
                watch.header(reading.header)
        if not isinstance(record, BadRecord):
            watch.see(record.values)
        if record.row >= ROWS_TO_SEE_COLUMNS:
            break
    if watch is not None:
        watch.conclude()


def read_unlabelled(
    config: DataConfig, task: Task, source: Source, known: Sequence[str], *, progress: ProgressSink = ignore
) -> list[str]:
    """The texts of ``source`` that repeat none of ``known`` and none before them, by ``config.input``.

    Raises:
        DataError: nothing usable is left.
    """
    builder = _builder(config, task)
    texts: list[str] = []
    unusable, row = 0, 0
    for _, record in records_of(source, builder, config.encoding):
        row = record.row
        try:
            if isinstance(record, BadRecord):
                raise UnusableRowError(record.reason)
            texts.append(builder.build(record, "", "").content)
        except UnusableRowError:
            unusable += 1
        if row % PROGRESS_EVERY_ROWS == 0:
            progress(Progress(f"reading {source.name}", row))
    again = repeats(texts, known, config.near_duplicates or EXACT_ONLY)
    kept = [text for text, repeated in zip(texts, again, strict=True) if not repeated]
    progress(Progress(f"reading {source.name}", row, row))
    logger.info("%s: %d texts, %d repeated, %d unusable", source.name, len(kept), sum(again), unusable)
    if not kept:
        raise DataError(
            f"None of the {row} rows has a text that is not among the labelled ones already.",
            path=source.files[0],
            remedy="Check data.input against its columns, or leave distill.unlabelled out.",
        )
    return kept


def _builder(config: DataConfig, task: Task) -> RowBuilder:
    """Of the text alone: these rows have no answer, and need no id and no column to be split by."""
    split = config.split.model_copy(update={"stratify": None})
    return RowBuilder.of(config.model_copy(update={"target": None, "id": None, "system": None, "split": split}), task)
