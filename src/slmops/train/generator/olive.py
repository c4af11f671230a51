"""A language model trained by Microsoft Olive: its LoRA or QLoRA pass on our rows, in a process of its own.

The rows become tokens here, by our chat layer, with the loss at the answer's tokens alone; Olive trains adapters on
them, which are then merged, so that what comes out is a checkpoint like any other.

Guarantees: an Olive that ends without an adapter is an error, with its last words, whatever its exit code; nothing
leaves the machine (see :mod:`slmops.train.generator.olive_child`); a run that was killed goes on from Olive's last
checkpoint. Not guaranteed: what ours does about NaN, early stopping and the choice of precision; Olive trains a
bfloat16 or float32 copy of the whole model with a constant learning rate unless told otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slmops.artifacts import Dataset, Draft
from slmops.chat import ChatTokenizer
from slmops.errors import ConversionError, MissingExtraError
from slmops.models.folder import read_tensors, weight_files
from slmops.models.olive import ADAPTER_CONFIG, ADAPTER_WEIGHTS, find_olive_adapter, merge_adapter
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import TrainConfig
from slmops.train.batching import steps_for
from slmops.train.generator.answers import EncodedRow, ToMessages, copy_tokenizer, encode_splits, save
from slmops.train.methods import check_rank

CHILD: tuple[str, ...] = (sys.executable, "-P", "-m", "slmops.train.generator.olive_child")
EPOCHS = 3.0
BATCH_SIZE = 8
LEARNING_RATE = 2e-4  # Olive's own
IGNORED = -100
TASK = "student"
LAST_LINES = 3
LOGS = 20  # points of the loss curve


def train_with_olive(
    dataset: Dataset,
    model_folder: Path,
    to_messages: ToMessages,
    train: TrainConfig,
    seed: int,
    draft: Draft,
    *,
    task: str = TASK,
    progress: ProgressSink = ignore,
) -> None:
    """Train adapters of the model at ``model_folder`` on the data set's answers, and write the merged model.

    Raises:
        MissingExtraError: olive-ai is not installed.
        DataError: no row has an answer that fits into ``train.max_tokens``.
        ModelError: the rank is larger than a matrix has.
        ConversionError: Olive ended without an adapter.
    """
    check_olive(quantized=train.method == "qlora")
    targets = train.lora.targets
    shapes = _linear_shapes(model_folder)
    check_rank(
        train.lora.rank,
        [shape for shape in shapes if targets == "all-linear" or shape[0].rpartition(".")[2] in targets],
    )
    tokenizer = ChatTokenizer.load(model_folder)
    files, rows = {}, encode_splits(tokenizer, dataset, to_messages, train.max_tokens)
    for split in rows:
        files[split] = draft.work / f"olive_{split}.jsonl"
        _write_rows(rows[split], files[split])
    steps = steps_for(len(rows["train"]), train.batch_size or BATCH_SIZE, train.epochs or EPOCHS)
    output = draft.work / "olive"
    request = {
        "model": str(model_folder),
        "train_rows": str(files["train"]),
        "validation_rows": str(files["validation"]),
        "output": str(output),
        "pass": "QLoRA" if train.method == "qlora" else "LoRA",
        "options": pass_options(
            train,
            steps=steps,
            seed=seed,
            checkpoints=draft.work / "olive_checkpoints",
            linear=linear_names(model_folder),
        ),
    }
    progress(Progress(task, 0, steps, "steps", "olive"))
    run_child(request, draft.work)
    adapter = find_olive_adapter(output)
    if adapter is None:
        raise ConversionError(
            f"Olive ended without an adapter.{last_words(draft.work)}", remedy="Its whole log is in the work folder."
        )
    model = merge_adapter(model_folder, adapter)
    # Of the merged model: an adapter that was trained on a quantized base fits the base itself a little less.
    merged_loss = validation_loss(model, rows["validation"])
    history = [*_history(draft.work / "olive_checkpoints"), {"step": float(steps), "validation_loss": merged_loss}]
    progress(Progress(task, steps, steps, "steps", "olive"))
    copy_tokenizer(model_folder, draft.path)
    shutil.copyfile(model_folder / "tokenizer.json", draft.path / "tokenizer.json")
    save(model, history, draft)
    if train.method != "qlora":  # one of a base in few bits fits the base itself a little less
        _keep_adapter(adapter, draft.path / "adapter")
    draft.metrics["engine"] = "olive"


def _keep_adapter(adapter: Path, folder: Path) -> None:
    """The adapter for itself, beside the merged model, without the path that Olive wrote into it."""
    folder.mkdir()
    config = json.loads((adapter / ADAPTER_CONFIG).read_text("utf-8"))
    config["base_model_name_or_path"] = None
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", "utf-8")
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)


def pass_options(train: TrainConfig, *, steps: int, seed: int, checkpoints: Path, linear: list[str]) -> dict[str, Any]:
    """The recipe in Olive's words. Pure. ``linear``: what ``all-linear`` means for this model."""
    rank = train.lora.rank
    each = max(1, min(train.checkpoint_every_steps, steps))
    options: dict[str, Any] = {
        "r": rank,
        "alpha": train.lora.alpha or 2 * rank,
        "lora_dropout": train.lora.dropout,
        "torch_dtype": "bfloat16" if train.precision == "bf16" else "float32",
        "device_map": "auto",
        "training_args": {
            "output_dir": str(checkpoints),
            "max_steps": steps,
            "per_device_train_batch_size": train.batch_size or BATCH_SIZE,
            "per_device_eval_batch_size": train.batch_size or BATCH_SIZE,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": train.learning_rate or LEARNING_RATE,
            "optim": "adamw_torch",
            "eval_strategy": "steps",
            "eval_steps": each,
            "save_strategy": "steps",
            "save_steps": each,
            "save_total_limit": 1,
            "logging_steps": max(1, steps // LOGS),
            "seed": seed,
            "report_to": [],
            "disable_tqdm": True,
            "remove_unused_columns": False,
        },
    }
    if train.method == "qlora":
        options["save_quant_config"] = False  # the adapter is merged into the full-precision base
        options["compute_dtype"] = options["torch_dtype"]
    else:
        options["target_modules"] = linear if train.lora.targets == "all-linear" else list(train.lora.targets)
    return options


def linear_names(model_folder: Path) -> list[str]:
    """What the matrices of the model's layers are called, for ``all-linear``, which Olive does not know."""
    return sorted({name.rpartition(".")[2] for name, _ in _linear_shapes(model_folder)})


def _linear_shapes(model_folder: Path) -> list[tuple[str, tuple[int, int]]]:
    """Name and ``[out, in]`` of each matrix of the model's layers."""
    return [
        (tensor.name.removesuffix(".weight"), (tensor.shape[0], tensor.shape[1]))
        for path in weight_files(model_folder)
        for tensor in read_tensors(path)
        if ".layers." in tensor.name and tensor.name.endswith(".weight") and len(tensor.shape) == 2
    ]


def check_olive(*, quantized: bool = False) -> None:
    """Imports nothing.

    Raises:
        MissingExtraError: olive-ai is not installed, or bitsandbytes, where the base is to be quantized.
    """
    from importlib.util import find_spec

    for name in ("olive", *(["bitsandbytes"] if quantized else [])):
        if find_spec(name) is None:
            raise MissingExtraError(f"train.engine: olive (it needs {name})", "olive")


def run_child(request: Mapping[str, Any], work: Path) -> None:
    """Run Olive to its end. Its words go to ``olive.log`` in ``work``; its exit code says nothing."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / "olive_request.json"
    file.write_text(json.dumps(request), "utf-8")
    environment = {
        **os.environ,
        "OLIVE_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (work / "olive.log").open("wb") as log:
        subprocess.run(
            [*CHILD, str(file)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
        )


def last_words(work: Path) -> str:
    """The end of Olive's log, as a part of a message; empty where it said nothing."""
    log = work / "olive.log"
    lines = log.read_text("utf-8", "replace").splitlines() if log.exists() else []
    said = [line.strip() for line in lines if line.strip()][-LAST_LINES:]
    return f" It said: {' / '.join(said)}." if said else ""


def _write_rows(rows: Sequence[EncodedRow], path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            labels = [token if wanted else IGNORED for token, wanted in zip(row.tokens, row.supervised, strict=True)]
            mask = [1] * len(row.tokens)
            file.write(json.dumps({"input_ids": row.tokens, "attention_mask": mask, "labels": labels}) + "\n")


def validation_loss(model: Any, rows: Sequence[EncodedRow]) -> float:
    """Mean cross-entropy over the answers' tokens, in nats, one row at a time."""
    import torch

    model.eval()
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False).logits[0, :-1].float()
            wanted = torch.tensor(row.supervised[1:])
            targets = torch.tensor(row.tokens[1:])[wanted]
            total += float(torch.nn.functional.cross_entropy(logits[wanted], targets, reduction="sum"))
            tokens += len(targets)
    return total / max(1, tokens)


def _history(checkpoints: Path) -> list[dict[str, float]]:
    """The loss curve out of the last checkpoint's state; empty where Olive kept none."""
    states = sorted(checkpoints.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return []
    names = {"loss": "loss", "eval_loss": "validation_loss", "learning_rate": "learning_rate", "step": "step"}
    return [
        {name: float(entry[key]) for key, name in names.items() if key in entry}
        for entry in json.loads(states[-1].read_text("utf-8"))["log_history"]
        if "loss" in entry or "eval_loss" in entry
    ]
