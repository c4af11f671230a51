"""The training loop: transformers' Trainer with our batches, our losses and our progress.

Guarantees: a run that was killed and started again ends with the same weights as one that was not (same machine, same
libraries); a loss that is not a number stops the run instead of spoiling the weights; nothing is sent to any tracker.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback

from slmops.errors import ModelError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.train.batching import plan_batches

Batch = dict[str, Tensor]

STATE_NAME = "trainer_state.json"
"""What the Trainer writes last into a checkpoint: where it can be read, the checkpoint is whole."""


class Objective(Protocol):
    """What is trained: how rows become a batch, a batch a loss, and a model a validation figure."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each training row."""
        ...

    def collate(self, indices: Sequence[int]) -> Batch:
        """The rows at ``indices``, padded to the longest."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A scalar, the mean over the batch."""
        ...

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the validation split; must hold ``loss``, lower is better."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    ``warmup_share`` of the steps rise linearly; the rest follows a cosine down to nothing. ``patience`` counts
    validations without a lower loss; None never stops early and keeps the last weights. ``checkpoint_every_s``: a
    killed run loses at most so many seconds of work.
    """

    steps: int
    batch_size: int
    validate_every_steps: int
    warmup_share: float = 0.06
    patience: int | None = None
    checkpoint_every_s: float = 60.0
    max_gradient_norm: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a weight decay."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


def parameter_groups(
    parameters: Sequence[nn.Parameter], learning_rate: float, weight_decay: float
) -> list[ParameterGroup]:
    """Matrices decay; vectors (norms, biases) do not. Frozen parameters are left out."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    vectors = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = (ParameterGroup(matrices, learning_rate, weight_decay), ParameterGroup(vectors, learning_rate))
    return [group for group in groups if group.parameters]


