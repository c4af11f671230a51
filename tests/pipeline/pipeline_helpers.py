"""A small project for the tests of whole runs: a recipe that takes seconds, and what a finished run left."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.pipeline import RunResult
from slmops.progress import Progress
from slmops.recipe import Recipe, parse_recipe

WORDS_OF = {
    "balance": "what is the balance of my account please",
    "lost": "my card is lost and I want a new card",
    "refund": "I want a refund for the fee now",
}
FILLER = ["hello", "how", "are", "you", "today", "tell", "me", "where", "it", "is"]


def write_rows(path: Path, count: int = 84) -> None:
    rng = random.Random(1)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for number in range(count):
            label = sorted(WORDS_OF)[number % 3]
            words = [*WORDS_OF[label].split(), *rng.sample(FILLER, 3)]
            rng.shuffle(words)
            writer.writerow([" ".join(words), label])


@dataclass(frozen=True)
class Place:
    """Where a small project lies: the teacher's folder and the table."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def raw(self, **sections: Any) -> dict[str, Any]:
        """A recipe that takes seconds; a section given is merged with the one here."""
        raw: dict[str, Any] = {
            "name": "tiny",
            "task": "classification",
            "data": {"train": str(self.folder / "rows.csv"), "near_duplicates": None},
            "teacher": {"model": str(self.teacher), "adapt_epochs": 4, "learning_rate": 1e-3},
            "student": {"layers": 1, "hidden_size": 64},
            "train": {"epochs": 8, "batch_size": 8, "precision": "fp32", "max_tokens": 64},
            "compress": {"precisions": ["fp32", "int8"], "teacher_precisions": []},
            "evaluate": {"latency_requests": 10, "threads": 1},
            "gates": {"retention": 0.1, "format_valid": 0.5, "parity": 0.9},
        }
        for name, section in sections.items():
            raw[name] = {**raw.get(name, {}), **section} if isinstance(section, dict) else section
        return raw

    def recipe(self, **sections: Any) -> Recipe:
        return parse_recipe(self.raw(**sections))


@dataclass(frozen=True)
class Done:
    """A finished run."""

    place: Place
    store: Path
    result: RunResult
    events: list[Progress]
    wall_s: float
