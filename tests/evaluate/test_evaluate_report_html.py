from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import numpy as np

from slmops.evaluate.gates import budget_gates, format_gate, parity_gate, retention_gate, verdict
from slmops.evaluate.measure import Measurement
from slmops.evaluate.report_html import render_report, words
from slmops.evaluate.scores import Scores, score_predictions
from slmops.evaluate.significance import compare
from slmops.evaluate.summary import BaselineEntry, ModelEntry, build_report
from slmops.recipe import BudgetConfig

LABELS = [
    f"intent_{number:02d}_with_a_rather_long_name" if number % 9 == 0 else f"intent_{number:02d}"
    for number in range(40)
]
ROWS = 1200
MACHINE = {"cpu": "A CPU @ 2 GHz", "cores": 2, "memory_bytes": 25_000_000_000, "cpu_flags": ["avx2", "avx512_vnni"]}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def answers(accuracy: float, seed: int) -> Scores:
    generator = np.random.default_rng(seed)
    targets = [LABELS[index % len(LABELS)] for index in range(ROWS)]
    wrong = generator.random(ROWS) > accuracy
    near = [LABELS[(index + 1 + int(generator.random() < 0.2)) % len(LABELS)] for index in range(ROWS)]
    predictions = [close if miss else target for target, close, miss in zip(targets, near, wrong, strict=True)]
    return score_predictions(
        predictions, targets, task="classification", labels=LABELS, others={"nll": 0.31, "ece": 0.042}
    )


def measured(p50: float, memory_bytes: int, **more: Any) -> Measurement:
    return Measurement(
        latency_ms={"p50": p50, "p95": 1.6 * p50},
        throughput_per_s=1700 / p50,
        memory_bytes_peak=memory_bytes,
        memory_bytes_peak_single=memory_bytes,
        memory_bytes_loaded=memory_bytes // 2,
        load_s=p50 / 40,
        threads=None,
        batch=32,
        requests=200,
        rounds_p50_ms=(p50,) * 5,
        **more,
    )


def model(name: str, accuracy: float, size_bytes: int, p50: float, memory_bytes: int, parameters: int) -> ModelEntry:
    runtime = "torch" if name.endswith("torch") else "onnxruntime"
    return ModelEntry(
        name,
        answers(accuracy, seed=len(name) + size_bytes % 97),
        parameters=parameters,
        size_bytes=size_bytes,
        measurement=measured(p50, memory_bytes),
        cost_per_1000=p50 / 36_000,
        runtime=runtime,
        precision=name.split("-")[1].replace("torch", "fp32"),
        artifact=f"{size_bytes:064x}",
    )


def example(**changes: Any) -> dict[str, Any]:
    """A whole report of a run that went well, as the pipeline makes it."""
    teacher = model("teacher-torch", 0.925, 538_151_392, 94.9, 1_484_214_272, 134_530_010)
    students = [
        model("student-torch", 0.921, 10_061_220, 2.7, 456_187_904, 2_512_010),
        model("student-fp32", 0.921, 10_161_220, 0.9, 106_187_904, 2_512_010),
        model("student-int8", 0.919, 2_761_220, 0.41, 78_187_904, 2_512_010),
        model("student-int4", 0.903, 2_461_220, 0.62, 76_187_904, 2_512_010),
    ]
    chosen = students[2]
    baselines = {
        "majority": BaselineEntry(answers(0.025, 7), "the commonest answer for everything", 31, 0.0002, "ab" * 32),
        "linear": BaselineEntry(answers(0.905, 8), "TF-IDF with a linear model", 9_000_000, 1.5, "ab" * 32),
        "untaught": BaselineEntry(answers(0.897, 9), "the same student trained without the teacher", 10_061_220),
    }
    gates = [
        retention_gate(chosen.scores, teacher.scores, 0.95),
        format_gate(chosen.scores, 0.99),
        parity_gate(students[0].scores, students[1].scores, 0.02, name="parity torch → fp32"),
        parity_gate(students[1].scores, chosen.scores, 0.02, name="parity fp32 → int8"),
        *budget_gates(BudgetConfig(size_mb=60, latency_ms_p95=50), 2_761_220, measured(0.41, 78_187_904)),
    ]
    tests = {
        f"student_vs_{name}": compare(entry.scores.per_row, chosen.scores.per_row) for name, entry in baselines.items()
    }
    tests["student_vs_teacher"] = compare(teacher.scores.per_row, chosen.scores.per_row)
    arguments: dict[str, Any] = {
        "name": "support-intents",
        "task": "classification",
        "machine": MACHINE,
        "teacher": teacher,
        "student": chosen,
        "variants": [teacher, *students],
        "baselines": baselines,
        "gates": gates,
        "verdict": verdict(
            chosen.scores,
            teacher.scores,
            gates=gates,
            baselines={entry.description: entry.scores for entry in baselines.values()},
        ),
        "bundle": "",
        "wall_s": {"data": 1.4, "teacher": 1080.0, "answers": 260.0, "student": 131.0, "measure": 61.0, "report": 0.3},
        "comparisons": tests,
        "extra": {"data": data(), "currency": "EUR", "seed": 0, "history": history()},
    }
    return build_report(**{**arguments, **changes})


