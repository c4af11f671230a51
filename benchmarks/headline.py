"""Banking77: a 135 M teacher, the student it teaches, its quantized forms, the same student untaught, TF-IDF.

Three seeds of split and training. Each claim is the mean over seeds; every single one is measured on the seed's own
test split, teacher and student in the same time window.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.common import check, data_file, mean, report_of, spread

SEEDS = (0, 1, 2)
MINUTES_PER_SEED = 40.0
Report = Mapping[str, Any]


def recipe(path: str, seed: int, *, quick: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "banking77-quick" if quick else "banking77",
        "task": "classification",
        "seed": seed,
        "data": {"train": path, "input": "{text}", "target": "{category}"},
        "gates": {"retention": 0.98},
    }
    if quick:
        raw["data"]["limit"] = 800
        raw["teacher"] = {"adapt_epochs": 0.2, "frozen_share": 0.8}
        raw["distill"] = {"transfer_rows": 0}
        raw["train"] = {"epochs": 5}
        raw["compress"] = {"precisions": ["fp32", "int8"], "teacher_precisions": []}
        raw["evaluate"] = {"latency_requests": 40}
        raw["gates"] = {"retention": 0}
    return raw


def run(options: argparse.Namespace) -> dict[str, Any]:
    path = data_file(options, "banking77/train.csv")
    seeds = SEEDS[:1] if options.quick else SEEDS
    reports = [report_of(options, recipe(path, seed, quick=options.quick)) for seed in seeds]

    def each(figure: Callable[[Report], float]) -> list[float]:
        return [figure(report) for report in reports]

    checks = [
        check("teacher accuracy", each(lambda r: accuracy(r["teacher"])), 0.91),
        check("share of the teacher's accuracy kept", each(lambda r: r["retention"]), 0.98),
        check("points above the untaught student", each(lambda r: points(r, "untaught")), 1.5),
        check("points above TF-IDF with a linear model", each(lambda r: points(r, "linear")), 0.0),
        check(
            "x smaller than the teacher", each(lambda r: r["teacher"]["size_bytes"] / r["student"]["size_bytes"]), 100
        ),
        check("x faster than the teacher (p50)", each(lambda r: p50(r["teacher"]) / p50(r["student"])), 100),
        check("x less peak memory than the teacher", each(lambda r: memory(r["teacher"]) / memory(r["student"])), 10),
        check("minutes to spare per seed", each(lambda r: MINUTES_PER_SEED - sum(r["wall_s"].values()) / 60), 0),
    ]
    if not options.quick:
        checks += [
            check(
                "x smaller than the smallest quantized teacher",
                each(lambda r: min(v["size_bytes"] for v in quantized(r)) / r["student"]["size_bytes"]),
                25,
            ),
            check(
                "x faster than the fastest quantized teacher (p50)",
                each(lambda r: min(p50(v) for v in quantized(r)) / p50(r["student"])),
                25,
            ),
        ]
    retained = [report["retention"] for report in reports]
    return {
        "ours": mean(each(lambda r: accuracy(r["student"]))),
        "peer": {
            "teacher": mean(each(lambda r: accuracy(r["teacher"]))),
            "untaught": mean(each(lambda r: accuracy(r["baselines"]["untaught"]))),
            "linear": mean(each(lambda r: accuracy(r["baselines"]["linear"]))),
        },
        "ratio": mean(retained),
        "spread": spread(retained),
        "target": 0.98,
        "passed": all(one["passed"] for one in checks),
        "checks": checks,
        "seeds": [rows(report) for report in reports],
    }


def accuracy(entry: Mapping[str, Any]) -> float:
    return float(entry["score"]["value"])


def p50(entry: Mapping[str, Any]) -> float:
    return float(entry["latency_ms"]["p50"])


def memory(entry: Mapping[str, Any]) -> float:
    return float(entry["memory_bytes_peak"])


def points(report: Report, baseline: str) -> float:
    return 100 * (accuracy(report["student"]) - accuracy(report["baselines"][baseline]))


def quantized(report: Report) -> Sequence[Mapping[str, Any]]:
    return [v for v in report["variants"] if v["id"].startswith("teacher-") and v["runtime"] == "onnx"]


def rows(report: Report) -> list[dict[str, Any]]:
    """What the results page shows of one seed."""
    shown = [*report["variants"], *({"id": name, **entry} for name, entry in report["baselines"].items())]
    return [
        {
            "id": entry["id"],
            "accuracy": accuracy(entry),
            "ci95": entry["score"]["ci95"],
            "size_bytes": entry.get("size_bytes"),
            "p50_ms": entry["latency_ms"]["p50"],
            "memory_bytes_peak": entry.get("memory_bytes_peak"),
            "chosen": entry["id"] == report["student"]["id"],
        }
        for entry in shown
    ]
