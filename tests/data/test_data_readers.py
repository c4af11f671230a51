from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pytest

from slmops.data.readers import BadRecord, Reading, Record, count_records, read_records
from slmops.errors import DataError


def read(path: Path, **options: object) -> list[Record | BadRecord]:
    return list(read_records(Reading(path, **options)))  # type: ignore[arg-type]


def values(path: Path, **options: object) -> list[dict[str, object]]:
    records = read(path, **options)
    assert all(isinstance(record, Record) for record in records)
    return [dict(record.values) for record in records if isinstance(record, Record)]


# --- csv ----------------------------------------------------------------------------------------------------------


def test_csv_reads_what_the_csv_module_reads(tmp_path: Path) -> None:
    rng = random.Random(3)
    alphabet = 'ab,"\n\r é😀\u2028\x85'
    rows = [["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for _ in range(3)] for _ in range(300)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["a", "b", "c"], *rows])
    path = tmp_path / "rows.csv"
    path.write_bytes(buffer.getvalue().encode())
    expected = list(csv.reader(io.StringIO(buffer.getvalue(), newline="")))[1:]
    assert expected == rows
    assert [list(row.values()) for row in values(path)] == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_line_ends_and_blank_lines(tmp_path: Path, end: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(f"text,label{end}a,x{end}{end}b,y{end}".encode())
    assert [(r.row, dict(r.values)) for r in read(path) if isinstance(r, Record)] == [
        (1, {"text": "a", "label": "x"}),
        (2, {"text": "b", "label": "y"}),
    ]


def test_tsv(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text('text\tlabel\na, b\tx\n"c\td"\ty\n')
    assert values(path) == [{"text": "a, b", "label": "x"}, {"text": "c\td", "label": "y"}]


def test_ragged_and_malformed_rows_are_set_aside_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\na,x\nb\nc,y,extra\n"d"oops,z\ne,x\n')
    records = read(path)
    assert [r.row for r in records] == [1, 2, 3, 4, 5]
    bad = {r.row: (r.reason, r.raw) for r in records if isinstance(r, BadRecord)}
    assert bad[2] == ("1 columns where the header has 2", "b\n")
    assert bad[3][0] == "3 columns where the header has 2"
    assert bad[4][0].startswith("not csv")
    assert records[-1] == Record(5, {"text": "e", "label": "x"})


def test_nul_bytes_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"text,label\ngood text,x\nb\0d,y\nfine,z\n")
    assert [(r.row, getattr(r, "reason", None)) for r in read(path)] == [(1, None), (2, "NUL byte"), (3, None)]


@pytest.mark.parametrize("quoted", [True, False])
def test_a_row_of_10_mb_is_set_aside_and_the_next_is_read(tmp_path: Path, quoted: bool) -> None:
    path = tmp_path / "rows.csv"
    lines = "\n".join(["lots of, text " * 20] * 40_000)
    long = f'"{lines}"' if quoted else "x" * 10_000_000
    path.write_text(f"text,label\nbefore,x\n{long},y\nafter,z\n")
    before, large, after = read(path)
    assert isinstance(large, BadRecord)
    assert large.row == 2
    assert large.reason == "row is larger than data.max_row_bytes (1000000)"
    assert len(large.raw) == 500
    assert after == Record(3, {"text": "after", "label": "z"})
    assert before.row == 1


def test_fields_over_the_csv_modules_own_limit_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "y" * 400_000 + ",x\n")
    assert len(str(values(path)[0]["text"])) == 400_000


def test_max_row_bytes_counts_bytes(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "é" * 60 + ",x\n" + "e" * 60 + ",x\n", "utf-8")
    assert [type(r) for r in read(path, max_row_bytes=100)] == [BadRecord, Record]


def test_a_quote_that_is_never_closed_names_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text,label\na,x\n"b,y\nc,z\n')
    with pytest.raises(DataError, match=r"rows\.csv, row 2: A quote is opened here and never closed"):
        read(path)


def test_a_column_named_twice(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,text\na,x\n")
    with pytest.raises(DataError, match="'text' more than once"):
        read(path)


# --- encodings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_named_encodings(tmp_path: Path, encoding: str, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    text = "text,label\ncafé,x\n" if suffix == "csv" else '{"text": "café", "label": "x"}\n'
    path.write_bytes(text.encode(encoding))
    assert values(path, encoding=encoding) == [{"text": "café", "label": "x"}]


def test_latin_1_read_as_utf_8_names_row_byte_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    content = "text,label\nfine,x\ncafé,y\n".encode("latin-1")
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"row 2: byte {content.index(0xE9)} (0xe9) is not utf-8" in str(caught.value)
    assert "latin-1" in str(caught.value)


def test_the_byte_is_right_far_into_a_file_and_rows_before_it_are_delivered(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = b"".join(json.dumps({"text": f"row é {n}"}, ensure_ascii=False).encode() + b"\n" for n in range(40_000))
    path.write_bytes(good + b'{"text": "\xff"}\n')
    seen: list[Record | BadRecord] = []
    with pytest.raises(DataError) as caught:
        seen.extend(read_records(Reading(path)))
    assert len(seen) == 40_000
    assert caught.value.row == 40_001
    assert f"byte {len(good) + 10} (0xff)" in str(caught.value)


def test_utf_16_read_as_utf_8_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("text,label\na,x\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"UTF-16 byte order mark\. Set data\.encoding: utf-16"):
        read(path)
    path.write_bytes("text,label\na,x\n".encode("utf-16-le"))
    with pytest.raises(DataError, match=r"full of NUL bytes.*data\.encoding: utf-16"):
        read(path)


def test_utf_8_read_as_utf_16_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x\n")
    with pytest.raises(DataError, match=r"neither a byte order mark nor a NUL byte.*utf-8"):
        read(path, encoding="utf-16")


def test_a_mark_that_contradicts_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x\n", "utf-8-sig")
    with pytest.raises(DataError, match=r"UTF-8 byte order mark.*utf-8-sig"):
        read(path, encoding="latin-1")


def test_a_byte_order_mark_under_utf_8_is_skipped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\na,x\n", "utf-8-sig")
    reading = Reading(path)
    assert [dict(r.values) for r in read_records(reading) if isinstance(r, Record)] == [{"text": "a", "label": "x"}]
    assert "byte order mark" in reading.warnings[0]
    assert "utf-8-sig" in reading.warnings[0]


# --- json ---------------------------------------------------------------------------------------------------------


def test_bad_json_lines_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [
        '{"a": 1}',
        "{bad",
        "",
        "[1, 2]",
        '"text"',
        "7",
        "null",
        '{"a": "x\0y"}',
        '{"a": ' + "9" * 5000 + "}",
        '{"a": 2}',
    ]
    path.write_text("\n".join(lines), "utf-8")
    records = read(path)
    assert records[0] == Record(1, {"a": 1})
    assert records[-1] == Record(9, {"a": 2})
    reasons = [r.reason for r in records if isinstance(r, BadRecord)]
    assert reasons[0].startswith("not JSON: Expecting property name")
    assert [r.split(" ")[2] for r in reasons[1:5]] == ["array", "string", "number", "null"]
    assert reasons[5:] == ["NUL byte", "JSON that cannot be held"]


def test_deeply_nested_json_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + '}\n{"a": 1}\n')
    deep, good = read(path)
    assert isinstance(deep, BadRecord)
    assert good == Record(2, {"a": 1})


def test_a_json_line_of_10_mb_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": "x" * 10_000_000}) + '\n{"a": 1}\n')
    large, good = read(path)
    assert isinstance(large, BadRecord)
    assert good == Record(2, {"a": 1})


@pytest.mark.parametrize("indent", [None, 4])
def test_a_json_array_reads_as_the_json_module_reads_it(tmp_path: Path, indent: int | None) -> None:
    rng = random.Random(5)
    tricky = ['"', "\\", '\\"', "]", "[", "{", "}", ",", "é", "\n", "\\\\"]
    rows = [
        {"text": "".join(rng.choices(tricky, k=8)), "deep": [{"a": [1, [2, {"b": "],{"}]]}], "n": n}
        for n in range(9000)
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), "utf-8")
    assert values(path) == rows
    assert count_records(Reading(path)) == len(rows)


def test_an_array_with_a_large_and_a_wrong_element(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"a": 1}, {"a": "]" * 10_000_000}, 3, {"a": 4}]))
    first, large, number, last = read(path)
    assert first == Record(1, {"a": 1})
    assert isinstance(large, BadRecord)
    assert isinstance(number, BadRecord)
    assert last == Record(4, {"a": 4})


