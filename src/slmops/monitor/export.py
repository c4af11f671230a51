"""Events to Parquet, for whoever wants to look at them with other tools. The one way out of the machine, by hand.

Subjects stay hashes, and their key is not exported. Sketches stay here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from slmops.errors import MissingExtraError, StorageError
from slmops.monitor.log import EventLog, Window

LEFT_OUT = frozenset({"sketch"})


def export_parquet(log: EventLog, folder: Path, window: Window = Window()) -> dict[str, int]:
    """``events.parquet``, ``feedback.parquet`` and ``judgements.parquet`` in ``folder``; rows by file.

    Raises:
        StorageError: the folder cannot be written to.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MissingExtraError("slmops monitor export (it needs pyarrow)", "train") from None
    tables: dict[str, list[dict[str, Any]]] = {
        "events": [{k: v for k, v in row.items() if k not in LEFT_OUT} for row in log.events(window)],
        "feedback": log.feedback(window),
        "judgements": log.judgements(window),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables.items():
            temporary = folder / f".{name}.{time.monotonic_ns()}.tmp"
            pq.write_table(pa.Table.from_pylist(rows, schema=_schema(name, pa)), temporary, compression="zstd")
            temporary.replace(folder / f"{name}.parquet")
    except OSError as error:
        raise StorageError.from_os_error(error, "export to", folder) from None
    return {name: len(rows) for name, rows in tables.items()}


def _schema(name: str, pa: Any) -> Any:
    """Types from the tables, so that a column without values has one too."""
    import sqlalchemy as sa

    from slmops.monitor.schema import metadata

    kinds = {sa.Text: pa.string(), sa.Double: pa.float64(), sa.Integer: pa.int64(), sa.Boolean: pa.bool_()}
    columns = [column for column in metadata.tables[name].columns if column.name not in LEFT_OUT]
    return pa.schema(
        [(column.name, next(t for kind, t in kinds.items() if isinstance(column.type, kind))) for column in columns]
    )
