"""Bitext answers: a 135 M teacher adapted by LoRA, and a student of at most a quarter of its parameters.

The peer is the teacher in transformers fp32. The student is measured as it is shipped. What is kept is ROUGE-L and
perplexity on the same held-out rows; perplexities compare because the student's vocabulary is a part of the teacher's
and cuts the texts of the task alike, and bits per byte are given besides.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.common import data_file, report_of

ROWS = 400
QUICK_ROWS = 40


def recipe(path: str, *, quick: bool) -> dict[str, Any]:
    return {
        "name": "bitext-quick" if quick else "bitext",
        "task": "conversation",
        "data": {
            "train": path,
            "input": "{instruction}",
            "target": "{response}",
            "limit": QUICK_ROWS if quick else ROWS,
        },
        "teacher": {"adapt_epochs": 0.2 if quick else 2, "max_tokens": 24 if quick else 224, "min_success_ratio": 0},
        "student": {"from": "teacher", "layers": 6},
        "train": {"max_tokens": 64 if quick else 256, "epochs": 1 if quick else 6},
        "compress": {"precisions": ["fp32", "int4"], "teacher_precisions": ["int4"]},
        "evaluate": {
            "max_rows": 4 if quick else 40,
            "max_new_tokens": 16 if quick else 160,
            "latency_requests": 100,
            "untaught_baseline": not quick,
        },
        "gates": {"retention": 0, "format_valid": 0, "parity": 1},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    path = data_file(options, "bitext_support/train.csv")
    report = report_of(options, recipe(path, quick=options.quick))
    teacher, student = report["teacher"], report["student"]
    low, high = student["score"]["ci95"]
    scale = teacher["score"]["value"] or 1.0
    share = student["parameters"] / teacher["parameters"]
    return {
        "ours": figures(student),
        "peer": figures(teacher),
        "ratio": report["retention"],
        "spread": [low / scale, high / scale],
        "target": {"share of the teacher's parameters": 0.25},
        "passed": share <= 0.25,
        "share of the teacher's parameters": share,
        "variants": [figures(variant) for variant in report["variants"]],
        "baselines": {name: entry["score"] for name, entry in report["baselines"].items()},
        "verdict": report["verdict"],
        "wall_s": report["wall_s"],
    }


def figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    measured = entry["measurement"] or {}
    return {
        "id": entry["id"],
        "rouge_l": entry["score"],
        "perplexity": entry["metrics"].get("perplexity"),
        "bits_per_byte": entry["metrics"].get("bits_per_byte"),
        "parameters": entry["parameters"],
        "size_bytes": entry["size_bytes"],
        "memory_bytes_peak": entry["memory_bytes_peak"],
        "tokens_per_s": measured.get("tokens_per_s"),
        "p50_ms": entry["latency_ms"]["p50"],
    }