def data() -> dict[str, Any]:
    lengths = {"min": 17, "p05": 34, "p50": 81, "p95": 183, "p99": 313, "max": 3327}
    return {
        "schema": 1,
        "rows": {"train": 8000, "validation": 1000, "test": ROWS},
        "read": {"train": 11_000},
        "sources": {"train": {"name": "train.csv", "sha256": "cd" * 32, "rows": 11_000}},
        "quarantined": {"total": 12, "reasons": {"no text": 9, "text longer than 100,000 characters": 3}},
        "duplicates_removed": {"exact": 210, "near": 87, "why": "…"},
        "overlap_removed": {"exact": 4, "near": 2, "why": "…"},
        "kept_together": 0,
        "over_limit": 0,
        "labels": LABELS,
        "balance": {
            label: {"train": 320 - 7 * number, "validation": 25, "test": 30} for number, label in enumerate(LABELS)
        },
        "label_entropy_bits": 5.21,
        "lengths": {"characters": lengths, "words": lengths, "answer_characters": lengths},
        "warnings": ["The label 'intent_39' is in fewer than 3 rows: not split; all of them are for training."],
    }


def history() -> dict[str, list[dict[str, float]]]:
    def curve(steps: int, floor: float) -> list[dict[str, float]]:
        noise = np.random.default_rng(steps).normal(0, 0.08, steps)
        found = [
            {"step": float(step), "loss": floor + 3 * 0.98 ** (800 * step / steps) + abs(float(noise[step - 1]))}
            for step in range(1, steps + 1)
        ]
        for part in range(1, 6):
            loss = floor + 0.1 + 2 * 0.5**part
            found.append({"step": steps * part / 5, "validation_loss": loss, "validation_accuracy": 0.93 - 0.5**part})
        return [*found, {"step": float(steps), "train_loss": 1.0, "train_runtime": 3.0}]

    return {"student": curve(2400, 0.4), "teacher": curve(500, 0.2)}


class Balanced(HTMLParser):
    """Fails on a closing tag that closes nothing, or another element; keeps texts and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace(words.SPACE, " ").split())


def test_the_page_stands_alone_and_tells_every_model() -> None:
    report = example()
    page = render_report(report)
    parsed = Balanced(page)
    assert parsed.seen.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image"})
    assert not [
        key for key, _ in parsed.attributes if key in {"src", "href", "xlink:href", "srcset"} or key[:2] == "on"
    ]
    assert not re.search(r"url\(|@import|https?:", page)
    assert report["verdict"] in parsed.text
    titles = {value for key, value in parsed.attributes if key == "title"}
    for entry in (*report["variants"], *report["baselines"].values()):
        assert entry.get("id", "") in parsed.text
        if entry["artifact"]:
            assert entry["artifact"] in titles
            assert entry["artifact"][:12] in parsed.text
    assert render_report(example()) == page
