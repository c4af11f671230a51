"""Restaurant8k to JSON: slot F1 and valid JSON of a 135 M teacher and of its student of at most a quarter of that.

A row is what the guest said, with what was asked for where that is known; its answer is one JSON object of the slots'
texts. The whole recipe runs: adapt the teacher, let it answer, keep its token probabilities, train, compress, measure.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import check, data_file, mean, report_of, spread

SEEDS = (0,)
ROWS, QUICK_ROWS = 2400, 60
TEST_ROWS, QUICK_TEST_ROWS = 300, 6
LARGEST_SHARE = 0.25
Report = Mapping[str, Any]


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    path = options.store.resolve() / "extraction" / "rows.jsonl"
    write_rows(Path(data_file(options, "restaurant8k/train_0.json")), path)
    reports = [report_of(options, recipe(path, seed, quick=quick)) for seed in SEEDS]
    kept = [report["retention"] for report in reports]
    shares = [size(report["student"]) / size(report["teacher"]) for report in reports]
    checks = [
        check("quarter of the teacher's parameters to spare", [LARGEST_SHARE - share for share in shares], 0),
        check("student's slot F1", [f1(report["student"]) for report in reports], 0),
        check("student's valid JSON", [valid(report["student"]) for report in reports], 0.95),
    ]
    return {
        "ours": figures(reports[0]["student"]),
        "peer": figures(reports[0]["teacher"]),
        "baselines": {name: f1(entry) for name, entry in reports[0]["baselines"].items()},
        "ratio": mean(kept),
        "spread": spread(kept),
        "target": f"valid JSON, at most {LARGEST_SHARE:.0%} of the parameters",
        "passed": quick or all(one["passed"] for one in checks),
        "checks": checks,
        "variants": [{"id": entry["id"], **figures(entry)} for entry in reports[0]["variants"]],
        "minutes": sum(sum(report["wall_s"].values()) for report in reports) / 60,
    }


def write_rows(source: Path, path: Path) -> None:
    """Positions become texts: ``{"text", "answer"}``, the answer an object of the slots in the order of their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in json.loads(source.read_text("utf-8")):
            said = row["userInput"]["text"]
            slots = {}
            for label in row.get("labels") or ():
                span = label["valueSpan"]
                slots[label["slot"]] = said[span.get("startIndex", 0) : span["endIndex"]]
            asked = ", ".join(row.get("context", {}).get("requestedSlots", ()))
            text = f"Asked for: {asked}\n{said}" if asked else said
            line = {"text": text, "answer": json.dumps(dict(sorted(slots.items())), ensure_ascii=False)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def recipe(path: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    limit, test = (QUICK_ROWS, QUICK_TEST_ROWS) if quick else (ROWS, TEST_ROWS)
    return {
        "name": "restaurant8k-quick" if quick else "restaurant8k",
        "task": "extraction",
        "seed": seed,
        "data": {
            "train": str(path),
            "input": "{text}",
            "target": "{answer}",
            "limit": limit,
            "split": {"validation": 0.05, "test": test / limit},
        },
        "teacher": {"adapt_epochs": 0.2 if quick else 2, "max_tokens": 64, "min_success_ratio": 0.0 if quick else 0.8},
        "student": {"layers": 2 if quick else 6},
        "distill": {"losses": {"gold": 0.5, "forward_kl": 0.5}},
        "train": {"max_tokens": 192, "epochs": 1 if quick else 8},
        "compress": {"precisions": ["fp32"] if quick else ["fp32", "int8"], "teacher_precisions": []},
        "evaluate": {"max_rows": test, "max_new_tokens": 64, "latency_requests": 10 if quick else 50},
        "gates": {"retention": 0, "format_valid": 0, "parity": 1},
    }


def f1(entry: Mapping[str, Any]) -> float:
    return float(entry["score"]["value"])


def size(entry: Mapping[str, Any]) -> float:
    return float(entry["parameters"])


def valid(entry: Mapping[str, Any]) -> float:
    return float(entry["metrics"]["json_valid"])


def figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "slot_f1": f1(entry),
        "ci95": entry["score"]["ci95"],
        "metrics": entry.get("metrics"),
        "parameters": entry.get("parameters"),
        "size_bytes": entry.get("size_bytes"),
    }
