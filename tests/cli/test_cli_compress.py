"""``slmops compress`` and ``slmops evaluate`` on a tiny project, as a person calls them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.tiny_models import write_tiny_llama

pytestmark = pytest.mark.slow  # each call is a process that loads torch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, its rows, its teacher; the store is filled by the first test that asks."""
    folder = tmp_path_factory.mktemp("compress")
    write_tiny_llama(folder / "teacher")
    rng = random.Random(1)
    words = {"lost": "my card is lost", "refund": "I want a refund for the fee", "balance": "what is my balance"}
    lines = ["text,label"]
    for number in range(84):
        label = sorted(words)[number % 3]
        lines.append(f"{words[label]} {rng.choice(['please', 'now', 'today'])} {rng.randrange(100)},{label}")
    (folder / "rows.csv").write_text("\n".join(lines))
    raw: dict[str, Any] = {
        "name": "tiny",
        "task": "classification",
        "data": {"train": "rows.csv", "near_duplicates": None},
        "teacher": {"model": str(folder / "teacher"), "adapt_epochs": 2, "learning_rate": 1e-3},
        "student": {"layers": 1, "hidden_size": 64},
        "train": {"epochs": 4, "batch_size": 8, "precision": "fp32", "max_tokens": 64},
        "compress": {"precisions": ["fp32", "int8"], "teacher_precisions": []},
        "evaluate": {"latency_requests": 10, "threads": 1, "untaught_baseline": False},
        "gates": {"retention": 0.1, "format_valid": 0.5, "parity": 0.9},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder


def slmops(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slmops", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=place)


def test_the_table_the_choice_and_the_model(place: Path) -> None:
    done = slmops(place, "compress", "recipe.yaml", "--out", "small")
    assert done.returncode == 0, done.stdout + done.stderr
    told = " ".join(done.stdout.split())
    assert "torch" in told
    assert "int8 *" in told
    assert "…" not in told
    assert "is chosen of 2 forms that pass all gates" in told
    assert (place / "small" / "slmops.json").is_file()
    answered = slmops(place, "chat", "small", "--prompt", "my card is lost", "--json")
    assert json.loads(answered.stdout)["label"] in {"lost", "refund", "balance"}


def test_another_budget_judges_the_same_models(place: Path) -> None:
    shown = slmops(place, "compress", "recipe.yaml", "--set", "budget.size_mb=0.01", "--set", "budget.device=phone")
    assert shown.returncode == 1
    told = " ".join(shown.stdout.split())
    assert "Nothing meets the budget. Closest is student-int8." in told
    assert "would have to give up" in told
    assert "≈ student-int8 on phone, an estimate: p95" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compress", "recipe.yaml", "--set", "budget.device=toaster"], "Known devices: raspberry-pi-4"),
        (["compress", "recipe.yaml", "--out", "teacher"], "There is something at teacher already"),
        (
            ["evaluate", "recipe.yaml", "teacher", "--step", "sideways"],
            "Choose one of converted, merged, pruned, quantized",
        ),
    ],
)
def test_wrong_use(place: Path, arguments: list[str], said: str) -> None:
    done = slmops(place, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in " ".join(done.stderr.split())


def test_one_model_is_scored_and_two_are_compared(place: Path) -> None:
    made = json.loads(slmops(place, "compress", "recipe.yaml", "--json").stdout)
    assert made["chosen"] == "student-int8"
    assert {one["id"] for one in made["variants"]} == {"student-torch", "student-fp32", "student-int8"}
    assert {step["after"] for step in made["drift"]} == {"student-fp32", "student-int8"}
    assert made["closest"] == []
    small = made["model"]
    alone = slmops(place, "evaluate", "recipe.yaml", small, "--json")
    assert alone.returncode == 0, alone.stderr
    scores = json.loads(alone.stdout)["scores"]
    [entry] = [one for one in made["variants"] if one["id"] == "student-int8"]
    assert scores["value"] == entry["score"]["value"]
    both = slmops(place, "evaluate", "recipe.yaml", small, "--against", small)
    assert both.returncode == 0, both.stdout + both.stderr
    assert "same tokens: 100.0 %" in both.stdout
    assert "likeliest the same at 100.0 %" in both.stdout
    strict = ["--set", "gates.drift.quantized={answers_equal: 1.0, kl: 0.0}", "--step", "quantized"]
    checkpoint = next(place.glob(".slmops/artifacts/checkpoint/*/labels.json")).parent
    other = slmops(place, "evaluate", "recipe.yaml", small, "--against", checkpoint, *strict)
    assert other.returncode == 1, other.stdout + other.stderr
    assert "✗ KL" in other.stdout
    assert "Try more bits" in other.stdout


def test_a_bundle_that_is_none(place: Path, tmp_path: Path) -> None:
    done = slmops(place, "evaluate", "recipe.yaml", tmp_path)
    assert done.returncode == 1
    assert "holds no model" in done.stderr


@pytest.mark.parametrize(
    ("verb", "word"), [("compress", "budget.size_mb=5"), ("evaluate", "--against base-and-adapter")]
)
def test_the_help_teaches(place: Path, verb: str, word: str) -> None:
    assert word in slmops(place, verb, "--help").stdout
