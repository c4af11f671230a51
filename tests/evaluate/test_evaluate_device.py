"""Limits of a device, estimates for it, and what is said when nothing fits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fakes.tiny_models import write_tiny_classifier
from slmops.errors import MemoryBudgetError
from slmops.evaluate.choose import Candidate, choose, gates_of
from slmops.evaluate.closest import closest, closest_in_words
from slmops.evaluate.estimate import estimate_on, slowdowns
from slmops.evaluate.gates import at_least, at_most, budget_gates
from slmops.evaluate.limits import Limits, control_group
from slmops.evaluate.measure import DoesNotFitError, Measurement, measure
from slmops.evaluate.scores import Scores
from slmops.evaluate.speed import MachineSpeed, machine_speed
from slmops.hardware import device_profile
from slmops.recipe import BudgetConfig, GatesConfig

TEXTS = [f"my card number {n} is lost" for n in range(12)]
MEASURED = Measurement(
    latency_ms={"p50": 10.0, "p95": 20.0},
    throughput_per_s=100.0,
    memory_bytes_peak=80_000_000,
    memory_bytes_peak_single=70_000_000,
    memory_bytes_loaded=60_000_000,
    load_s=0.5,
    threads=1,
    batch=32,
    requests=10,
    rounds_p50_ms=(10.0,),
)
WRITING = replace(MEASURED, tokens_per_s=50.0, batch_tokens_per_s=80.0, ttft_ms={"p50": 4.0, "p95": 5.0})
PI = device_profile("raspberry-pi-4")
HERE = MachineSpeed(gflops=200.0, core_gflops=60.0, bandwidth_gb_s=20.0, cores=4)


def scores(value: float = 0.9, rows: int = 100) -> Scores:
    right = np.zeros(rows)
    right[: round(value * rows)] = 1
    return Scores("accuracy", value, (value, value), rows, right, {"format_valid": 1.0})


# --- estimates -----------------------------------------------------------------------------------------------------


def test_slowdowns_are_ratios() -> None:
    assert slowdowns(PI, HERE) == {"products": 10.0, "core": 10.0, "reading": 5.0}


def test_a_small_classifier_waits_for_one_core() -> None:
    found = estimate_on(PI, HERE, MEASURED, size_bytes=4_000_000, parameters=1_000_000)
    assert found.latency_ms["p95"].value == pytest.approx(200.0)
    assert (found.latency_ms["p50"].low, found.latency_ms["p50"].high) == (50.0, 100.0)
    assert found.tokens_per_s is found.ttft_ms is None
    assert found.memory_bytes == 80_000_000
    assert found.memory_share == pytest.approx(80 / 2800)
    assert found.load_s.value == pytest.approx(5.0)
    assert found.to_json()["estimate"] is True


def test_a_large_generator_waits_for_memory_when_it_writes() -> None:
    found = estimate_on(PI, HERE, WRITING, size_bytes=100_000_000, parameters=135_000_000)
    assert found.tokens_per_s is not None
    assert (found.tokens_per_s.value, found.tokens_per_s.low, found.tokens_per_s.high) == (10.0, 5.0, 10.0)
    assert found.ttft_ms is not None
    assert found.ttft_ms.value == pytest.approx(40.0)
    assert found.latency_ms["p50"].value == pytest.approx(10 * (0.4 * 10 + 0.6 * 5))


def test_a_missing_instruction_is_told() -> None:
    known = {"size_bytes": 1, "parameters": 1}
    slow = estimate_on(PI, HERE, MEASURED, **known, precision="int8", flags_here=["avx512_vnni"])
    assert "slow end" in slow.notes[0]
    assert estimate_on(PI, HERE, MEASURED, **known, precision="fp32", flags_here=["avx512_vnni"]).notes == ()
    fast = estimate_on(device_profile("phone"), HERE, MEASURED, **known, precision="int4", flags_here=["avx2"])
    assert "fast end" in fast.notes[0]


def test_this_machine_measures_itself() -> None:
    found = machine_speed(1)
    assert found.cores == 1
    assert found.gflops > 0.05
    assert found.core_gflops > 0.05
    assert found.bandwidth_gb_s > 0.05


# --- gates -----------------------------------------------------------------------------------------------------


def test_all_limits_of_a_budget_are_judged() -> None:
    budget = BudgetConfig(size_mb=5, memory_mb=79, latency_ms_p95=20, tokens_per_s=51)
    gates = {gate.name: gate for gate in budget_gates(budget, 4_000_000, WRITING)}
    assert {name: gate.passed for name, gate in gates.items()} == {
        "size_mb": True,
        "memory_mb": False,
        "latency_ms_p95": True,
        "tokens_per_s": False,
    }
    assert gates["tokens_per_s"].direction == "at_least"


def test_a_device_is_judged_by_its_estimate_and_says_so() -> None:
    estimate = estimate_on(PI, HERE, WRITING, size_bytes=4_000_000, parameters=135_000_000)
    budget = BudgetConfig(device="raspberry-pi-4", latency_ms_p95=60, tokens_per_s=9)
    gates = {gate.name: gate for gate in budget_gates(budget, 4_000_000, WRITING, estimate)}
    assert set(gates) == {"size_mb", "memory_mb", "latency_ms_p95", "tokens_per_s"}
    assert gates["memory_mb"].limit == 2800
    assert not gates["latency_ms_p95"].passed
    assert gates["tokens_per_s"].passed
    assert gates["tokens_per_s"].value == 10.0
    assert "Estimate for raspberry-pi-4" in gates["latency_ms_p95"].note
    assert "measured here 20" in gates["latency_ms_p95"].note


def test_a_process_that_was_held_says_so() -> None:
    held = replace(MEASURED, limits={"memory_bytes": 300_000_000, "memory_by": "cgroup", "cores": 2})
    [gate] = budget_gates(BudgetConfig(memory_mb=100), 1, held)
    assert "held to 300 MB" in gate.note
    lifted = replace(MEASURED, limits={"memory_bytes": 300_000_000, "cores": 2, "fits": False})
    [gate] = budget_gates(BudgetConfig(memory_mb=100), 1, lifted)
    assert "did not run in 300 MB" in gate.note


# --- closest -----------------------------------------------------------------------------------------------------


def test_nothing_fits_and_the_closest_say_what_to_give_up() -> None:
    slow = Candidate("student-fp32", 40_000_000, scores(0.9), MEASURED)
    small = Candidate("student-int8", 12_000_000, scores(0.9), MEASURED)
    poor = Candidate("student-int4", 9_000_000, scores(0.1), MEASURED)
    budget = BudgetConfig(size_mb=10)
    judged = [(one, gates_of([one], scores(0.9), GatesConfig(), budget, 0)) for one in (slow, small, poor)]
    misses = closest(judged)
    assert [miss.id for miss in misses] == ["student-int8", "student-fp32", "student-int4"]
    assert misses[0].distance == pytest.approx(np.log2(1.2))
    assert misses[1].distance == pytest.approx(2.0)
    said = closest_in_words(misses)
    assert said[0] == "Nothing meets the budget. Closest is student-int8."
    assert said[1] == (
        "student-int8 would have to give up: size_mb: 12 MB where at most 10 MB is asked for (1.20 times too much)."
    )
    assert "retention: 11.1 % where at least 90.0 % is asked for (8.10 times too little)" in said[3]
    assert json.dumps([miss.to_json() for miss in misses])
    assert choose(judged)[0].id in {miss.id for miss in misses}


def test_where_one_passes_nothing_is_given_up() -> None:
    one = Candidate("a", 1, scores(), MEASURED)
    assert closest([(one, [at_most("size_mb", 1, 2)]), (one, [at_most("size_mb", 3, 2)])]) == []
    assert closest_in_words([]) == []


def test_a_score_of_zero_has_a_distance_too() -> None:
    one = Candidate("a", 1, scores(0.0), MEASURED)
    [miss] = closest([(one, [at_least("retention", 0.0, 0.9, "share")])])
    assert np.isfinite(miss.distance)
    assert miss.distance > 10


# --- limits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("limited") / "model"
    write_tiny_classifier(folder)
    return folder


def test_a_process_is_held_to_cores_and_memory(tiny: Path) -> None:
    limits = Limits(memory_bytes=2_000_000_000, cores=1)
    found = measure(tiny, form="classifier", requests=TEXTS, rounds=2, warmup=1, limits=limits)
    assert found.limits is not None
    assert found.limits["cores"] == 1
    assert found.limits["memory_bytes"] == 2_000_000_000
    assert found.limits["memory_by"] in {"cgroup", "rlimit"}
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_model_that_does_not_fit_is_named(tiny: Path) -> None:
    with pytest.raises(DoesNotFitError) as error:
        measure(tiny, form="classifier", requests=TEXTS, rounds=1, limits=Limits(memory_bytes=20_000_000))
    assert error.value.name == "model"
    assert "does not run in 20 MB" in error.value.message
    assert isinstance(error.value, MemoryBudgetError)


def test_a_control_group_is_used_where_one_may_be_made(tmp_path: Path) -> None:
    """A stand-in for the kernel's file system: what is written there, and that it is gone afterwards."""
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self/cgroup").write_text("0::/user/app\n")
    own = root / "user/app"
    own.mkdir(parents=True)
    (own / "cgroup.subtree_control").write_text("cpu memory\n")
    with control_group(5_000_000, root, proc) as group:
        assert group is not None
        assert group.parent == own
        assert (group / "memory.max").read_text() == "5000000"
        (group / "memory.max").unlink()  # the kernel's directories are removed with their files
    assert not group.exists()
    (own / "cgroup.subtree_control").write_text("cpu\n")
    with control_group(5_000_000, root, proc) as group:
        assert group is None
    with control_group(None) as group:
        assert group is None


def test_threads_follow_the_cores_that_may_be_used() -> None:
    code = (
        "import os; from slmops.evaluate.limits import pin_cores; from slmops.runtime.onnx_classifier import "
        "default_threads; pin_cores(1); print(default_threads(0), default_threads(1000), len(os.sched_getaffinity(0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.split() == ["1", "1", "1"]