def fit(
    model: nn.Module,
    objective: Objective,
    groups: Sequence[ParameterGroup],
    config: LoopConfig,
    work: Path,
    *,
    task: str = "training",
    progress: ProgressSink = ignore,
) -> list[dict[str, float]]:
    """Train ``model`` in place; returns the loss curve, one mapping a logged step.

    ``work`` holds checkpoints; when it holds some already, training goes on from the last.

    Raises:
        ModelError: the loss became NaN or infinite.
    """
    plan = plan_batches(objective.lengths, batch_size=config.batch_size, steps=config.steps, seed=config.seed)
    precision = _decide_precision(model, objective, plan[0], config.precision, work)
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups],
        betas=(0.9, 0.98),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(config))
    keep_best = config.patience is not None
    arguments = TrainingArguments(
        output_dir=str(work / "checkpoints"),
        max_steps=config.steps,
        seed=config.seed,
        max_grad_norm=config.max_gradient_norm,
        logging_steps=max(1, min(25, config.steps // 20)),
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=config.validate_every_steps,
        save_strategy="steps" if keep_best else "no",
        save_steps=config.validate_every_steps,
        save_total_limit=2 if keep_best else 1,
        load_best_model_at_end=keep_best,
        metric_for_best_model="loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
    )
    resumed = last_checkpoint(work / "checkpoints")
    watch = _Watch(task, config, progress, [] if resumed is None else unlogged_losses(resumed))
    callbacks: list[TrainerCallback] = [watch]
    if config.patience is not None:
        callbacks.append(_Patience(config.patience))
    trainer = _SlmTrainer(
        model=model,
        args=arguments,
        optimizers=(optimizer, scheduler),
        callbacks=callbacks,
        objective=objective,
        plan=plan,
        precision=precision,
        unlogged=watch.unlogged,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    return [_history_point(entry) for entry in trainer.state.log_history if "train_runtime" not in entry]


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint of the most steps; halves that a killed run left behind are removed."""
    whole: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            steps = json.loads((path / STATE_NAME).read_text("utf-8"))["global_step"]
        except (FileNotFoundError, NotADirectoryError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
        else:
            whole.append((steps, path))
    return max(whole)[1] if whole else None


def unlogged_losses(checkpoint: Path) -> list[float]:
    """The losses of the steps between the last logged one and ``checkpoint``."""
    state = json.loads((checkpoint / STATE_NAME).read_text("utf-8"))
    losses: list[float] = state["stateful_callbacks"][_Watch.__name__]["attributes"]["unlogged"]
    return losses


class _SlmTrainer(Trainer):  # type: ignore[misc]
    def __init__(
        self, *, objective: Objective, plan: list[list[int]], precision: str, unlogged: list[float], **rest: Any
    ) -> None:
        self.unlogged = unlogged
        # The Trainer wants a data set; what it iterates is the plan.
        super().__init__(train_dataset=_Indices(plan), eval_dataset=_Indices([]), data_collator=_first, **rest)
        self.objective = objective
        self.plan = plan
        self.precision = precision
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        steps: DataLoader[Any] = DataLoader(
            _Steps(self.plan, self.objective), batch_size=1, shuffle=False, collate_fn=_first
        )
        return steps

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.objective.loss(model, inputs)
        value = loss.item()
        if not math.isfinite(value):
            raise ModelError(
                f"The loss became {value} at step {self.state.global_step + 1}.",
                remedy="Lower the learning rate, or set train.precision: fp32.",
            )
        self.unlogged.append(value)
        return (loss, None) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # The Trainer's own mean forgets the steps between the last logged one and the checkpoint resumed from.
            logs["loss"] = sum(self.unlogged) / len(self.unlogged)
            self.unlogged.clear()
        super().log(logs, start_time)

    def compute_loss_context_manager(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.precision)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad(), autocast(self.precision):
            figures = self.objective.validate(self.model)
        self.model.train()
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _Patience(TrainerCallback):  # type: ignore[misc]
    """Stops after so many validations without a lower loss. It counts in the log, which a resumed run has too."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop = True
            control.should_save = False  # a run resumed from here would train on


class _Watch(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Progress for people, and a checkpoint whenever enough time has passed since the last.

    ``unlogged`` goes into each checkpoint.
    """

    def __init__(self, task: str, config: LoopConfig, progress: ProgressSink, unlogged: list[float]) -> None:
        self.task, self.config, self.progress, self.unlogged = task, config, progress, unlogged
        self.note = ""
        self.saved_at = time.monotonic()

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        shown = {name.removeprefix("eval_"): value for name, value in (logs or {}).items() if "loss" in name}
        shown |= {name.removeprefix("eval_"): value for name, value in (logs or {}).items() if "accuracy" in name}
        self.note = ", ".join(f"{name} {value:.3f}" for name, value in shown.items()) or self.note

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.progress(Progress(self.task, state.global_step, self.config.steps, "steps", self.note))
        due = time.monotonic() - self.saved_at >= self.config.checkpoint_every_s
        if due and state.global_step < self.config.steps:
            control.should_save = True

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        figures = {name.replace("eval_", "validation_", 1): value for name, value in (metrics or {}).items()}
        self.progress(Progress(self.task, state.global_step, self.config.steps, "steps", self.note, figures))

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.saved_at = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"unlogged": list(self.unlogged)}}


class _Steps(TorchDataset[Batch]):
    """Step number -> batch, made when it is asked for."""

    def __init__(self, plan: list[list[int]], objective: Objective) -> None:
        self.plan, self.objective = plan, objective

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> Batch:
        return self.objective.collate(self.plan[step])


class _Indices(TorchDataset[list[int]]):
    def __init__(self, plan: list[list[int]]) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> list[int]:
        return self.plan[index]


def _first(items: Sequence[Any]) -> Any:
    return items[0]


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products with fp32 weights, or nothing."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def _warmup_cosine(config: LoopConfig) -> Callable[[int], float]:
    warmup_steps = max(1, round(config.warmup_share * config.steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, config.steps - warmup_steps)
        return max(0.01, 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    return factor


def _decide_precision(
    model: nn.Module, objective: Objective, indices: Sequence[int], wanted: str, work: Path
) -> Literal["fp32", "bf16"]:
    """The faster of fp32 and bf16 autocast, by one warm forward and backward each; remembered for a resumed run."""
    if wanted == "fp32" or wanted == "bf16":
        return wanted  # type: ignore[return-value]
    remembered = work / "precision.json"
    if remembered.exists():
        choice: Literal["fp32", "bf16"] = json.loads(remembered.read_text("utf-8"))["precision"]
        return choice
    state = torch.get_rng_state()
    batch = objective.collate(indices)
    seconds = {precision: _time_step(model, objective, batch, precision) for precision in ("fp32", "bf16")}
    torch.set_rng_state(state)
    choice = "bf16" if seconds["bf16"] < seconds["fp32"] else "fp32"
    work.mkdir(parents=True, exist_ok=True)
    written = work / ".precision.json.tmp"
    written.write_text(json.dumps({"precision": choice, "seconds": seconds}), "utf-8")
    written.replace(remembered)
    return choice


def _time_step(model: nn.Module, objective: Objective, batch: Mapping[str, Tensor], precision: str) -> float:
    model.train()
    best_s = math.inf
    for _ in range(2):  # the first one warms up
        started = time.perf_counter()
        with autocast(precision):
            loss = objective.loss(model, dict(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        best_s = min(best_s, time.perf_counter() - started)
        model.zero_grad()
    return best_s


def _history_point(entry: Mapping[str, float]) -> dict[str, float]:
    names = {"eval_loss": "validation_loss", "eval_accuracy": "validation_accuracy"}
    return {
        names.get(name, name): float(value)
        for name, value in sorted(entry.items())  # a resumed run reads them back sorted
        if isinstance(value, int | float) and name not in {"epoch", "total_flos"}
    }


def iterate_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """All rows once, longest together, for work without gradients."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
