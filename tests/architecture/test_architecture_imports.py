"""Imports go one way, stages are independent, and starting is cheap."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "alembic", "datasets", "fastapi", "httpx", "jinja2", "matplotlib", "numpy", "onnx", "onnxruntime",
    "onnxruntime_genai", "openai", "peft", "pyarrow", "pydantic", "rich", "sklearn", "sqlalchemy", "tokenizers",
    "torch", "transformers", "uvicorn", "yaml",
}  # fmt: skip
TRAINING = HEAVY - {"numpy", "pydantic", "yaml", "jinja2", "tokenizers"}
STAGES = ("data", "distill", "compress", "evaluate", "package", "serve")


def loaded_by(module: str) -> set[str]:
    """Top-level modules in a fresh process after ``import module``."""
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_contracts_hold(repository: Path) -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("module", ["slmops", "slmops.cli.app"])
def test_starting_loads_nothing_heavy(module: str) -> None:
    assert not loaded_by(module) & HEAVY


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_top_is_cheap(stage: str) -> None:
    assert not loaded_by(f"slmops.{stage}") & (TRAINING - {"rich"})


@pytest.mark.parametrize("module", ["artifacts", "chat", "errors", "models", "recipe", "runtime", "store", "trust"])
def test_the_lower_layers_are_cheap(module: str) -> None:
    assert not loaded_by(f"slmops.{module}") & TRAINING
