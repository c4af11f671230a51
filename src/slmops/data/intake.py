"""The first pass: every source is read once; rows go to a spill file on disk, decisions' inputs into arrays.

Memory a row: about 60 bytes of arrays, plus ``bands.hashes`` bytes of signature on disk until they are compared.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from slmops.artifacts import Row
from slmops.data.build import Built, ColumnWatch, RowBuilder, UnusableRowError
from slmops.data.dedupe import Columns
from slmops.data.readers import RAW_CLIP_CHARS, BadRecord, Reading, Record, count_records, read_records
from slmops.data.shingles import U8, Bands, signatures
from slmops.data.sources import ROLES, Source, absolute_ranges
from slmops.data.text import fold, hash64, words_only
from slmops.errors import DataError
from slmops.progress import Progress, ProgressSink

BATCH_ROWS = 4096
BATCH_CHARS = 1 << 20
PROGRESS_EVERY_ROWS = 5000
NO_ANSWER = 0
MAX_LABELS = 10_000


@dataclass
class Codes:
    """Numbers for distinct texts, in order of appearance."""

    names: list[str] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def number(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = len(self.names)
            self.names.append(name)
        return number


class Quarantine:
    """``quarantine.jsonl`` as it grows, and the reasons counted."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.reasons: Counter[str] = Counter()

    def add(self, source: str, row: int, reason: str, raw: str) -> None:
        self.reasons[reason] += 1
        line = {"source": source, "row": row, "reason": reason, "raw": raw[:RAW_CLIP_CHARS]}
        # A half surrogate pair cannot be written as UTF-8, and this is where such rows end.
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
        self._file.write(text + "\n")


class Intake:
    """Rows taken in. ``work`` is a folder for the spill; the arrays are read when all is in."""

    def __init__(self, work: Path, quarantine: Quarantine, bands: Bands | None, *, closed: bool) -> None:
        self.spill_path = work / "rows.jsonl"
        self._signature_path = work / "signatures.bin"
        self._spill = self.spill_path.open("wb")
        self._signatures = self._signature_path.open("wb")
        self._quarantine = quarantine
        self._bands = bands
        self._closed = closed
        self._pending: list[str] = []
        self._pending_chars = 0
        self._offset = 0
        self.labels = Codes()
        self.strata = Codes()
        self.read: dict[str, int] = {}
        self.warnings: list[str] = []
        self._ids, self._texts, self._answers, self._offsets = array("Q"), array("Q"), array("Q"), array("Q")
        self._files = array("B")
        self._rows, self._labels, self._strata = array("i"), array("i"), array("i")
        self._chars, self._words, self._answer_chars = array("i"), array("i"), array("i")

    def __len__(self) -> int:
        return len(self._texts)

    def take_source(
        self, source: Source, builder: RowBuilder, progress: ProgressSink, *, prefix_ids: bool, encoding: str
    ) -> None:
        """Read one source to its end.

        Raises:
            DataError: a column that is not there, bytes of another encoding, no usable row.
        """
        before, watch, number = len(self), None, 0
        automatic = f"{source.role}-"
        task = f"reading {source.name}"
        for reading, record in records_of(source, builder, encoding):
            number = record.row
            if watch is None or watch.path != reading.path:
                if watch is not None:
                    watch.conclude()
                watch = ColumnWatch(reading.path, builder.names)
                if reading.header is not None:
                    watch.header(reading.header)
            if isinstance(record, BadRecord):
                self._quarantine.add(source.name, record.row, record.reason, record.raw)
            else:
                watch.see(record.values)
                self._take_record(source, builder, record, f"{automatic}{record.row}", automatic if prefix_ids else "")
            self._note_warnings(reading)
            if number % PROGRESS_EVERY_ROWS == 0:
                progress(Progress(task, number))
        if watch is not None:
            watch.conclude()
        self.read[source.role] = number
        progress(Progress(task, number, number))
        if len(self) == before:
            self._nothing_usable(source, builder, encoding, number)

    def finish(self) -> Taken:
        """Close the spill and give the arrays."""
        self._flush()
        self._spill.close()
        self._signatures.close()
        signed = None
        if self._bands is not None:
            signed = np.fromfile(self._signature_path, dtype=np.uint8).reshape(-1, self._bands.hashes)
            self._signature_path.unlink()
        return Taken(
            spill_path=self.spill_path,
            columns=Columns(
                ids=_numpy(self._ids, np.uint64),
                texts=_numpy(self._texts, np.uint64),
                answers=_numpy(self._answers, np.uint64),
                files=_numpy(self._files, np.uint8),
            ),
            offsets=_numpy(self._offsets, np.uint64),
            rows=_numpy(self._rows, np.int32),
            labels=_numpy(self._labels, np.int32),
            strata=_numpy(self._strata, np.int32),
            chars=_numpy(self._chars, np.int32),
            words=_numpy(self._words, np.int32),
            answer_chars=_numpy(self._answer_chars, np.int32),
            signatures=signed,
            label_names=tuple(self.labels.names),
        )

    def close(self) -> None:
        """Close the files after an error."""
        self._spill.close()
        self._signatures.close()

    def _take_record(
        self, source: Source, builder: RowBuilder, record: Record, automatic_id: str, id_prefix: str
    ) -> None:
        try:
            built = builder.build(record, automatic_id, id_prefix)
        except UnusableRowError as reason:
            raw = json.dumps(record.values, ensure_ascii=False, default=str)
            self._quarantine.add(source.name, record.row, str(reason), raw)
            return
        self._add(built, record.row, ROLES.index(source.role))

    def _add(self, built: Built, row: int, file: int) -> None:
        line = json.dumps(built.row.to_json(), ensure_ascii=False).encode() + b"\n"
        self._spill.write(line)
        folded = fold(built.content)
        target = built.row.target
        self._offsets.append(self._offset)
        self._offset += len(line)
        self._ids.append(hash64(built.row.id))
        self._texts.append(hash64(folded))
        # A closed label counts as written; free text counts folded.
        self._answers.append(NO_ANSWER if target is None else hash64(target if self._closed else fold(target)))
        self._files.append(file)
        self._rows.append(row)
        self._labels.append(self.labels.number(target) if self._closed and target is not None else -1)
        self._strata.append(self.strata.number(built.stratum))
        self._chars.append(len(built.content))
        self._words.append(len(built.content.split()))
        self._answer_chars.append(0 if target is None else len(target))
        if len(self.labels.names) > MAX_LABELS:
            raise DataError(
                f"There are more than {MAX_LABELS} different targets, for example {self.labels.names[0][:60]!r} and "
                f"{self.labels.names[1][:60]!r}: they look like free text, not like labels.",
                remedy="Set data.target to the column of labels, or task: generation.",
            )
        if self._bands is not None:
            self._pending.append(words_only(folded))
            self._pending_chars += len(folded)
            if len(self._pending) >= BATCH_ROWS or self._pending_chars >= BATCH_CHARS:
                self._flush()

    def _flush(self) -> None:
        if self._pending and self._bands is not None:
            self._signatures.write(signatures(self._pending, self._bands.hashes).tobytes())
        self._pending.clear()
        self._pending_chars = 0

    def _note_warnings(self, reading: Reading) -> None:
        if reading.warnings:
            self.warnings.extend(reading.warnings)
            reading.warnings.clear()

    def _nothing_usable(self, source: Source, builder: RowBuilder, encoding: str, rows: int) -> None:
        path = source.files[0]
        if rows == 0:
            raise DataError("The file has no data row.", path=path, remedy=f"Check data.{source.role}.")
        (reason, count), *_ = self._quarantine.reasons.most_common(1)
        raise DataError(
            f"None of the {rows} rows can be used; the most common reason ({count} rows): {reason}.",
            path=path,
            remedy=f"Check data.{source.role}, {', '.join(sorted(set(builder.names.values())))}.",
        )


