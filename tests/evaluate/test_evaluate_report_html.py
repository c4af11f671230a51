from __future__ import annotations

import copy
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.evaluate.gates import budget_gates, format_gate, parity_gate, retention_gate, verdict
from slmops.evaluate.measure import Measurement
from slmops.evaluate.metrics import accuracy
from slmops.evaluate.report_html import charts, figures, render_report, words
from slmops.evaluate.scores import Scores, class_scores, top_confusions
from slmops.evaluate.significance import bootstrap_interval, compare
from slmops.evaluate.summary import BaselineEntry, ModelEntry, build_report
from slmops.recipe import BudgetConfig

LABELS = [
    f"intent_{number:02d}_with_a_rather_long_name" if number % 9 == 0 else f"intent_{number:02d}"
    for number in range(40)
]
ROWS = 1200
MACHINE = {"cpu": "A CPU @ 2 GHz", "cores": 2, "memory_bytes": 25_000_000_000, "cpu_flags": ["avx2", "avx512_vnni"]}
VOID = {"meta", "br", "hr", "img", "link", "input"}


def answers(share_right: float, seed: int) -> Scores:
    generator = np.random.default_rng(seed)
    targets = [LABELS[index % len(LABELS)] for index in range(ROWS)]
    wrong = generator.random(ROWS) > share_right
    near = [LABELS[(index + 1 + int(generator.random() < 0.2)) % len(LABELS)] for index in range(ROWS)]
    predictions = [close if miss else target for target, close, miss in zip(targets, near, wrong, strict=True)]
    per_row = accuracy(predictions, targets)
    return Scores(
        "accuracy",
        float(per_row.mean()),
        bootstrap_interval(per_row, seed),
        ROWS,
        per_row,
        {"format_valid": 1.0, "nll": 0.31, "ece": 0.042, "unknown_label_rows": 0.0},
        predictions,
        class_scores(predictions, targets),
        top_confusions(predictions, targets),
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


def model(name: str, share_right: float, size_bytes: int, p50: float, memory_bytes: int, parameters: int) -> ModelEntry:
    runtime = "torch" if name.endswith("torch") else "onnxruntime"
    return ModelEntry(
        name,
        answers(share_right, seed=len(name) + size_bytes % 97),
        parameters=parameters,
        size_bytes=size_bytes,
        measurement=measured(p50, memory_bytes),
        cost_per_1000=p50 / 36_000,
        runtime=runtime,
        precision=name.split("-")[1].replace("torch", "fp32"),
        artifact=hashlib.sha256(name.encode()).hexdigest(),
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


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return example()


@pytest.fixture
def report(whole: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(whole)


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


def test_the_page_stands_alone_and_tells_every_model(report: dict[str, Any]) -> None:
    page = render_report(report)
    parsed = Balanced(page)
    assert parsed.seen.isdisjoint({"script", "link", "img", "iframe", "object", "use", "image"})
    assert {key for key, _ in parsed.attributes}.isdisjoint({"src", "href", "xlink:href", "srcset", "onload"})
    assert not re.search(r"url\(|@import|https?:", page)
    assert report["verdict"] in parsed.text
    titles = {value for key, value in parsed.attributes if key == "title"}
    for name, entry in [*((v["id"], v) for v in report["variants"]), *report["baselines"].items()]:
        assert name in parsed.text
        assert not entry["artifact"] or entry["artifact"] in titles
        assert entry["artifact"][:12] in parsed.text
    assert not re.search(r"\b(None|nan|inf|Undefined)\b", parsed.text)
    assert render_report(copy.deepcopy(report)) == page


def test_the_first_screen_says_how_much_was_won(report: dict[str, Any]) -> None:
    text = Balanced(render_report(report)).text
    assert "✓ All gates hold" in text
    assert "Size on disk 195× smaller 538 MB → 2.76 MB" in text
    assert "Latency, p50 231× faster 94.9 ms → 0.410 ms" in text
    assert "Peak memory 19× less memory 1.48 GB → 78.2 MB" in text
    kept = f"{100 * report['retention']:.1f} % of the teacher’s accuracy"
    assert f"Retention {kept} {100 * report['teacher']['score']['value']:.1f} % → " in text


def test_failed_gates_and_larger_students_are_told_as_plainly(report: dict[str, Any]) -> None:
    report["gates"][-1] |= {"passed": False, "value": 61.5}
    report["student"]["size_bytes"] = 2 * report["teacher"]["size_bytes"]
    text = Balanced(render_report(report)).text
    assert "✗ Gates failed: 1 of 6" in text
    assert "✗ latency_ms_p95 61.5 ms ≤ 50 ms" in text
    assert "✗ fails" in text
    assert "2.0× larger 538 MB → 1.08 GB" in text


def test_nothing_that_came_from_data_is_taken_for_markup(report: dict[str, Any]) -> None:
    evil = "\"'><script>alert(1)</script>"
    report["name"] = report["verdict"] = report["machine"]["cpu"] = report["currency"] = evil
    report["student"] |= {"id": evil, "runtime": evil, "artifact": evil, "precision": evil}
    report["variants"][2] |= {"id": evil, "artifact": evil}
    report["baselines"][evil] = report["baselines"]["linear"] | {"description": evil}
    report["comparisons"][f"student_vs_{evil}"] = report["comparisons"]["student_vs_linear"]
    report["classes"][0]["label"] = report["confusions"][0]["target"] = report["confusions"][0]["prediction"] = evil
    report["gates"][0] |= {"name": evil, "note": evil, "unit": evil}
    report["wall_s"][evil] = 1.0
    report["student"]["metrics"][evil] = 0.5
    data = report["data"]
    data["warnings"] = [evil]
    data["balance"][evil] = {"train": 1, "validation": 0, "test": 0}
    data["quarantined"]["reasons"][evil] = 1
    data["sources"]["train"]["name"] = evil
    page = render_report(report)
    parsed = Balanced(page)
    assert "script" not in parsed.seen
    assert "<script" not in page
    assert parsed.text.count("alert(1)") > 15


def test_a_remote_teacher_has_dashes_and_a_line_instead_of_a_dot(report: dict[str, Any]) -> None:
    unknown = {"size_bytes": None, "parameters": None, "memory_bytes_peak": None, "measurement": None}
    nothing = {"throughput_per_s": None, "latency_ms": {"p50": None, "p95": None}, "precision": None}
    report["teacher"] |= unknown | nothing | {"id": "teacher", "runtime": "openai:large"}
    report["variants"] = report["variants"][1:]
    text = Balanced(render_report(report)).text
    assert "Size on disk – not known – → 2.76 MB" in text
    assert "Both were measured" not in text
    assert "the teacher, whose size is not known" in text
    plot = charts.tradeoff(report)
    assert plot is not None
    assert [level.role for level in plot.levels if level.label.text == "teacher"] == ["teacher"]
    assert "teacher" not in {dot.role for dot in plot.dots}
    spans = charts.latency(report)
    assert spans is not None
    assert len(spans.spans) == 4


def test_a_teacher_that_knows_nothing_has_no_share_to_keep(report: dict[str, Any]) -> None:
    report["teacher"]["score"] = {"value": 0.0, "ci95": [0.0, 0.0], "rows": ROWS}
    assert "Retention – of the teacher’s accuracy 0.0 % →" in Balanced(render_report(report)).text


def test_the_least_that_a_report_can_have_is_a_page() -> None:
    bare = ModelEntry("only", Scores("rouge_l", 0.3, (0.3, 0.3), 1, np.array([0.3])))
    report = build_report(
        name="bare",
        task="generation",
        machine={},
        teacher=bare,
        student=bare,
        variants=[],
        baselines={},
        gates=[],
        verdict="Nothing is known.",
        bundle="",
        wall_s={},
    )
    text = Balanced(render_report(report)).text
    assert "Nothing is known." in text
    assert "ROUGE-L, %" in text
    for absent in ("Gates", "Training", "Data", "Where the student errs", "Are the differences real?", "Quality, size"):
        assert absent not in text


def test_a_generator_shows_its_own_measures(report: dict[str, Any]) -> None:
    chosen = report["student"]
    chosen["metrics"] |= {"perplexity": 12.25, "bits_per_byte": 0.91, "cut_off": 0.02, "bleu": 31.5, "new_measure": 0.7}
    chosen["measurement"] |= {"tokens_per_s": 112.4, "batch_tokens_per_s": 242.0, "ttft_ms": {"p50": 45.6, "p95": 60.0}}
    report["variants"][3] = chosen
    report["data"]["balance"] = report["data"]["labels"] = None
    found = figures.details(report)
    row = dict(zip(found.keys, found.rows["student-int8"], strict=True))
    assert (row["tokens_per_s"], row["ttft_ms"], row["bits_per_byte"]) == (112.4, 45.6, 0.91)
    assert dict(zip(found.keys, found.rows["teacher-torch"], strict=True))["tokens_per_s"] is None
    text = Balanced(render_report(report)).text
    shown = ("perplexity", "12.2", "tokens/s, one request", "112", "first text, ms (p50)", "2.0 %", "new measure")
    assert [word for word in shown if word not in text] == []


def test_a_paired_test_in_words() -> None:
    test = {"difference": 0.012, "ci95": [-0.001, 0.025], "p_value": 0.07, "significant": False}
    test |= {"a_only": 20, "b_only": 32, "rows": 1000}
    assert words.comparison(test, "the teacher").replace(words.SPACE, " ") == (
        "The student is 1.2 points better than the teacher, within noise (p = 0.070; 95 % interval −0.1 to +2.5); "
        "of 1,000 rows it does better on 32 and worse on 20."
    )
    worse = words.comparison(test | {"difference": -0.3, "significant": True, "p_value": 1e-9, "rows": 1}, "“linear”")
    assert worse.startswith("The student is 30.0 points worse than “linear”, beyond noise (p")
    assert "of 1 row it" in worse
    assert words.comparison(test | {"difference": 0.0}, "x").startswith("The student is as good as x (95")


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.size(31), "31 B"),
        (words.size(538_151_392), "538 MB"),
        (words.size(999_600), "1.00 MB"),
        (words.size(2.5e15), "2,500 TB"),
        (words.size(None), "–"),
        (words.count(134_530_010), "135 M"),
        (words.count(2_512_010), "2.51 M"),
        (words.count(7), "7"),
        (words.count(7_100_000_000), "7.10 B"),
        (words.milliseconds(0.0002), "< 0.01 ms"),
        (words.milliseconds(17_401.2), "17,401 ms"),
        (words.significant(0), "0"),
        (words.significant(0.0384), "0.0384"),
        (words.significant(-12.34), "-12.3"),
        (words.significant(1e-7), "1.00e-07"),
        (words.money(0.0000502), "0.000050"),
        (words.money(12.5), "12.50"),
        (words.money(0), "0.00"),
        (words.duration(0.26), "0.3 s"),
        (words.duration(59.7), "1 min 00 s"),
        (words.duration(3725), "1 h 02 min"),
        (words.interval([0.908, 0.927]), "90.8 – 92.7"),
        (words.quantity(0.95, "share"), "95.0 %"),
        (words.quantity(2.7, "MB"), "2.70 MB"),
        (words.quantity(3, ""), "3"),
        (words.times(538, 2.7, "smaller", "larger")[0], "199×"),
        (words.times(9.99, 1, "smaller", "larger")[0], "10×"),
    ],
)
def test_numbers_are_written_for_people(shown: str, expected: str) -> None:
    assert shown.replace(words.SPACE, " ") == expected


