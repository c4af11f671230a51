"""Runs the stage on small files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from slmops.artifacts import Dataset, Row, drafting
from slmops.data import prepare
from slmops.recipe import DataConfig, Task


@dataclass(frozen=True)
class Prepared:
    """A finished data set, read back."""

    dataset: Dataset

    @property
    def summary(self) -> dict[str, Any]:
        return self.dataset.summary

    @property
    def splits(self) -> dict[str, list[Row]]:
        return {split: list(self.dataset.rows(split)) for split in ("train", "validation", "test")}

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.splits.values() for row in rows]

    @property
    def quarantine(self) -> list[dict[str, Any]]:
        lines = (self.dataset.path / "quarantine.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def reasons(self) -> dict[int, str]:
        return {bad["row"]: bad["reason"] for bad in self.quarantine}


Run = Callable[..., Prepared]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """``run(train=path, task=..., seed=..., fetch_hub=..., **config)``, the paths of files or folders."""
    count = 0

    def _run(*, task: Task = "classification", seed: int = 0, fetch_hub: Any = None, **config: Any) -> Prepared:
        nonlocal count
        count += 1
        destination = tmp_path / f"prepared-{count}"
        places = {role: str(config[role]) for role in ("train", "validation", "test") if role in config}
        with drafting("dataset", destination) as draft:
            prepare(DataConfig(**{**config, **places}), task, seed, draft, fetch_hub=fetch_hub)
        prepared = Prepared(Dataset.open(destination))
        prepared.dataset.verify()
        return prepared

    return _run


WORDS = (
    *("amber", "basket", "candle", "dragon", "eleven", "forest", "garden", "hammer", "island", "jungle", "kettle"),
    *("lantern", "marble", "needle", "orange", "pepper", "quartz", "ribbon", "saddle", "temple", "umbrella", "velvet"),
    *("window", "yellow", "zephyr", "anchor", "bridge", "copper", "desert", "engine", "falcon", "guitar"),
)


def distinct_text(number: int) -> str:
    """A text that is nearly the same as no other: three words that the digits of ``number`` choose, twice over."""
    first, second, third = number % 32, number // 32 % 32, number // 1024 % 32
    return (
        f"{WORDS[first]} {WORDS[second]} {WORDS[third]} {WORDS[(first + 7) % 32]}{number} {WORDS[(second + 13) % 32]}"
    )


@pytest.fixture
def rows_of() -> Callable[[int, int], list[dict[str, str]]]:
    """``rows_of(rows, labels)``: distinct texts, labels in turn."""
    return lambda rows, labels: [
        {"text": distinct_text(number * 37), "label": f"label-{number % labels}"} for number in range(rows)
    ]


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def _write(rows: list[Mapping[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return path

    return _write
