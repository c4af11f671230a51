"""Gates, verdict, cost, machine facts and report.json: pure functions, by the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.evaluate import cost, machine
from slmops.evaluate.gates import (
    Gate,
    at_least,
    at_most,
    budget_gates,
    format_gate,
    parity_gate,
    retention,
    retention_gate,
    verdict,
)
from slmops.evaluate.measure import Measurement
from slmops.evaluate.scores import Scores, score_predictions
from slmops.evaluate.significance import compare
from slmops.evaluate.summary import REQUIRED_KEYS, BaselineEntry, ModelEntry, build_report, reduction
from slmops.recipe import BudgetConfig

ROWS = 1000


def scores(right: int, *, rows: int = ROWS, metric: str = "accuracy", shift: int = 0, **others: float) -> Scores:
    """``right`` of ``rows`` rows right, the wrong ones starting ``shift`` rows further on."""
    per_row = np.roll(np.array([1.0] * right + [0.0] * (rows - right)), shift)
    value = float(per_row.mean())
    return Scores(metric, value, (value - 0.01, value + 0.01), rows, per_row, {"format_valid": 0.99, **others})


MEASURED = Measurement(
    latency_ms={"p50": 2.0, "p95": 4.0},
    throughput_per_s=800.0,
    memory_bytes_peak=80_000_000,
    memory_bytes_peak_single=70_000_000,
    memory_bytes_loaded=20_000_000,
    load_s=0.2,
    threads=2,
    batch=32,
    requests=200,
    rounds_p50_ms=(2.0, 2.1),
)


@pytest.mark.parametrize(
    ("value", "limit", "least", "most"),
    [(0.9, 0.9, True, True), (0.3 * 3, 0.9, True, True), (0.8999, 0.9, False, True), (0.91, 0.9, True, False)],
)
def test_a_limit_itself_is_within(value: float, limit: float, least: bool, most: bool) -> None:
    assert at_least("g", value, limit).passed is least
    assert at_most("g", value, limit).passed is most


def test_retention_is_the_share_that_was_kept() -> None:
    gate = retention_gate(scores(882), scores(900), 0.98)
    assert gate.value == pytest.approx(0.98)
    assert gate.passed
    assert (gate.name, gate.unit, gate.direction) == ("retention", "share", "at_least")
    assert not retention_gate(scores(881), scores(900), 0.98).passed
    assert retention(scores(950), scores(900)) > 1


def test_a_teacher_that_knows_nothing_has_nothing_to_retain() -> None:
    gate = retention_gate(scores(0), scores(0), 0.9)
    assert not gate.passed
    assert "nothing to retain" in gate.note
    assert retention_gate(scores(1), scores(0), 0.9).passed
    assert "nothing to keep" in verdict(scores(0), scores(0))


def test_the_format_gate_reads_the_share_of_valid_answers() -> None:
    assert format_gate(scores(1), 0.99).passed
    assert not format_gate(scores(1), 0.995).passed
    with pytest.raises(ValueError, match="valid form"):
        format_gate(replace(scores(1), others={}), 0.9)


def test_parity_fails_a_drop_beyond_the_share_and_says_what_is_noise() -> None:
    before = scores(900)
    same = parity_gate(before, scores(900), 0.02)
    assert same.passed
    assert same.note == "No row changed."

    small = parity_gate(before, scores(898), 0.02)
    assert small.passed
    assert small.limit == pytest.approx(0.882)
    assert small.note == "0.20 points lost, within noise (p = 0.50)."

    large = parity_gate(before, scores(880), 0.02, name="parity-int4")
    assert not large.passed
    assert large.name == "parity-int4"
    assert large.note == "2.00 points lost, beyond noise (p < 0.001)."
    assert large.test is not None
    assert (large.test.a_only, large.test.b_only) == (20, 0)

    assert parity_gate(before, scores(910), 0.0).note.startswith("1.00 points gained")
    swapped = parity_gate(before, scores(900, shift=5), 0.0)
    assert swapped.passed
    assert swapped.note == "As many rows won as lost (5)."


def test_parity_needs_the_same_rows_and_the_same_metric() -> None:
    with pytest.raises(ValueError, match="same rows"):
        parity_gate(scores(9, rows=10), scores(9, rows=11), 0.02)
    with pytest.raises(ValueError, match="rouge_l"):
        parity_gate(scores(9, metric="rouge_l"), scores(9), 0.02)


def test_a_budget_has_one_gate_for_each_limit_it_states() -> None:
    assert budget_gates(BudgetConfig(), 10, MEASURED) == []
    gates = budget_gates(BudgetConfig(size_mb=3, memory_mb=60, latency_ms_p95=4), 2_900_000, MEASURED)
    assert [(g.name, g.value, g.limit, g.passed, g.unit) for g in gates] == [
        ("size_mb", 2.9, 3, True, "MB"),
        ("memory_mb", 80, 60, False, "MB"),
        ("latency_ms_p95", 4, 4, True, "ms"),
    ]


def test_a_good_run_in_one_sentence() -> None:
    sentence = verdict(
        scores(900), scores(910), gates=[at_least("retention", 1, 0.9)], baselines={"a linear model": scores(850)}
    )
    assert sentence == (
        "The student keeps 98.9 % of the teacher's accuracy (90.0 % against 91.0 %, a difference beyond noise, "
        "p = 0.002); the one gate holds; it is 5.0 points above the best baseline, a linear model, a difference "
        "beyond noise, p < 0.001."
    )


def test_a_baseline_that_wins_is_told_in_plain_words() -> None:
    sentence = verdict(scores(900), scores(910), baselines={"a linear model": scores(902), "majority": scores(40)})
    assert "a baseline is better: a linear model reaches 90.2 %, 0.2 points more, a difference within noise" in sentence
    assert "majority" not in sentence
    assert "a baseline is as good" in verdict(scores(9), scores(9), baselines={"x": scores(9)})


def test_failed_gates_are_named() -> None:
    gates = [at_least("retention", 0.5, 0.9), at_most("size_mb", 9, 1), at_least("format_valid", 1, 0.9)]
    assert "2 of 3 gates fail (retention, size_mb)" in verdict(scores(1), scores(2), gates=gates)
    assert "1 of 2 gates fails (retention)" in verdict(scores(1), scores(2), gates=[gates[0], gates[2]])
    assert "no gate was set; no baseline was measured." in verdict(scores(1), scores(2))


@given(student=st.integers(0, 50), teacher=st.integers(0, 50), baseline=st.integers(0, 50))
def test_a_verdict_is_always_one_sentence(student: int, teacher: int, baseline: int) -> None:
    text = verdict(scores(student, rows=50), scores(teacher, rows=50), baselines={"b": scores(baseline, rows=50)})
    assert text.endswith(".")
    assert "\n" not in text
    assert "nan" not in text
    assert ("a baseline is better" in text) == (baseline > student)


def test_cost_is_the_price_of_the_time() -> None:
    assert cost.cost_per_1000(throughput_per_s=10, price_per_hour=0.36) == pytest.approx(0.01)
    assert cost.cost_per_1000(5, 0) == 0
    assert cost.cost_per_1000_by_tokens(tokens_per_request=500, price_per_million_tokens=2) == pytest.approx(1.0)
    for throughput, price in ((0, 1), (-1, 1), (1, -1), (math.nan, 1)):
        with pytest.raises(ValueError, match="no price"):
            cost.cost_per_1000(throughput, price)
    with pytest.raises(ValueError, match="no price"):
        cost.cost_per_1000_by_tokens(-1, 1)


@pytest.mark.parametrize(
    ("training", "teacher", "student", "requests"),
    [(1.0, 1.0, 0.5, 2000), (1.0, 0.5, 1.0, None), (1.0, 1.0, 1.0, None), (0.0, 1.0, 0.5, 0), (0.01, 0.3, 0.0, 34)],
)
def test_break_even(training: float, teacher: float, student: float, requests: int | None) -> None:
    assert cost.break_even_requests(training, teacher, student) == requests


def test_negative_costs_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        cost.break_even_requests(-1, 1, 1)


@given(st.floats(0.001, 1e4), st.floats(0.001, 10), st.floats(0, 10))
def test_after_break_even_the_student_is_cheaper(training: float, teacher: float, student: float) -> None:
    requests = cost.break_even_requests(training, teacher, student)
    if requests is not None:
        assert requests / 1000 * (teacher - student) >= training * (1 - 1e-9)


CPUINFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512_vnni\n"
BOARD = "processor\t: 0\nFeatures\t: fp asimd asimddp\nHardware\t: BCM2712\nModel\t\t: Raspberry Pi 5\n"


def test_facts_are_read_from_the_kernels_texts(tmp_path: Path) -> None:
    assert machine.cpu_model(CPUINFO) == "Some CPU @ 2 GHz"
    assert machine.cpu_model(BOARD) == "Raspberry Pi 5"
    assert machine.cpu_model("") == ""
    assert machine.speed_flags(CPUINFO) == ["avx2", "avx512_vnni"]
    assert machine.speed_flags(BOARD) == ["asimddp"]
    meminfo = "MemTotal:       16000000 kB\nMemFree: 1 kB\n"
    assert machine.memory_limit_bytes(meminfo, "max\n") == 16_000_000 * 1024
    assert machine.memory_limit_bytes(meminfo, "1000000\n") == 1_000_000
    assert machine.memory_limit_bytes("", "") is None
    assert machine.load_1min("0.52 0.58 0.59 1/2 3\n") == 0.52
    assert machine.load_1min("") is None
    bare = machine.machine_facts(tmp_path, tmp_path)
    assert bare["memory_bytes"] is None
    assert bare["cpu"]
    assert bare["gpus"] == []
    card = tmp_path / "driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   \t\t 61\nGPU UUID: \t GPU-1\n")
    assert machine.machine_facts(tmp_path, tmp_path)["gpus"] == ["NVIDIA H100 80GB HBM3"]


def test_facts_of_this_machine_are_plain_and_name_no_one() -> None:
    facts = machine.machine_facts()
    assert facts["cores"] >= 1
    assert set(facts) == {"cpu", "cores", "memory_bytes", "os", "arch", "python", "cpu_flags", "load_1min", "gpus"}
    import socket

    assert socket.gethostname() not in json.dumps(facts)


def report(**changes: Any) -> dict[str, Any]:
    teacher = ModelEntry(
        "teacher",
        scores(910, nll=0.3),
        parameters=135_000_000,
        size_bytes=540_000_000,
        measurement=replace(MEASURED, latency_ms={"p50": 100.0, "p95": 150.0}, memory_bytes_peak=1_600_000_000),
        cost_per_1000=0.02,
        runtime="torch",
        precision="fp32",
        artifact="ab" * 32,
    )
    student = ModelEntry(
        "student-int8",
        scores(900),
        parameters=2_500_000,
        size_bytes=2_700_000,
        measurement=MEASURED,
        cost_per_1000=0.0002,
        runtime="onnx",
        precision="int8",
        artifact="cd" * 32,
    )
    arguments: dict[str, Any] = {
        "name": "support",
        "task": "classification",
        "machine": machine.machine_facts(),
        "teacher": teacher,
        "student": student,
        "variants": [student, replace(student, id="student-int4", precision="int4")],
        "baselines": {
            "majority": BaselineEntry(scores(30), "the commonest answer", 20, 0.001),
            "linear": BaselineEntry(scores(890), "TF-IDF with a linear model", 9_000_000, 1.5),
        },
        "gates": [retention_gate(student.scores, teacher.scores, 0.95)],
        "verdict": "All is well.",
        "bundle": "bundles/support",
        "wall_s": {"data": 1.5, "train": 120},
        "comparisons": {"student_vs_teacher": compare(teacher.scores.per_row, student.scores.per_row)},
    }
    return build_report(**{**arguments, **changes})


def assert_model(entry: dict[str, Any]) -> None:
    assert set(entry["score"]) == {"value", "ci95", "rows"}
    assert isinstance(entry["score"]["value"], float)
    assert len(entry["score"]["ci95"]) == 2
    assert entry["score"]["ci95"][0] <= entry["score"]["value"] <= entry["score"]["ci95"][1]
    assert isinstance(entry["score"]["rows"], int)
    assert isinstance(entry["parameters"], int)
    assert isinstance(entry["size_bytes"], int)
    assert isinstance(entry["memory_bytes_peak"], int)
    assert set(entry["latency_ms"]) == {"p50", "p95"}
    assert all(isinstance(value, float) for value in entry["latency_ms"].values())
    assert isinstance(entry["throughput_per_s"], float)
    assert isinstance(entry["cost_per_1000"], float)
    assert isinstance(entry["runtime"], str)
    assert isinstance(entry["precision"], str)


def test_the_report_has_the_keys_and_types_that_others_rely_on() -> None:
    raw = json.loads(json.dumps(report(), allow_nan=False))
    assert not set(REQUIRED_KEYS) - set(raw)
    assert raw["schema"] == 1
    assert (raw["name"], raw["task"], raw["metric"]) == ("support", "classification", "accuracy")
    assert isinstance(raw["machine"], dict)
    for entry in (raw["teacher"], raw["student"], *raw["variants"]):
        assert_model(entry)
    assert [variant["id"] for variant in raw["variants"]] == ["student-int8", "student-int4"]
    assert raw["baselines"]["linear"]["score"]["value"] == 0.89
    assert raw["retention"] == pytest.approx(0.9 / 0.91)
    assert raw["reductions"] == {
        "latency": pytest.approx(0.98),
        "memory": pytest.approx(0.95),
        "size": pytest.approx(0.995),
        "cost": pytest.approx(0.99),
    }
    for gate in raw["gates"]:
        assert {"name", "value", "limit", "passed"} <= set(gate)
        assert isinstance(gate["passed"], bool)
    assert raw["passed"] is True
    assert isinstance(raw["verdict"], str)
    assert raw["bundle"] == "bundles/support"
    assert raw["wall_s"] == {"data": 1.5, "train": 120}
    assert raw["student"]["artifact"] == "cd" * 32
    assert raw["comparisons"]["student_vs_teacher"]["method"] == "mcnemar"
    assert report() == report()


def test_a_remote_teacher_has_no_size_and_leaves_no_reduction_made_up() -> None:
    remote = ModelEntry("teacher", scores(910), cost_per_1000=1.0, runtime="openai")
    raw = report(teacher=remote)
    assert raw["teacher"]["latency_ms"] == {"p50": None, "p95": None}
    assert raw["teacher"]["memory_bytes_peak"] is None
    assert raw["reductions"]["cost"] == pytest.approx(0.9998)
    assert [raw["reductions"][key] for key in ("latency", "memory", "size")] == [None] * 3


def test_a_student_that_needs_more_has_a_negative_reduction() -> None:
    assert reduction(10, 15) == -0.5
    assert reduction(0, 5) is None
    assert reduction(None, 5) is reduction(5, None) is None


def test_numbers_that_json_cannot_carry_become_null() -> None:
    broken = replace(scores(900), others={"perplexity": math.inf, "nll": math.nan})
    raw = report(student=ModelEntry("s", broken), extra={"deep": [{"x": math.nan}], "name": "not this"})
    json.dumps(raw, allow_nan=False)
    assert raw["student"]["metrics"] == {"perplexity": None, "nll": None}
    assert raw["deep"] == [{"x": None}]
    assert raw["name"] == "support"


def test_models_judged_by_different_metrics_are_not_put_together() -> None:
    with pytest.raises(ValueError, match="rouge_l"):
        report(teacher=ModelEntry("teacher", scores(1, metric="rouge_l")))


def test_a_failed_gate_is_seen_at_the_top() -> None:
    failed = Gate("retention", 0.5, 0.9, False, "share", "at_least")
    assert report(gates=[failed])["passed"] is False
    assert report(gates=[])["passed"] is True


def test_classes_and_confusions_of_the_student_are_told() -> None:
    student = score_predictions(["a", "b", "b"], ["a", "a", "b"], task="classification")
    raw = report(student=ModelEntry("s", student))
    assert raw["confusions"] == [{"target": "a", "prediction": "b", "rows": 1}]
    assert {entry["label"] for entry in raw["classes"]} == {"a", "b"}