@pytest.mark.parametrize("name", ["whole", "percent", "milliseconds", "duration", "significant", "interval", "money"])
def test_what_is_not_known_is_a_dash(name: str) -> None:
    assert words.FILTERS[name](None) == words.MISSING


def boxes(plot: charts.Tradeoff) -> list[charts.Box]:
    labels = [mark.label for mark in (*plot.dots, *plot.levels)]
    return [
        charts.Box(at.x, at.y - 0.85 * charts.FONT, at.x + charts.GLYPH * len(at.text), at.y + 0.15 * charts.FONT)
        for at in labels
    ]


def test_labels_lie_beside_one_another_and_inside(report: dict[str, Any]) -> None:
    plot = charts.tradeoff(report)
    assert plot is not None
    found = boxes(plot)
    assert len(found) == 5 + 2
    for index, box in enumerate(found):
        assert all(box.overlap(other) == 0 for other in found[:index])
        assert charts.LEFT <= box.left <= box.right <= charts.WIDTH
        assert 0 <= box.top <= box.bottom <= plot.bottom
    assert [dot.label.text for dot in plot.dots if dot.shipped] == ["student-int8"]


def test_a_better_baseline_is_drawn_and_a_far_worse_one_told_in_words(report: dict[str, Any]) -> None:
    report["baselines"]["linear"]["score"] = {"value": 0.999, "ci95": [0.99, 1.0], "rows": ROWS}
    plot = charts.tradeoff(report)
    assert plot is not None
    assert {level.label.text for level in plot.levels} == {"linear", "untaught"}
    assert [text.partition(" ")[0] for text in plot.elsewhere] == ["majority"]
    heights = {level.label.text: level.y for level in plot.levels}
    assert heights["linear"] < min(dot.y for dot in plot.dots)


