"""``slmops trace`` and ``slmops doctor``, as a person and as a program call them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from slmops.artifacts import Artifact, Dataset, Report
from slmops.cli.app import app
from slmops.cli.doctor import (
    VERBS,
    Check,
    check_cores,
    check_disk,
    check_extra,
    check_flags,
    check_memory,
    check_offline,
    check_python,
    check_store,
    check_telemetry,
    cpu_flags,
    cpu_quota,
    examine,
    free_memory_bytes,
    requirements_of,
)
from slmops.cli.telemetry import SWITCHES, silence_telemetry
from slmops.cli.trace import key_metrics
from slmops.store import Store


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from slmops.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


# --- trace ------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Artifact]:
    def build(draft: Any) -> None:
        (draft.path / "x").write_text(str(draft.work.name))
        draft.metrics |= {"accuracy": 0.91234567, "rows": 7, "by": {"class": 1}}

    with Store.open(tmp_path / "store") as store:
        data = store.stage("data", Dataset, inputs={"train": "a" * 64}, config={}, code_version="1", build=build)
        inputs = {"data": data.artifact}
        report = store.stage("evaluate", Report, inputs=inputs, config={}, code_version="1", build=build)
    return {"data": data.artifact, "report": report.artifact}


def test_trace_draws_what_was_made_from_what(tmp_path: Path, made: dict[str, Artifact]) -> None:
    up = run("trace", made["report"].digest[:8], "--store", tmp_path / "store")
    assert up.exit_code == 0
    lines = up.stdout.splitlines()
    assert lines[0].startswith(f"report {made['report'].digest[:12]} evaluate")
    assert lines[0].endswith("accuracy=0.9123, rows=7")
    assert "made from" in lines[1]
    assert f"dataset {made['data'].digest[:12]} data" in lines[2]
    assert "source aaaaaaaaaaaa train" in lines[3]
    assert len(lines) == 4
    down = run("trace", made["data"].path, "--store", tmp_path / "store")
    assert "used in" in down.stdout
    assert f"report {made['report'].digest[:12]} evaluate" in down.stdout


def test_trace_for_machines(tmp_path: Path, made: dict[str, Artifact]) -> None:
    result = process("trace", made["data"].manifest.key[:10], "--json", SLMOPS_STORE=str(tmp_path / "store"))
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["artifact"] == made["data"].manifest.key
    assert answer["descendants"] == [made["report"].manifest.key]
    assert answer["ancestors"] == ["a" * 64]
    assert {node["kind"] for node in answer["nodes"]} == {"dataset", "report", "source"}
    assert {(edge["from"], edge["role"]) for edge in answer["edges"]} == {
        ("a" * 64, "train"),
        (made["data"].manifest.key, "data"),
    }


def test_trace_of_nothing_is_one_sentence_and_makes_no_store(tmp_path: Path) -> None:
    result = process("trace", "abcdef", "--store", tmp_path / "none")
    assert result.returncode == 1
    assert "error: There is no artifact 'abcdef'" in result.stderr
    assert "try: The store is empty" in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "none").exists()


def test_trace_of_a_damaged_artifact_names_the_file(tmp_path: Path, made: dict[str, Artifact]) -> None:
    (made["data"].path / "manifest.json").write_text("{")
    result = process("trace", made["data"].path, "--store", tmp_path / "store")
    assert result.returncode == 1
    assert "manifest.json is damaged" in result.stderr


def test_trace_of_a_shipped_copy_needs_no_store(tmp_path: Path, made: dict[str, Artifact]) -> None:
    shutil.copytree(made["report"].path, tmp_path / "copy")
    result = run("trace", tmp_path / "copy", "--store", tmp_path / "none")
    assert result.exit_code == 0
    assert f"missing {made['data'].digest[:12]} data" in result.stdout


def test_markup_in_names_is_shown_as_it_is(tmp_path: Path) -> None:
    with Store.open(tmp_path / "store") as store:
        artifact = store.stage(
            "[bold]x[/]", Report, inputs={}, config={}, code_version="1", build=lambda draft: None
        ).artifact
    result = run("trace", artifact.path, "--store", tmp_path / "store")
    assert "[bold]x[/]" in result.stdout


def test_key_metrics_are_the_first_short_ones() -> None:
    metrics = {"f1": 1 / 3, "note": "x" * 80, "ok": True, "empty": None, "by": {}, "rows": 12, "unit": "s", "more": 1}
    assert key_metrics(metrics) == "f1=0.3333, ok=True, rows=12, unit=s"
    assert key_metrics({}) == ""


# --- doctor -----------------------------------------------------------------------------------------------------


def test_doctor_answers_for_people_and_machines(tmp_path: Path) -> None:
    shown = process("doctor", "--store", tmp_path / "store")
    answered = process("doctor", "--json", "--store", tmp_path / "store")
    assert shown.returncode == answered.returncode == 0, shown.stdout
    answer = json.loads(answered.stdout)
    names = [check["name"] for check in answer["checks"]]
    assert names[:6] == ["python", "cores", "memory", "disk", "store", "cpu"]
    assert {"slmops", "slmops[serve]", "slmops[train]", "telemetry", "offline"} <= set(names)
    assert answer["ok"] is True
    assert {check["status"] for check in answer["checks"]} <= {"ok", "warn"}
    assert all(name in shown.stdout for name in names)
    assert not (tmp_path / "store").exists()


def test_doctor_fails_with_a_remedy_where_the_store_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("doctor", "--store", tmp_path / "file")
    assert result.exit_code == 1
    assert "fail store" in result.stdout
    assert "try: Choose a directory for --store." in result.stdout


def test_doctor_asks_nothing_but_the_standard_library_and_what_the_device_has(tmp_path: Path) -> None:
    code = """
