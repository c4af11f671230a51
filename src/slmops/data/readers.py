"""Files to records, one at a time: csv, tsv, JSON lines, a JSON array, parquet, documents of running text (txt, md);
all but parquet also gzipped.

Guarantees: memory is bounded by one row of at most ``max_row_bytes`` (parquet: by one batch); what comes after a bad
row is still read; every record knows its row, 1-based and counting data rows. Bytes that are not of the named encoding
end the reading with the byte and the row: an encoding is never guessed.
Not covered: csv dialects other than RFC 4180 with commas (tabs in tsv).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, cast

from slmops.errors import DataError

CHUNK_BYTES = 1 << 18
SNIFF_BYTES = 1 << 16
PARQUET_BATCH_ROWS = 512
RAW_CLIP_CHARS = 500
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".ndjson")
SUFFIXES = (*TEXT_SUFFIXES, ".parquet")
DOCUMENT_SUFFIXES = (".txt", ".md")
"""Running text: records of one column, ``text``."""

Documents = Literal["paragraph", "section", "file"]

_STRUCTURE = re.compile(r'["\[\]{},]')
_STRING_END = re.compile(r'[\\"]')
_NOT_CSV_STRUCTURE = re.compile(r'[^",\t\n]+')


@dataclass(frozen=True)
class Record:
    """One data row: its values by column."""

    row: int
    values: Mapping[str, Any]


@dataclass(frozen=True)
class BadRecord:
    """A row that cannot be read, why, and the beginning of it."""

    row: int
    reason: str
    raw: str


@dataclass
class Reading:
    """How a file is read, and what was noticed on the way.

    ``columns``  wanted top-level columns (parquet reads no others), or None for all
    ``header``   columns of the file where it says so itself (csv, parquet); filled when the reading starts
    ``documents``  what one record of a txt or md file is; None: a paragraph of txt, a section of md
    """

    path: Path
    encoding: str = "utf-8"
    max_row_bytes: int = 1_000_000
    columns: Sequence[str] | None = None
    header: tuple[str, ...] | None = None
    documents: Documents | None = None
    warnings: list[str] = field(default_factory=list)


def read_records(reading: Reading) -> Iterator[Record | BadRecord]:
    """Records of one file, in order.

    Raises:
        DataError: no such file, unknown suffix, damaged file, or bytes that are not of the encoding.
    """
    path = reading.path
    name = path.name.lower().removesuffix(".gz")
    if path.is_dir():
        raise DataError(f"{path} is a folder.", remedy="Name a file in it.")
    if not path.is_file():
        raise DataError(f"There is no file {path}.", remedy="Check data.train, data.validation and data.test.")
    if path.stat().st_size == 0:
        raise DataError("The file is empty.", path=path)
    if name.endswith((".csv", ".tsv")):
        return _guarded(reading, _read_csv)
    if name.endswith((".jsonl", ".json", ".ndjson")):
        return _guarded(reading, _read_json)
    if name.endswith(DOCUMENT_SUFFIXES):
        return _guarded(reading, _read_documents)
    if path.name.lower().endswith(".parquet"):
        return _read_parquet(reading)
    raise DataError(
        f"{path} is of no kind that can be read.",
        remedy=f"Kinds: {', '.join((*SUFFIXES, *DOCUMENT_SUFFIXES))}; all but parquet also with .gz.",
    )


def count_records(reading: Reading) -> int:
    """Number of data rows in a file, bad ones included."""
    if reading.path.name.lower().endswith(".parquet"):
        with _parquet(reading.path) as file:
            rows: int = file.metadata.num_rows
            return rows
    return sum(1 for _ in read_records(reading))


# --- text ---------------------------------------------------------------------------------------------------------


class _UndecodableError(Exception):
    def __init__(self, byte: int, value: int) -> None:
        super().__init__(byte)
        self.byte = byte
        self.value = value


@dataclass(frozen=True)
class _Line:
    """A physical line with its end. An ``oversized`` one holds only its beginning and its structure."""

    text: str
    oversized: bool = False


@dataclass
class _Cursor:
    """Rows read so far, so that an error can name the next."""

    row: int = 0


def _guarded(
    reading: Reading, read: Callable[[Reading, IO[bytes], _Cursor], Iterator[Record | BadRecord]]
) -> Iterator[Record | BadRecord]:
    """Turn what can go wrong below a text reader into errors that name file, row and remedy."""
    cursor = _Cursor()
    path = reading.path
    zipped = path.name.lower().endswith(".gz")
    try:
        with _open(path, zipped) as file:
            yield from read(reading, file, cursor)
    except _UndecodableError as error:
        raise DataError(
            f"byte {error.byte} (0x{error.value:02x}) is not {reading.encoding}.",
            path=path,
            row=cursor.row + 1,
            remedy=_encoding_remedy(path, reading.encoding, zipped),
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"The gzip file is damaged: {error}.", path=path, remedy="Fetch or write it again.") from None


def _open(path: Path, zipped: bool) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path)) if zipped else path.open("rb")


def _encoding_remedy(path: Path, encoding: str, zipped: bool) -> str:
    with _open(path, zipped) as file:
        start = file.read(4)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and encoding != "utf-16":
        return "The file begins with a UTF-16 byte order mark. Set data.encoding: utf-16."
    others = [name for name in ("utf-8", "latin-1") if name != encoding]
    return f"Set data.encoding to what the file is in, for example {' or '.join(others)}, or save it as UTF-8."


def _check_start(reading: Reading, start: bytes) -> int:
    """Bytes to skip at the start. Notices byte order marks that contradict the named encoding."""
    utf16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    utf8 = start.startswith(codecs.BOM_UTF8)
    match reading.encoding:
        case "utf-8" if utf8:
            reading.warnings.append(
                f"{reading.path.name} begins with a UTF-8 byte order mark, which was skipped; "
                "data.encoding: utf-8-sig says so."
            )
            return len(codecs.BOM_UTF8)
        case "utf-8" | "utf-8-sig" if not utf16 and start[:200].count(0) > len(start[:200]) / 4:
            raise DataError(
                f"The file is full of NUL bytes: it is not {reading.encoding}.",
                path=reading.path,
                remedy="It may be UTF-16: set data.encoding: utf-16.",
            )
        case "latin-1" if utf8 or utf16:
            mark = "UTF-8" if utf8 else "UTF-16"
            raise DataError(
                f"data.encoding is latin-1, but the file begins with a {mark} byte order mark.",
                path=reading.path,
                remedy=f"Set data.encoding: {'utf-8-sig' if utf8 else 'utf-16'}.",
            )
        case "utf-16" if not utf16 and 0 not in start:
            raise DataError(
                "data.encoding is utf-16, but the file has neither a byte order mark nor a NUL byte.",
                path=reading.path,
                remedy="Set data.encoding: utf-8 or latin-1.",
            )
    return 0


def _text_chunks(reading: Reading, file: IO[bytes]) -> Iterator[str]:
    """The file decoded, in pieces.

    What comes before an undecodable byte is delivered before the error.
    """
    decoder = codecs.getincrementaldecoder(reading.encoding)()
    chunk = file.read(SNIFF_BYTES)
    fed_bytes = _check_start(reading, chunk)
    chunk = chunk[fed_bytes:]
    while True:
        fed_bytes += len(chunk)
        last = not chunk
        try:
            text = decoder.decode(chunk, final=last)
        except UnicodeDecodeError as error:
            yield error.object[: error.start].decode(error.encoding, errors="ignore")
            raise _UndecodableError(fed_bytes - len(error.object) + error.start, error.object[error.start]) from None
        if text:
            yield text
        if last:
            return
        chunk = file.read(CHUNK_BYTES)


def _lines(chunks: Iterator[str], max_chars: int) -> Iterator[_Line]:
    """Physical lines, ended by ``\\n`` (or ``\\r`` in files that have no other).

    A line over ``max_chars`` keeps its first ``max_chars`` characters; of the rest only quotes and commas, by which
    csv finds its end.
    """
    end = ""
    held: list[str] = []
    held_chars, oversized = 0, False

    def hold(piece: str) -> None:
        nonlocal held_chars, oversized
        if oversized:
            piece = _NOT_CSV_STRUCTURE.sub("", piece)
        elif held_chars + len(piece) > max_chars:
            room = max_chars - held_chars
            piece = piece[:room] + _NOT_CSV_STRUCTURE.sub("", piece[room:])
            oversized = True
        held_chars += len(piece)
        held.append(piece)

    for chunk in chunks:
        if not end and ("\n" in chunk or "\r" in chunk[:-1]):
            end = "\n" if "\n" in chunk else "\r"
        first, *rest = chunk.split(end) if end else [chunk]
        hold(first)
        for piece in rest:
            held.append("\n")
            yield _Line("".join(held), oversized)
            held.clear()
            held_chars, oversized = 0, False
            hold(piece)
    if held_chars:
        yield _Line("".join(held), oversized)


def _too_large(text: str, max_bytes: int) -> bool:
    """Whether ``text`` is over ``max_bytes`` in UTF-8; encodes only where the number of characters does not tell."""
    if len(text) * 4 <= max_bytes:
        return False
    return len(text) > max_bytes or len(text.encode("utf-8", "surrogatepass")) > max_bytes


def _oversized(row: int, max_row_bytes: int, raw: str) -> BadRecord:
    return BadRecord(row, f"row is larger than data.max_row_bytes ({max_row_bytes})", raw[:RAW_CLIP_CHARS])


# --- running text -------------------------------------------------------------------------------------------------

_HEADING = re.compile(r" {0,3}#{1,2}(?:[ \t]|$)")
_FENCE = re.compile(r" {0,3}(```|~~~)")


def _read_documents(reading: Reading, file: IO[bytes], cursor: _Cursor) -> Iterator[Record | BadRecord]:
    reading.header = ("text",)
    markdown = reading.path.name.lower().removesuffix(".gz").endswith(".md")
    unit = reading.documents or ("section" if markdown else "paragraph")
    for document in _documents(_lines(_text_chunks(reading, file), reading.max_row_bytes), unit, reading.max_row_bytes):
        cursor.row += 1
        text = document.text.strip()
        if document.oversized or _too_large(text, reading.max_row_bytes):
            yield _oversized(cursor.row, reading.max_row_bytes, text)
        else:
            yield Record(cursor.row, {"text": text})


def _documents(lines: Iterator[_Line], unit: Documents, max_chars: int) -> Iterator[_Line]:
    """Lines joined to documents: paragraphs end at blank lines, sections before headings that have text above them
    since the last one. Of a document over ``max_chars`` its beginning is kept.
    """
    held: list[str] = []
    chars, oversized, body, fenced = 0, False, False, False
    for line in lines:
        blank = not line.text.strip()
        heading = not fenced and _HEADING.match(line.text) is not None
        if _FENCE.match(line.text):
            fenced = not fenced
        if body and (blank if unit == "paragraph" else heading and unit == "section"):
            yield _Line("".join(held), oversized)
            held.clear()
            chars, oversized, body = 0, False, False
        oversized = oversized or line.oversized or chars + len(line.text) > max_chars
        if not oversized or not held:
            held.append(line.text)
        chars += len(line.text)
        body = body or not (blank or (heading and unit == "section"))
    if "".join(held).strip():
        yield _Line("".join(held), oversized)


# --- csv ----------------------------------------------------------------------------------------------------------


@dataclass
class _CsvFeed:
    """Physical lines for the csv module, with the size and beginning of the record being read."""

    lines: Iterator[_Line]
    max_row_bytes: int
    begun: str = ""
    size_chars: int = 0
    oversized: bool = False

    def next_record(self) -> None:
        self.begun, self.size_chars, self.oversized = "", 0, False

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            text = line.text
            self.size_chars += len(text)
            if len(self.begun) < RAW_CLIP_CHARS:
                self.begun += text[:RAW_CLIP_CHARS]
            if self.oversized:
                text = _NOT_CSV_STRUCTURE.sub("", text)
            self.oversized = self.oversized or line.oversized or self.size_chars > self.max_row_bytes
            yield text


def _read_csv(reading: Reading, file: IO[bytes], cursor: _Cursor) -> Iterator[Record | BadRecord]:
    # The csv module's own limit is 128 KiB a field and ends the reading; the feed keeps rows bounded instead.
    csv.field_size_limit(sys.maxsize)
    feed = _CsvFeed(_lines(_text_chunks(reading, file), reading.max_row_bytes), reading.max_row_bytes)
    tabs = reading.path.name.lower().removesuffix(".gz").endswith(".tsv")
    parser = csv.reader(feed, delimiter="\t" if tabs else ",", strict=True)
    header = _csv_header(reading, parser)
    reading.header = tuple(header)
    while True:
        feed.next_record()
        try:
            fields = next(parser)
        except StopIteration:
            return
        except csv.Error as error:
            cursor.row += 1
            if "unexpected end of data" in str(error):
                raise DataError(
                    "A quote is opened here and never closed: the rest of the file is inside it.",
                    path=reading.path,
                    row=cursor.row,
                    remedy='Close it, or double it where it is meant as it is: "".',
                ) from None
            yield BadRecord(cursor.row, f"not csv: {error}", feed.begun[:RAW_CLIP_CHARS])
            continue
        if not fields:  # a blank line
            continue
        cursor.row += 1
        if feed.oversized or (
            sum(map(len, fields)) * 4 > reading.max_row_bytes and _too_large("".join(fields), reading.max_row_bytes)
        ):
            yield _oversized(cursor.row, reading.max_row_bytes, feed.begun)
        elif len(fields) != len(header):
            yield BadRecord(
                cursor.row, f"{len(fields)} columns where the header has {len(header)}", feed.begun[:RAW_CLIP_CHARS]
            )
        elif any("\0" in value for value in fields):
            yield BadRecord(cursor.row, "NUL byte", feed.begun[:RAW_CLIP_CHARS])
        else:
            yield Record(cursor.row, dict(zip(header, fields, strict=True)))


def _csv_header(reading: Reading, parser: Iterator[list[str]]) -> list[str]:
    try:
        header = next((fields for fields in parser if fields), None)
    except csv.Error as error:
        raise DataError(f"The header is not csv: {error}.", path=reading.path) from None
    if header is None:
        raise DataError("The file is empty.", path=reading.path)
    header = [name.strip() for name in header]
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError(
            f"The header names {', '.join(map(repr, twice))} more than once.",
            path=reading.path,
            remedy="Give every column its own name.",
        )
    return header


# --- json ---------------------------------------------------------------------------------------------------------


def _read_json(reading: Reading, file: IO[bytes], cursor: _Cursor) -> Iterator[Record | BadRecord]:
    """JSON lines, or one array: whichever the first character says."""
    chunks = _text_chunks(reading, file)
    first = ""
    for chunk in chunks:
        first += chunk
        if first.strip():
            break
    if not first.strip():
        raise DataError("The file is empty.", path=reading.path)
    whole = _chain(first, chunks)
    if first.lstrip().startswith("["):
        pieces = _array_elements(reading, whole, cursor)
    else:
        pieces = (line for line in _lines(whole, reading.max_row_bytes) if line.oversized or line.text.strip())
    for piece in pieces:
        cursor.row += 1
        yield _json_record(reading, piece, cursor.row)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _json_record(reading: Reading, piece: _Line, row: int) -> Record | BadRecord:
    text = piece.text.strip()
    if piece.oversized or _too_large(text, reading.max_row_bytes):
        return _oversized(row, reading.max_row_bytes, text)
    raw = text[:RAW_CLIP_CHARS]
    if "\0" in text:
        return BadRecord(row, "NUL byte", raw)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRecord(row, f"not JSON: {error.msg}", raw)
    except (RecursionError, ValueError):  # nested too deeply; a number of thousands of digits
        return BadRecord(row, "JSON that cannot be held", raw)
    if not isinstance(values, dict):
        return BadRecord(row, f"a JSON {_json_type(values)} where an object is needed", raw)
    return Record(row, values)


def _json_type(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")


def _array_elements(reading: Reading, chunks: Iterator[str], cursor: _Cursor) -> Iterator[_Line]:
    """Texts of the elements of one JSON array, without reading it whole."""
    depth, in_string = 0, False
    held: list[str] = []
    held_chars = 0
    oversized = False
    skip_to = 0

    def hold(piece: str) -> None:
        nonlocal held_chars, oversized
        room = reading.max_row_bytes - held_chars
        if len(piece) > room:
            oversized = True
        if room > 0 and piece:
            held.append(piece[:room])
            held_chars += len(piece[:room])

    def take() -> _Line | None:
        nonlocal held_chars, oversized
        element = _Line("".join(held), oversized)
        held.clear()
        held_chars, oversized = 0, False
        return element if element.text.strip() else None

    base = 0
    for chunk in chunks:
        start = 0
        position = max(0, skip_to - base)
        while found := (_STRING_END if in_string else _STRUCTURE).search(chunk, position):
            at, character = found.start(), found.group()
            position = at + 1
            if in_string:
                if character == "\\":  # the next character means itself; it may be in the next chunk
                    position += 1
                    skip_to = base + position
                else:
                    in_string = False
            elif character == '"':
                in_string = True
            elif character in "[{":
                depth += 1
                if depth == 1:
                    start = at + 1
            elif character in "]}" or (character == "," and depth == 1):
                if character != ",":
                    depth -= 1
                if character == "," or depth == 0:
                    hold(chunk[start:at])
                    start = at + 1
                    if element := take():
                        yield element
                    if depth == 0:
                        rest = chunk[start:].strip()
                        if rest:
                            raise DataError(
                                "There is more text after the JSON array.", path=reading.path, row=cursor.row + 1
                            )
                        return
        hold(chunk[start:])
        base += len(chunk)
    raise DataError(
        "The JSON array has no end.", path=reading.path, row=cursor.row + 1, remedy="Fetch or write the file again."
    )


# --- parquet ------------------------------------------------------------------------------------------------------


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"This is not a whole parquet file: {error}.", path=path, remedy="Fetch it again.") from None


def _read_parquet(reading: Reading) -> Iterator[Record | BadRecord]:
    row = 0
    with _parquet(reading.path) as file:
        header = tuple(file.schema_arrow.names)
        reading.header = header
        columns = None if reading.columns is None else [name for name in header if name in set(reading.columns)]
        # A nested path whose first step is no column reads nothing; the caller sees the header and says so.
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns or None):
            for values in batch.to_pylist():
                row += 1
                size = sum(len(value) for value in values.values() if isinstance(value, str | bytes))
                if size * 4 > reading.max_row_bytes:
                    size = sum(
                        len(value.encode("utf-8", "surrogatepass")) if isinstance(value, str) else len(value)
                        for value in values.values()
                        if isinstance(value, str | bytes)
                    )
                if size > reading.max_row_bytes:
                    yield _oversized(row, reading.max_row_bytes, _clip(values))
                elif any(isinstance(value, str) and "\0" in value for value in values.values()):
                    yield BadRecord(row, "NUL byte", _clip(values))
                else:
                    yield Record(row, values)


def _clip(values: Mapping[str, Any]) -> str:
    short = {
        name: value[:RAW_CLIP_CHARS] if isinstance(value, str | bytes) else value for name, value in values.items()
    }
    return json.dumps(short, ensure_ascii=False, default=str)[:RAW_CLIP_CHARS]