def test_larger_models_lie_to_the_right_and_better_ones_above(report: dict[str, Any]) -> None:
    plot = charts.tradeoff(report)
    assert plot is not None
    at = {dot.label.text: dot for dot in plot.dots}
    assert at["student-int4"].x < at["student-int8"].x < at["student-fp32"].x < at["teacher-torch"].x
    values = {entry["id"]: entry["score"]["value"] for entry in report["variants"]}
    assert sorted(values, key=lambda name: -values[name]) == sorted(values, key=lambda name: at[name].y)
    assert all(dot.high <= dot.y <= dot.low for dot in plot.dots)


@settings(max_examples=100, deadline=None)
@given(
    low=st.floats(1e-6, 1e9),
    factor=st.floats(1.0001, 1e9),
    log=st.booleans(),
)
def test_an_axis_has_ticks_in_order_and_inside(low: float, factor: float, log: bool) -> None:
    axis = charts.Axis(low, low * factor, 46, 468, log)
    ticks = axis.ticks(str)
    assert 1 <= len(ticks) <= 25
    places = [tick.at for tick in ticks]
    assert places == sorted(places)
    assert places[0] >= 45.9
    assert places[-1] <= 468.1
    assert (axis.at(low), axis.at(low * factor)) == (46, 468)


def test_loss_curves_are_thinned_by_means_and_survive_one_point() -> None:
    steps = [{"step": float(step), "loss": float(step % 2)} for step in range(1, 3001)]
    (plot,) = charts.losses({"history": {"student": steps, "teacher": []}})
    assert len(plot.training) <= charts.MOST_POINTS
    assert {round(y) for _, y in plot.training} == {round(plot.training[0][1])}
    (single,) = charts.losses({"history": {"teacher": [{"step": 1.0, "validation_loss": 2.0}]}})
    assert single.training == []
    assert len(single.validation) == 1
    assert charts.losses({}) == []
    assert charts.losses({"history": {"student": [{"step": 1.0, "train_loss": 1.0}]}}) == []


def test_of_many_labels_the_largest_and_the_smallest_are_shown() -> None:
    counts = {f"l{number}": {"train": number, "validation": 0, "test": 0} for number in range(500)}
    found = figures.balance({"data": {"balance": counts}})
    assert found is not None
    assert (len(found.rows), found.left_out, found.most) == (figures.MOST_LABELS, 400, 499)
    assert (found.rows[0][0], found.rows[-1][0]) == ("l499", "l0")
    assert figures.balance({"data": {"balance": None}}) is figures.balance({}) is None
