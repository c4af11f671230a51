"""``slmops run``: what a person and a program see, and the exit codes 0, 1, 2 and 130."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.tiny_models import write_tiny_llama
from slmops.cli import main
from slmops.cli.run import bytes_in_words
from slmops.evaluate.summary import REQUIRED_KEYS

WORDS_OF = {
    "balance": "what is the balance of my account",
    "lost": "my card is lost",
    "fee": "please refund the fee now",
}


@dataclass(frozen=True)
class Called:
    code: int
    out: str
    err: str


Call = Callable[..., Called]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command in this process, as the installed script calls it."""

    def called(*arguments: str | Path) -> Called:
        monkeypatch.setattr(sys, "argv", ["slmops", *map(str, arguments)])
        try:
            main()
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        else:
            code = 0
        captured = capsys.readouterr()
        return Called(code, captured.out, captured.err)

    return called


def process(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slmops", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=590)


def write_project(folder: Path) -> Path:
    write_tiny_llama(folder / "teacher")
    rng = random.Random(0)
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(60):
            label = sorted(WORDS_OF)[number % 3]
            words = [
                *WORDS_OF[label].split(),
                *rng.sample(["hello", "how", "are", "you", "today", "tell", "me", "where", "it", "is"], 3),
            ]
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])
    recipe = {
        "name": "tiny",
        "task": "classification",
        "data": {"train": "rows.csv", "near_duplicates": None},
        "teacher": {"model": "teacher", "adapt_epochs": 2},
        "student": {"layers": 1, "hidden_size": 64},
        "train": {"epochs": 2, "batch_size": 8, "precision": "fp32", "max_tokens": 64},
        "compress": {"precisions": ["fp32"], "teacher_precisions": []},
        "evaluate": {"latency_requests": 5, "threads": 1, "untaught_baseline": False},
        "gates": {"retention": 0.0, "format_valid": 0.5, "parity": 1.0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return folder


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return write_project(tmp_path_factory.mktemp("cli-project"))


@dataclass(frozen=True)
class Finished:
    recipe: Path
    store: Path
    completed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(project: Path) -> Finished:
    """A run in a process of its own, from another folder, with --json."""
    store = project / "store"
    completed = process("run", project / "recipe.yaml", "--store", store, "--json")
    return Finished(project / "recipe.yaml", store, completed)


# --- done -------------------------------------------------------------------------------------------------------


def test_json_prints_one_object_and_nothing_else(finished: Finished) -> None:
    """Whatever the libraries below like to print: standard output belongs to the report."""
    assert finished.completed.returncode == 0, finished.completed.stderr
    report = json.loads(finished.completed.stdout)
    assert finished.completed.stdout.count("\n") == 1
    assert set(REQUIRED_KEYS) <= report.keys()
    assert report == json.loads((finished.store / "runs" / "tiny" / "report.json").read_text())


def test_progress_is_plain_lines_without_a_terminal(finished: Finished) -> None:
    lines = finished.completed.stderr.splitlines()
    assert any(line.startswith("adapt teacher: ") and "steps" in line for line in lines)
    assert any(line.startswith("student: ") for line in lines)
    assert "\x1b" not in finished.completed.stderr
    assert "Traceback" not in finished.completed.stderr
    assert "warning" not in finished.completed.stderr.lower(), finished.completed.stderr


def test_a_person_sees_a_table_the_gates_and_where_things_are(finished: Finished, call: Call) -> None:
    shown = call("run", finished.recipe, "--store", finished.store)
    assert shown.code == 0
    report = json.loads((finished.store / "runs" / "tiny" / "report.json").read_text())
    for part in (
        "tiny: accuracy on",
        "teacher (torch fp32)",
        "student-fp32 *",
        "* in the bundle",
        "baseline: majority",
    ):
        assert part in shown.out
    assert "✓ retention" in shown.out
    assert report["verdict"].split()[0] in shown.out
    assert "Everything was done before" in shown.out
    assert str(finished.store / "runs" / "tiny" / "bundle") in shown.out.replace("\n", "")
    assert "[bold]" not in shown.out


def test_another_place_for_the_result(finished: Finished, call: Call, tmp_path: Path) -> None:
    assert call("run", finished.recipe, "--store", finished.store, "--out", tmp_path / "here").code == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"report.json", "report.html", "bundle"}


def test_the_store_may_be_named_by_the_environment(
    finished: Finished, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLMOPS_STORE", str(finished.store))
    shown = call("run", finished.recipe, "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["bundle"].startswith(str(finished.store))


def test_the_bundle_of_a_run_verifies(finished: Finished, call: Call) -> None:
    assert call("verify", finished.store / "runs" / "tiny" / "bundle").code == 0


def test_a_recipe_means_the_same_from_any_folder(
    finished: Finished, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Everything was done before" in call("run", finished.recipe, "--store", finished.store).out


# --- exit code 1: a gate, or the input --------------------------------------------------------------------------


def test_a_failing_gate_is_exit_code_1_after_the_report(finished: Finished, call: Call) -> None:
    arguments = ("run", finished.recipe, "--store", finished.store, "--set", "gates.retention=7")
    shown = call(*arguments)
    assert shown.code == 1
    assert "✗ retention" in shown.out
    assert "limit ≥ 7" in shown.out
    assert shown.err.count("error") == 0
    as_json = call(*arguments, "--json")
    assert as_json.code == 1
    assert json.loads(as_json.out)["passed"] is False
    assert call("run", finished.recipe, "--store", finished.store).code == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("data.train=nowhere.csv", ["There is no file", "nowhere.csv", "try: Check data.train"]),
        ("data.input={txet}", ["There is no column 'txet'", "Did you mean 'text'?", "Set data.input"]),
        ("teacher.model=/no/such/model", ["/no/such/model", "try: "]),
    ],
)
def test_input_that_cannot_be_used(project: Path, call: Call, tmp_path: Path, change: str, words: list[str]) -> None:
    shown = call("run", project / "recipe.yaml", "--store", tmp_path / "store", "--set", change)
    assert shown.code == 1
    assert shown.out == ""
    for part in words:
        assert part in shown.err
    assert shown.err.startswith("error: ") or "\nerror: " in shown.err
    assert "Traceback" not in shown.err


def test_rows_would_leave_the_machine(project: Path, call: Call, tmp_path: Path) -> None:
    changes = ("--set", "teacher.model=openai:x", "--set", "teacher.base_url=https://teacher.example/v1")
    shown = call("run", project / "recipe.yaml", "--store", tmp_path / "store", *changes)
    assert shown.code == 1
    assert "teacher.example" in shown.err
    assert "Set privacy: remote" in shown.err


def test_a_store_that_is_a_file(project: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = call("run", project / "recipe.yaml", "--store", tmp_path / "file")
    assert shown.code == 1
    assert "Choose a directory for --store" in shown.err


# --- exit code 2: the recipe or the command line ----------------------------------------------------------------


def edited(project: Path, tmp_path: Path, edit: Callable[[str], str]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(edit((project / "recipe.yaml").read_text()))
    return path


@pytest.mark.parametrize(
    ("edit", "line", "words"),
    [
        (lambda t: t.replace("  train: rows.csv", "  trian: rows.csv"), 4, ["Unknown key data.trian", "mean train?"]),
        (lambda t: t.replace("task: classification", "task: clasify"), 2, ["task is 'clasify'"]),
        (lambda t: t.replace("  adapt_epochs: 2", "  adapt_epochs: many"), 8, ["teacher.adapt_epochs is 'many'"]),
        (lambda t: t.replace("  layers: 1", "  layers: -1"), 10, ["student.layers is -1"]),
        (lambda t: t.replace("name: tiny", "name: Not Good"), 1, ["name is 'Not Good'"]),
        (lambda t: t.replace("  train: rows.csv\n", ""), 3, ["The key data.train is missing"]),
        (lambda t: t + "privcy: local\n", 29, ["Unknown key privcy", "mean privacy?"]),
        (
            lambda t: t.replace("rows.csv", "rows.csv\n  input: {text}"),
            5,
            ["data.input is", "quotes", 'input: "{text}"'],
        ),
        (lambda t: t.replace("name: tiny", "name: [tiny"), 2, ["This is not YAML"]),
    ],
)
def test_a_wrong_recipe_names_line_value_and_remedy(
    project: Path, call: Call, tmp_path: Path, edit: Callable[[str], str], line: int, words: list[str]
) -> None:
    path = edited(project, tmp_path, edit)
    shown = call("run", path, "--store", tmp_path / "store")
    assert shown.code == 2
    found = [number for number in range(1, 40) if f"{path}:{number}: " in shown.err]
    assert found == [line], shown.err
    for part in words:
        assert part in shown.err
    assert not (tmp_path / "store").exists(), "work was begun"


def test_a_missing_recipe(call: Call, tmp_path: Path) -> None:
    shown = call("run", tmp_path / "none.yaml")
    assert shown.code == 2
    assert f"There is no recipe at {tmp_path / 'none.yaml'}." in shown.err
    assert "slmops init" in shown.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("gates.retention", "is not KEY=VALUE"),
        ("gates.retenton=1", "Did you mean retention?"),
        ("name.first=x", "name holds a value, not a section"),
        ("seed=one", "seed is 'one'"),
        ("compress.precisions=[]", "compress.precisions"),
        ("compress.choose=int4", "not among compress.precisions"),
        ("train.precision=int8", "train.precision is 'int8'"),
        ("data.target=null", "only after it has seen labelled rows"),
    ],
)
def test_a_wrong_set(project: Path, call: Call, tmp_path: Path, change: str, words: str) -> None:
    shown = call("run", project / "recipe.yaml", "--store", tmp_path / "store", "--set", change)
    assert shown.code == 2
    assert words in shown.err


def test_no_recipe_and_unknown_options_are_wrong_use(call: Call) -> None:
    assert call("run").code == 2
    shown = call("run", "recipe.yaml", "--jsno")
    assert shown.code == 2
    assert "--jsno" in shown.err


def test_in_a_process_of_its_own(project: Path, tmp_path: Path) -> None:
    """The same exit codes and texts for a program that calls the command."""
    wrong = process("run", edited(project, tmp_path, lambda t: t.replace("task:", "tsak:")), "--store", tmp_path / "s")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.splitlines()[0].startswith(f"error: {tmp_path / 'recipe.yaml'}:")
    assert process("run", tmp_path / "recipe.yaml", "--frob").returncode == 2


@pytest.mark.slow
def test_interrupted_is_130_and_the_next_run_goes_on(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slmops", "run", str(project / "recipe.yaml"), "--store", str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    # Whoever runs the tests in the background may have the signal ignored, which a child would inherit.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    finally:
        signal.signal(signal.SIGINT, ours)
    assert running.stderr is not None
    seen = []
    for line in running.stderr:
        seen.append(line)
        if line.startswith("adapt teacher"):
            running.send_signal(signal.SIGINT)
            break
    _, rest = running.communicate(timeout=300)
    assert running.returncode == 130, "".join(seen) + rest
    assert "Traceback" not in rest
    again = process("run", project / "recipe.yaml", "--store", tmp_path / "store", "--json")
    assert again.returncode == 0, again.stderr
    assert "data: 1 stage, done before" in again.stderr


# --- words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [
        (None, ""),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_130_000, "2.1 MB"),
        (269_000_000, "269 MB"),
        (5e9, "5.0 GB"),
    ],
)
def test_bytes_in_words(size_bytes: float | None, words: str) -> None:
    assert bytes_in_words(size_bytes) == words


