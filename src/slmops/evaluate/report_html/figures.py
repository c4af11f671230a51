"""What the page tells beside its plots: the four large figures and the rows of its tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slmops.evaluate.report_html import words

MOST_LABELS = 100  # bars of the balance; of more labels the largest and the smallest are shown

Report = Mapping[str, Any]
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """``199× smaller``, and below it what it was and what it is."""

    topic: str
    value: str
    word: str
    before: str
    after: str


def headline(report: Report) -> list[Figure]:
    teacher, student = report["teacher"], report["student"]

    def figure(topic: str, less: str, more: str, shown: Any, read: Any) -> Figure:
        before, after = read(teacher), read(student)
        return Figure(topic, *words.times(before, after, less, more), shown(before), shown(after))

    kept = Figure(
        "Retention",
        words.percent(report["retention"] if teacher["score"]["value"] else None),
        f"of the teacher’s {words.metric_name(report['metric'])}",
        words.percent(teacher["score"]["value"]),
        words.percent(student["score"]["value"]),
    )
    return [
        kept,
        figure("Size on disk", "smaller", "larger", words.size, lambda entry: entry["size_bytes"]),
        figure("Latency, p50", "faster", "slower", words.milliseconds, lambda entry: entry["latency_ms"]["p50"]),
        figure("Peak memory", "less memory", "more memory", words.size, lambda entry: entry["memory_bytes_peak"]),
    ]


def models(report: Report) -> list[Entry]:
    """Teacher, then all variants, then the student, each once."""
    found: dict[str, Entry] = {}
    for entry in (report["teacher"], *report["variants"], report["student"]):
        found.setdefault(entry["id"], entry)
    return list(found.values())


@dataclass(frozen=True)
class Details:
    """Further measures: a row for each model, in the order of ``keys``. None where a model has not been so measured."""

    keys: Sequence[str]
    rows: Mapping[str, Sequence[Any]]


def details(report: Report) -> Details:
    entries = {entry["id"]: entry for entry in models(report)} | dict(report["baselines"])
    values = {name: _details(entry) for name, entry in entries.items()}
    keys = list(dict.fromkeys(key for found in values.values() for key, value in found.items() if value is not None))
    return Details(keys, {name: [found.get(key) for key in keys] for name, found in values.items()})


def _details(entry: Entry) -> dict[str, float | None]:
    """Size and latency of a baseline have columns of their own in the first table."""
    found = {key: value for key, value in entry["metrics"].items() if key not in {"size_bytes", "latency_ms_p50"}}
    if not found.get("unknown_label_rows", 1):
        del found["unknown_label_rows"]
    measured = entry.get("measurement") or {}
    return {
        **found,
        **{key: measured.get(key) for key in ("tokens_per_s", "batch_tokens_per_s")},
        "ttft_ms": (measured.get("ttft_ms") or {}).get("p50"),
        "load_s": measured.get("load_s"),
    }


def measures(report: Report) -> Details:
    """The user's own measures, as ``details``; ``rows`` hold ``{"value", "ci95"}``."""
    entries = {entry["id"]: entry for entry in models(report)} | dict(report["baselines"])
    keys = list(report.get("measures") or ())
    return Details(keys, {name: [entry["measures"][key] for key in keys] for name, entry in entries.items() if keys})


def comparisons(report: Report) -> list[str]:
    """Each paired test of the student in one sentence; against the teacher first."""
    found = {key.removeprefix("student_vs_"): test for key, test in report.get("comparisons", {}).items()}
    others = {name: _other_name(report, name) for name in sorted(found, key=lambda name: name != "teacher")}
    return [words.comparison(found[name], other) for name, other in others.items()]


def _other_name(report: Report, name: str) -> str:
    baseline = report["baselines"].get(name)
    if baseline is None:
        return f"the {name}" if name == "teacher" else name
    return f"“{name}” ({baseline['description']})" if baseline["description"] else f"“{name}”"


def device(report: Report) -> dict[str, Mapping[str, Any]]:
    """Estimates for the budget's device, by model; empty where none was named."""
    return {entry["id"]: entry["on_device"] for entry in models(report) if entry.get("on_device")}


@dataclass(frozen=True)
class Balance:
    """Rows by label and split, the most first. ``left_out`` labels in the middle are not shown."""

    rows: Sequence[tuple[str, Mapping[str, int]]]
    most: int
    left_out: int


def balance(report: Report) -> Balance | None:
    counted = (report.get("data") or {}).get("balance")
    if not counted:
        return None
    rows = sorted(counted.items(), key=lambda pair: (-sum(pair[1].values()), pair[0]))
    left_out = max(0, len(rows) - MOST_LABELS)
    if left_out:
        rows = rows[: MOST_LABELS // 2] + rows[-MOST_LABELS // 2 :]
    return Balance(rows, max(1, sum(rows[0][1].values())), left_out)
