"""Small data sets and objectives for the tests of stage 2."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slmops.artifacts import Dataset, Draft, Message, Row, drafting

WORDS_OF = {
    "balance": "what is the balance of my account please",
    "lost": "my card is lost and I want a new card",
    "refund": "I want a refund for the fee now",
}
FILLER = ["hello", "how", "are", "you", "today", "tell", "me", "where", "it", "is"]


def toy_rows(count: int, seed: int, *, prefix: str = "r") -> list[Row]:
    """Rows whose label is told by their words, in another order each time."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = sorted(WORDS_OF)[number % len(WORDS_OF)]
        words = [*WORDS_OF[label].split(), *rng.sample(FILLER, rng.randint(0, 4))]
        rng.shuffle(words)
        rows.append(Row(f"{prefix}{number}", (Message("user", " ".join(words)),), label))
    return rows


def make_dataset(folder: Path, splits: Mapping[str, Sequence[Row]], labels: Sequence[str] | None = None) -> Dataset:
    with drafting("dataset", folder) as draft:
        for split in ("train", "validation", "test"):
            lines = [json.dumps(row.to_json()) + "\n" for row in splits.get(split, ())]
            (draft.path / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        summary = {"labels": None if labels is None else list(labels)}
        (draft.path / "summary.json").write_text(json.dumps(summary), "utf-8")
    return Dataset.open(folder)


def toy_dataset(folder: Path, *, train: int = 48, validation: int = 24) -> Dataset:
    splits = {"train": toy_rows(train, 0), "validation": toy_rows(validation, 1, prefix="v")}
    return make_dataset(folder, splits, sorted(WORDS_OF))


def make_draft(folder: Path) -> Draft:
    out, work = folder / "out", folder / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    return Draft(out, work)


@dataclass
class Regression:
    """An objective over plain tensors: which of ``classes`` a row of numbers belongs to."""

    rows: int = 64
    width: int = 8
    classes: int = 3
    poison_step: int | None = None
    validation_losses: list[float] | None = None
    seen: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(self.rows, self.width, generator=generator)
        self.y = (self.x @ torch.randn(self.width, self.classes, generator=generator)).argmax(dim=-1)
        self.validated = 0

    @property
    def lengths(self) -> list[int]:
        return [1 + index % 7 for index in range(self.rows)]

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        self.seen.append(list(indices))
        x = self.x[list(indices)]
        if self.poison_step is not None and len(self.seen) >= self.poison_step:
            x = x * torch.nan
        return {"x": x, "y": self.y[list(indices)]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]).float(), batch["y"])

    def validate(self, model: nn.Module) -> dict[str, float]:
        self.validated += 1
        if self.validation_losses is not None:
            return {"loss": self.validation_losses[min(self.validated, len(self.validation_losses)) - 1]}
        logits = model(self.x)
        return {
            "loss": F.cross_entropy(logits.float(), self.y).item(),
            "accuracy": (logits.argmax(dim=-1) == self.y).float().mean().item(),
        }


class Net(nn.Module):
    """Two layers with dropout, so that random numbers matter; ``pause_s`` makes a step long enough to be killed in."""

    def __init__(self, pause_s: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
        self.pause_s = pause_s

    def forward(self, x: Tensor) -> Tensor:
        if self.pause_s and self.training:
            import time

            time.sleep(self.pause_s)
        out: Tensor = self.layers(x)
        return out