import sys
for name in ("psutil", "sqlalchemy", "torch", "transformers", "fastapi", "packaging", "numpy"):
    sys.modules[name] = None
sys.argv[1:] = ["doctor", "--json"]
from slmops.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["ok"] is True


@pytest.mark.parametrize(
    ("check", "status"),
    [
        (check_python((3, 10), "3.10.1"), "fail"),
        (check_cores(1), "warn"),
        (check_memory(100), "warn"),
        (check_memory(None), "warn"),
        (check_disk(Path("s"), 1 << 20), "fail"),
        (check_disk(Path("s"), 1 << 30), "warn"),
        (check_flags(()), "warn"),
        (check_flags(None), "warn"),
        (check_telemetry({}), "warn"),
        (check_store(Path("/proc/slmops")), "fail"),
    ],
)
def test_every_warning_and_failure_says_what_to_do(check: Check, status: str) -> None:
    assert check.status == status
    assert check.remedy


def test_a_good_machine_is_told_so() -> None:
    good = [check_python((3, 12), ""), check_cores(2), check_memory(1 << 33), check_disk(Path("s"), 1 << 34)]
    assert {check.status for check in good} == {"ok"}


def test_the_instructions_of_processors() -> None:
    intel = "processor : 0\nflags\t\t: fpu sse2 avx2 avx512f avx512_vnni amx_tile\n"
    assert cpu_flags(intel, "x86_64") == ("avx2", "avx512", "vnni", "amx")
    arm = "processor : 0\nFeatures\t: fp asimd evtstrm asimddp i8mm\n"
    assert cpu_flags(arm, "aarch64") == ("neon", "dotprod", "i8mm")
    assert cpu_flags("", "arm64") == ("neon",)
    assert cpu_flags("", "riscv64") is None
    assert check_flags(("neon",)).status == "ok"


def test_memory_is_what_the_container_leaves() -> None:
    meminfo = "MemTotal: 100 kB\nMemAvailable:    64 kB\n"
    assert free_memory_bytes(meminfo, None) == 65536
    assert free_memory_bytes(meminfo, 1000) == 1000
    assert free_memory_bytes(meminfo, 1 << 40) == 65536
    assert free_memory_bytes("", 5) == 5


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000\n", None), ("200000 100000\n", 2), ("50000 100000", 1), ("", None), ("x", None)]
)
def test_the_share_of_a_container(text: str, cores: int | None) -> None:
    assert cpu_quota(text) == cores


LINES = ["numpy>=2.0", "torch>=2.9; extra == 'train'", 'slmops[serve]; extra == "train"', "uvicorn; extra == 'serve'"]


def test_requirements_of_an_extra() -> None:
    assert requirements_of("", LINES) == {"numpy": "2.0"}
    assert requirements_of("train", LINES) == {"torch": "2.9"}
    assert requirements_of("serve", LINES) == {"uvicorn": "0"}


def test_what_is_missing_or_too_old_is_named_with_the_verbs_that_need_it() -> None:
    versions = {"torch": "2.13.0+cpu", "peft": "0.9.1"}
    fine = check_extra("train", {"torch": "2.9"}, versions.get)
    assert (fine.status, fine.detail, fine.remedy) == ("ok", "torch 2.13.0+cpu", None)
    bad = check_extra("train", {"torch": "2.9", "peft": "0.18", "gguf": "0.17"}, versions.get)
    assert bad.status == "warn"
    assert "missing: gguf" in bad.detail
    assert "peft 0.9.1 (needs 0.18)" in bad.detail
    assert all(verb in bad.detail for verb in VERBS["train"])
    assert bad.remedy == "Install it: pip install 'slmops[train]'"
    assert check_extra("", {"numpy": "2.0"}, {}.get).status == "fail"


def test_every_verb_is_told_with_the_size_that_it_needs() -> None:
    verbs = [verb for named in VERBS.values() for verb in named]
    assert sorted(verbs) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def test_telemetry_is_off_from_the_start_and_a_switch_that_is_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    silence_telemetry()
    assert os.environ["HF_HUB_DISABLE_TELEMETRY"] == "1"
    check = check_telemetry(os.environ)
    assert (check.status, check.detail) == ("warn", "not off: DO_NOT_TRACK")
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    assert check_telemetry(os.environ).status == "ok"


def test_offline_mode_is_told() -> None:
    assert check_offline({"HF_HUB_OFFLINE": "1"}).detail.startswith("on (HF_HUB_OFFLINE)")
    assert check_offline({"HF_HUB_OFFLINE": "0"}).detail.startswith("off")


def test_examining_writes_nothing(tmp_path: Path) -> None:
    examine(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