def test_a_remote_teacher_has_no_size_in_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What is not known is left blank, not shown as None."""
    from slmops.cli.run import show_report

    def entry(name: str, known: bool) -> dict[str, Any]:
        return {
            "id": name,
            "score": {"value": 0.9, "ci95": [0.8, 1.0], "rows": 10},
            "parameters": 1000 if known else None,
            "size_bytes": 1000 if known else None,
            "memory_bytes_peak": 1000 if known else None,
            "latency_ms": {"p50": 1.0 if known else None},
            "runtime": "onnx" if known else "openai:x",
            "precision": "int8" if known else None,
        }

    report = {
        "name": "n",
        "metric": "accuracy",
        "teacher": entry("teacher", False),
        "student": entry("student-int8", True),
        "variants": [entry("student-int8", True)],
        "baselines": {"majority": {**entry("majority", False), "latency_ms": {"p50": None}}},
        "gates": [{"name": "g", "value": 1.0, "limit": 0.5, "passed": True, "direction": "at_least", "note": ""}],
        "verdict": "It [bold]holds[/].",
    }
    show_report(report, tmp_path, reused=False)
    shown = capsys.readouterr().out
    assert "teacher (openai:x)" in shown
    assert "None" not in shown
    assert "It [bold]holds[/]." in shown
