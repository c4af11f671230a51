"""The whole way round on loopback, in a network namespace without any route where the system allows one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from flow_on_loopback import TEXTS
from pipeline_helpers import Place, write_rows

from fakes.tiny_models import write_tiny_llama
from skipping import skip_or_fail

HERE = Path(__file__).resolve().parent
FLOW = HERE / "flow_on_loopback.py"
WATCHED = HERE.parent / "fakes" / "watched_network"
OWN_NETWORK = ["unshare", "--map-root-user", "--net"]
POLICY = {
    "shares": [0.2, 0.5],
    "shadow_requests": 30,
    "step_requests": 20,
    "answered_margin": 0.2,
    "quick_margin": 0.5,
    "slow_factor": 50,
}


def own_network() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*OWN_NETWORK, "true"], capture_output=True).returncode == 0


def environment(log: Path, *, apart: bool) -> dict[str, str]:
    path = os.pathsep.join([str(WATCHED), *filter(None, [os.environ.get("PYTHONPATH")])])
    told = {"PYTHONPATH": path, "SLMOPS_WATCHED_NETWORK": str(log), "OMP_NUM_THREADS": "1"}
    plain = {name: value for name, value in os.environ.items() if name != "SLMOPS_STORE"}
    return {**plain, **told, **({"SLMOPS_OWN_NETWORK": "1"} if apart else {})}


@dataclass(frozen=True)
class Flow:
    told: dict[str, Any]
    attempts: list[str]
    apart: bool


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Flow:
    folder = tmp_path_factory.mktemp("flow")
    write_tiny_llama(folder / "teacher")
    write_rows(folder / "all.csv", 120)
    lines = (folder / "all.csv").read_text().splitlines(keepends=True)
    (folder / "rows.csv").write_text("".join(line for line in lines if not line.rstrip().endswith(",refund")))
    recipe = Place(folder).raw(
        compress={"precisions": ["fp32"], "teacher_precisions": []},
        evaluate={"latency_requests": 5, "threads": 1, "untaught_baseline": False},
        improve={"old_loss_points": 10},
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "policy.yaml").write_text(yaml.safe_dump(POLICY))
    log, apart = folder / "network.log", own_network()
    command = [*(OWN_NETWORK if apart else []), sys.executable, str(FLOW), str(folder)]
    ran = subprocess.run(command, env=environment(log, apart=apart), capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr[-4000:]
    attempts = log.read_text().splitlines() if log.exists() else []
    return Flow(json.loads(ran.stdout.splitlines()[-1]), attempts, apart)


def test_feedback_becomes_a_version_that_knows_more(flow: Flow) -> None:
    told = flow.told
    assert told["feedback"]["correction"] >= 30
    assert told["learnt"]["new_labels"] == ["refund"]
    assert told["learnt"]["sources"]["correction"] >= 20
    assert told["improved"]["passed"], told["improved"]["verdict"]
    assert told["improved"]["corrections"]["new_labels"] == ["refund"]
    assert told["outcome"] == "over"
    assert told["events"] == ["begun", "further", "further", "over"]
    assert {text: label for label, text in TEXTS.items()} == told["labels"]
    assert "feedback" in told["sources"]


def test_no_request_fails_on_the_way(flow: Flow) -> None:
    assert set(flow.told["statuses"]) == {"200"}
    assert flow.told["statuses"]["200"] > 50


def test_nothing_reaches_for_the_network(flow: Flow) -> None:
    """Neither Python, by its audit events, nor, in a namespace without routes, anything else, by the kernel's count."""
    assert flow.attempts == []
    if not flow.apart:
        skip_or_fail("a network namespace: unshare --map-root-user --net")
    assert flow.told["sent_nowhere"] == 0


def test_the_watching_sees_what_reaches_out(tmp_path: Path) -> None:
    if not own_network():
        skip_or_fail("a network namespace: unshare --map-root-user --net")
    log = tmp_path / "network.log"
    command = [*OWN_NETWORK, sys.executable, str(FLOW), "--reach-out"]
    ran = subprocess.run(command, env=environment(log, apart=True), capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout)["sent_nowhere"] >= 1
    assert "socket.connect 192.0.2.1" in log.read_text()
    assert "socket.getaddrinfo example" in log.read_text()