@dataclass(frozen=True)
class Taken:
    """All rows as arrays ``[rows]``; the rows themselves are lines of ``spill_path`` at ``offsets``.

    ``rows`` are row numbers in their file; ``labels`` numbers in ``label_names``, -1 without; ``signatures`` is
    ``[rows, hashes]``, or None where near-duplicates are not looked for.
    """

    spill_path: Path
    columns: Columns
    offsets: npt.NDArray[np.uint64]
    rows: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    strata: npt.NDArray[np.int32]
    chars: npt.NDArray[np.int32]
    words: npt.NDArray[np.int32]
    answer_chars: npt.NDArray[np.int32]
    signatures: U8 | None
    label_names: tuple[str, ...]

    def compared_text(self, spill: IO[bytes], row: int) -> str:
        """A row's text in the form that similarity compares."""
        spill.seek(int(self.offsets[row]))
        messages = Row.from_json(json.loads(spill.readline())).messages
        return words_only(fold("\n".join(message.content for message in messages if message.role != "system")))


def records_of(source: Source, builder: RowBuilder, encoding: str) -> Iterator[tuple[Reading, Record | BadRecord]]:
    """Records of all files of a source within its slice; rows are numbered through all its files."""
    config = builder.config
    documents = config.documents or (None if source.folder is None else "file")
    readings = [
        Reading(path, encoding, config.max_row_bytes, builder.top_columns, documents=documents) for path in source.files
    ]
    counts = None
    if source.slice is not None and source.slice.needs_total:
        counts = [count_records(reading) for reading in readings]
    start, stop = absolute_ranges(source.slice, counts)
    base = 0
    for reading in readings:
        reading.warnings.clear()
        last = 0
        for record in read_records(reading):
            last = record.row
            row = base + record.row
            if stop is not None and row > stop:
                return
            if row > start:
                yield reading, _renumbered(record, row) if base else record
        base += last


def _renumbered(record: Record | BadRecord, row: int) -> Record | BadRecord:
    if isinstance(record, BadRecord):
        return BadRecord(row, record.reason, record.raw)
    return Record(row, record.values)


def _numpy(values: array[int], dtype: Any) -> Any:
    return np.frombuffer(values, dtype=dtype) if len(values) else np.zeros(0, dtype=dtype)