@pytest.mark.parametrize(("text", "problem"), [('[{"a": 1}, {"a"', "no end"), ('[{"a": 1}] x', "more text after")])
def test_damaged_arrays(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=problem):
        read(path)


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(" [ ] \n")
    assert read(path) == []


# --- gzip, parquet, files -------------------------------------------------------------------------------------------


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress(b"text,label\na,x\n"))
    assert values(path) == [{"text": "a", "label": "x"}]
    path.write_bytes(gzip.compress(b"text,label\na,x\n" * 1000)[:-20])
    with pytest.raises(DataError, match="gzip file is damaged"):
        read(path)
    path.write_bytes(b"text,label\n")
    with pytest.raises(DataError, match="gzip file is damaged"):
        read(path)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "rows.parquet"
    texts = [f"text {n}" for n in range(1200)]
    texts[3], texts[4] = "x" * 2_000_000, "nul\0"
    table = pa.table({"text": texts, "n": list(range(1200)), "user": [{"id": n} for n in range(1200)]})
    pq.write_table(table, path)
    reading = Reading(path, columns=("text", "user.id", "user"))
    records = list(read_records(reading))
    assert reading.header == ("text", "n", "user")
    assert records[0] == Record(1, {"text": "text 0", "user": {"id": 0}})
    assert records[-1] == Record(1200, {"text": "text 1199", "user": {"id": 1199}})
    assert {r.row: r.reason[:8] for r in records if isinstance(r, BadRecord)} == {4: "row is l", 5: "NUL byte"}
    assert count_records(reading) == 1200
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="not a whole parquet file"):
        read(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        read(tmp_path / "missing.csv")
    with pytest.raises(DataError, match="is a folder"):
        read(tmp_path)
    other = tmp_path / "rows.xlsx"
    other.write_bytes(b"PK")
    with pytest.raises(DataError, match=r"of no kind that can be read.*\.parquet"):
        read(other)
    for name in ("empty.csv", "empty.jsonl", "empty.parquet"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match="The file is empty"):
            read(tmp_path / name)
