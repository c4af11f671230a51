"""Texts that nobody has labelled, for a teacher to label: a file's input column, cleaned as the rows are.

Guarantees: no text that repeats a row of the data set, its test and validation splits above all, or an earlier text;
rows that cannot be used are counted, and none of them ends the reading.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from slmops.data.build import RowBuilder, UnusableRowError
from slmops.data.intake import records_of
from slmops.data.readers import BadRecord
from slmops.data.similar import repeats
from slmops.data.sources import FetchHub, Source, resolve
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
    [source] = resolve(config.model_copy(update={"train": place, "validation": None, "test": None}), fetch_hub)
    return source


def read_unlabelled(
    config: DataConfig, task: Task, source: Source, known: Sequence[str], *, progress: ProgressSink = ignore
) -> list[str]:
    """The texts of ``source`` that repeat none of ``known`` and none before them, by ``config.input``.

    Raises:
        DataError: nothing usable is left.
    """
    builder = RowBuilder.of(config.model_copy(update={"target": None, "id": None, "system": None}), task)
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
