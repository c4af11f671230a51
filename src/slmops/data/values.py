"""Rows of a file as they stand there: for benchmarks, whose rows are nobody's to clean or to split.

Guarantees: the first rows of the source in their order, none left out; a row that cannot be read ends the reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from slmops.data.readers import BadRecord, Reading, count_records, read_records
from slmops.data.sources import FetchHub, Source, absolute_ranges, resolve_one
from slmops.errors import DataError


def values_source(place: str, *, key: str, fetch_hub: FetchHub | None = None) -> Source:
    """Where ``place`` (a file, or ``hf:owner/name@revision[:split[slice]]``) is; ``key``: the recipe's.

    Raises:
        DataError: it is not there.
        RecipeError: it cannot be understood.
    """
    return resolve_one("test", place, fetch_hub, key=key)


def read_values(source: Source, rows: int | None = None) -> list[Mapping[str, Any]]:
    """The first ``rows`` rows (None: all), each its values by column.

    Raises:
        DataError: a row that cannot be read, or none at all.
    """
    found = list(islice(_values(source), rows))
    if not found:
        raise DataError("There is no row in it.", path=source.files[0])
    return found


def _values(source: Source) -> Iterator[Mapping[str, Any]]:
    readings = [Reading(path) for path in source.files]
    needs_total = source.slice is not None and source.slice.needs_total
    start, stop = absolute_ranges(source.slice, [count_records(one) for one in readings] if needs_total else None)
    row = 0
    for reading in readings:
        for record in read_records(reading):
            row += 1
            if stop is not None and row > stop:
                return
            if row <= start:
                continue
            if isinstance(record, BadRecord):
                raise DataError(f"This row cannot be read: {record.reason}.", path=reading.path, row=record.row)
            yield record.values
