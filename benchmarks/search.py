"""The search under a budget on banking77: beside four bits alone, a smaller student alone, and a choice by hand.

The budget is one that the default student does not meet in four bits, nor the smallest of the space in fp32. All
students learn from the same adapted teacher (made before, and not counted) and are judged on the same test rows, which
the search does not see. ``by hand`` is the guess of a person who halves the width and takes eight bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.common import check, report_of, rows_to_compress, say

SIZE_MB = 1.5
LEAST_RETENTION = 0.9
SECONDS, QUICK_SECONDS = 1200, 20
LAYERS, HIDDEN_SIZES, EPOCHS = (1, 2), (64, 128, 192), (20, 60)
QUICK_ROWS = 400
BY_HAND = {"layers": 2, "hidden_size": 128}
Report = Mapping[str, Any]


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    base = recipe(rows_to_compress(options, QUICK_ROWS), quick=quick)
    say("four bits alone")
    int4 = report_of(options, changed(base, "search-int4", precisions=["int4"]))
    say("a smaller student alone")
    small = report_of(options, changed(base, "search-small", student=smallest(), precisions=["fp32"]))
    say("by hand")
    by_hand = report_of(options, changed(base, "search-by-hand", student=BY_HAND, precisions=["int8"]))
    say("the search")
    found = report_of(
        options, {**changed(base, "search"), "budget": {"size_mb": SIZE_MB}, "search": search(quick=quick)}
    )
    sides = {"int4 alone": int4, "smaller alone": small, "by hand": by_hand}
    ours, guess = found["student"], by_hand["student"]
    within = size_mb(ours) <= SIZE_MB
    checks = [
        check("megabytes below the budget", [SIZE_MB - size_mb(ours)], 0),
        check("megabytes of int4 alone above it", [size_mb(int4["student"]) - SIZE_MB], 0),
        check("megabytes of the smallest fp32 student above it", [size_mb(small["student"]) - SIZE_MB], 0),
        check("retention", [found["retention"]], LEAST_RETENTION),
        check("times smaller than by hand", [guess["size_bytes"] / ours["size_bytes"]], 1),
        check("upper end of the score's interval beside by hand", [ours["score"]["ci95"][1] - score(guess)], 0),
    ]
    return {
        "ours": figures(ours),
        "peer": {name: figures(report["student"]) for name, report in sides.items()},
        "ratio": guess["size_bytes"] / ours["size_bytes"],
        "spread": [guess["size_bytes"] / ours["size_bytes"]] * 2,
        "target": f"{SIZE_MB:g} MB, which neither alone meets; not beaten by hand",
        "passed": quick or (within and all(one["passed"] for one in checks)),
        "checks": checks,
        "values": found["search"]["values"],
        "students": len({one["number"] for one in found["search"]["candidates"]}),
        "left_out": len(found["search"]["left_out"]),
        "front": [
            {**one["values"], "variant": one["variant"], "size_mb": size_mb(one), "score": score(one)}
            for one in found["search"]["candidates"]
            if one["front"]
        ],
        "minutes": found["wall_s"]["search"] / 60,
    }


def recipe(rows: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "task": "classification",
        "data": rows,
        "teacher": {"adapt_epochs": 0.1, "frozen_share": 0.95} if quick else {},
        "evaluate": {"untaught_baseline": False, "threads": 1},
        "gates": {"retention": 0 if quick else LEAST_RETENTION, "format_valid": 0},
    }
    if quick:
        raw["train"] = {"epochs": 1}
    return raw


def changed(
    base: Mapping[str, Any], name: str, *, student: Mapping[str, Any] | None = None, precisions: list[str] | None = None
) -> dict[str, Any]:
    compress: dict[str, Any] = {"teacher_precisions": []} | ({"precisions": precisions} if precisions else {})
    return {**base, "name": name, "compress": compress, **({"student": dict(student)} if student else {})}


def search(*, quick: bool) -> dict[str, Any]:
    return {
        "goal": "budget",
        "timeout_s": QUICK_SECONDS if quick else SECONDS,
        "rungs": 1 if quick else 3,
        "space": {
            "student.layers": list(LAYERS[:1] if quick else LAYERS),
            "student.hidden_size": list(HIDDEN_SIZES[:2] if quick else HIDDEN_SIZES),
            **({} if quick else {"train.epochs": list(EPOCHS)}),
        },
    }


def smallest() -> dict[str, Any]:
    return {"layers": LAYERS[0], "hidden_size": HIDDEN_SIZES[0]}


def size_mb(entry: Mapping[str, Any]) -> float:
    return float(entry["size_bytes"]) / 1e6


def score(entry: Mapping[str, Any]) -> float:
    return float(entry["score"]["value"])


def figures(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "precision": entry["precision"],
        "accuracy": score(entry),
        "ci95": entry["score"]["ci95"],
        "size_mb": size_mb(entry),
        "latency_ms_p50": entry["latency_ms"]["p50"],
    }
