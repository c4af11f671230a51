"""Devices as data, and what a recipe makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slmops.errors import RecipeError, UsageError
from slmops.hardware import device_profile, device_profiles
from slmops.recipe import BudgetConfig, load_recipe, parse_recipe

NAMES = {"raspberry-pi-4", "raspberry-pi-5", "jetson-orin-nano", "phone", "laptop", "small-server"}


def test_the_profiles_make_sense() -> None:
    found = device_profiles()
    assert set(found) == NAMES
    for profile in found.values():
        assert 0 < profile.model_memory_mb < profile.memory_mb
        assert 0 < profile.core_gflops < profile.gflops <= profile.cores * profile.core_gflops * 1.2
        assert profile.bandwidth_gb_s > 0
        assert profile.instructions
        assert profile.basis
    assert found["raspberry-pi-4"].gflops < found["raspberry-pi-5"].gflops < found["small-server"].gflops


def test_an_unknown_device_is_told_with_the_known_ones() -> None:
    with pytest.raises(UsageError) as error:
        device_profile("raspbery-pi-5")
    assert "Did you mean raspberry-pi-5?" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


def test_a_recipe_with_an_unknown_device_names_line_and_devices(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: a\ntask: classification\ndata: {train: x.csv}\nbudget:\n  device: toaster\n")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert error.value.line == 5
    assert "'toaster'" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


def test_a_device_fills_in_what_was_not_written() -> None:
    assert BudgetConfig(device="phone").with_device() == BudgetConfig(device="phone", size_mb=500, memory_mb=1500)
    own = BudgetConfig(device="phone", size_mb=20, latency_ms_p95=5).with_device()
    assert (own.size_mb, own.memory_mb, own.latency_ms_p95) == (20, 1500, 5)
    assert BudgetConfig(size_mb=1).with_device() == BudgetConfig(size_mb=1)


@pytest.mark.parametrize(
    ("task", "budget", "said"),
    [
        ("classification", {"memory_mb": 5}, "memory_mb is 5"),
        ("classification", {"tokens_per_s": 5}, "use budget.latency_ms_p95"),
        ("qa", {"size_mb": 0}, "size_mb is 0"),
        ("qa", {"latency_ms_p95": -1}, "latency_ms_p95 is -1"),
        ("qa", {"latency_ms": 1}, "Did you mean latency_ms_p95?"),
    ],
)
def test_impossible_budgets_are_refused_before_any_work(task: str, budget: dict[str, float], said: str) -> None:
    raw = {"name": "a", "task": task, "data": {"train": "x.csv"}, "budget": budget}
    with pytest.raises(RecipeError) as error:
        parse_recipe(raw)
    assert said in str(error.value)
