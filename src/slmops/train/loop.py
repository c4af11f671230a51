"""The training loop: transformers' Trainer with our batches, our losses and our progress.

Guarantees: a run that was killed and started again ends with the same weights and the same curve as one that was not
(same machine, same libraries); a loss that is not a number stops the run instead of spoiling the weights, and leaves
the batch behind; however a step's rows are divided over parts and processes, the step's loss is the mean over all its
rows (over all their learnt tokens where the objective weighs rows so); nothing is sent to any tracker that was not
asked for.
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

from slmops.errors import ModelError
from slmops.models.quiet import load_bitsandbytes
from slmops.progress import Progress, ProgressSink, ignore
from slmops.train.batching import divide, plan_batches
from slmops.train.device import training_device, wait_for
from slmops.train.processes import ProcessGroup

load_bitsandbytes()  # transformers' Trainer imports it where it is installed, and it would look at a hub
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: E402
from transformers.trainer_callback import ExportableState, PrinterCallback  # noqa: E402

Batch = dict[str, Tensor]
Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt"]
Part = tuple[Batch, float, list[int]]
"""A batch, its share of the step's loss, and the rows in it."""

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


def row_weights(objective: Objective) -> Sequence[float]:
    """What each row counts in a batch's mean: the objective's ``weights`` where it has some, else all the same."""
    weights: Sequence[float] | None = getattr(objective, "weights", None)
    return [1.0] * len(objective.lengths) if weights is None else weights


@dataclass(frozen=True)
class LoopConfig:
    """How long and how fast to train.

    ``warmup_share`` of the steps rise linearly; the rest follows ``schedule``. ``patience`` counts validations without
    a lower loss; None never stops early and keeps the last weights. ``checkpoint_every_s``: a killed run loses at most
    so many seconds of work. ``max_part_tokens``: a step's rows are worked through in parts of at most so many padded
    tokens (one row at least), and in ``parts`` parts at least. ``frozen_bf16``: where bf16 is trained in, matrices that
    are not trained are kept in it, which is what autocast makes of them at every use.
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
    schedule: Schedule = "cosine"
    parts: int = 1
    max_part_tokens: int | None = None
    frozen_bf16: bool = False


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
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train ``model`` in place, on the GPU where there is one (it stays there); returns the loss curve, one mapping a
    logged step.

    ``work`` holds checkpoints; when it holds some already, training goes on from the last. ``callbacks``: trackers and
    the like, called in the first process only.

    Raises:
        ModelError: the loss became NaN or infinite; the batch is in ``work``, and the message says where.
    """
    group = ProcessGroup.current()
    plan = plan_batches(objective.lengths, batch_size=config.batch_size, steps=config.steps, seed=config.seed)
    if (device := training_device()).type != next(model.parameters()).device.type:
        model.to(device)
    precision = group.agree(lambda: _decide_precision(model, objective, plan[0], config.precision, work))
    if precision == "bf16" and config.frozen_bf16:
        _keep_frozen_in_bf16(model)
    optimizer = torch.optim.AdamW(
        [{"params": list(g.parameters), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups],
        betas=(0.9, 0.98),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_factor(config))
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
    resumed = group.agree(lambda: last_checkpoint(work / "checkpoints"))
    watch = _Watch(task, config, progress, [] if resumed is None else unlogged_losses(resumed))
    called: list[TrainerCallback] = [watch]
    if config.patience is not None:
        called.append(_Patience(config.patience))
    if group.rank == 0:
        called.extend(callbacks)
    trainer = _SlmTrainer(
        model=model,
        args=arguments,
        optimizers=(optimizer, scheduler),
        callbacks=called,
        objective=objective,
        steps=_Steps(plan, objective, config, group),
        precision=precision,
        unlogged=watch.unlogged,
        group=group,
        work=work,
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
        self,
        *,
        objective: Objective,
        steps: _Steps,
        precision: str,
        unlogged: list[float],
        group: ProcessGroup,
        work: Path,
        **rest: Any,
    ) -> None:
        self.unlogged = unlogged
        # The Trainer wants a data set; what it iterates is made in get_train_dataloader.
        super().__init__(train_dataset=steps, eval_dataset=_Nothing(), data_collator=_first, **rest)
        self.objective = objective
        self.steps = steps
        self.precision = precision
        self.group = group
        self.work = work
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        steps: DataLoader[Any] = DataLoader(self.steps, batch_size=1, shuffle=False, collate_fn=_first)
        return steps

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        # One process as many: the model is not wrapped (our losses call parts of it); see _sum_over_processes.
        place, self.accelerator.prepare_model = self.accelerator.prepare_model, lambda model, **_: model
        try:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        finally:
            self.accelerator.prepare_model = place

    def training_step(self, model: nn.Module, inputs: list[Part], num_items_in_batch: Any = None) -> Tensor:
        model.train()
        step_loss = 0.0
        for batch, share, rows in inputs:
            with autocast(self.precision):
                loss = self.objective.loss(model, self._prepare_inputs(batch))
            value = loss.item()
            if not math.isfinite(value):
                self._stop(value, batch, rows)
            (loss * share).backward()  # type: ignore[no-untyped-call]
            step_loss += value * share
        step_loss = self.group.sum_gradients(model, step_loss)
        self.unlogged.append(step_loss)
        return torch.tensor(step_loss, device=self.args.device)

    def _stop(self, value: float, batch: Batch, rows: list[int]) -> None:
        step = self.state.global_step + 1
        path = save_offending(batch, rows, step, value, self.work)
        raise ModelError(
            f"The loss became {value} at step {step}. The batch is in {path}.",
            remedy="Lower the learning rate, or set train.precision: fp32.",
        )

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            # The Trainer's own mean forgets the steps between the last logged one and the checkpoint resumed from.
            logs["loss"] = sum(self.unlogged) / len(self.unlogged)
            self.unlogged.clear()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad(), autocast(self.precision):
            figures = self.group.agree(lambda: self.objective.validate(self.model))
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


class _Steps(TorchDataset[list[Part]]):
    """Step number -> this process's parts of the step, made when they are asked for."""

    def __init__(self, plan: list[list[int]], objective: Objective, config: LoopConfig, group: ProcessGroup) -> None:
        self.plan, self.objective, self.config, self.group = plan, objective, config, group
        self.lengths, self.weights = objective.lengths, row_weights(objective)

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> list[Part]:
        rows = self.plan[step]
        whole = sum(self.weights[row] for row in rows)
        parts = divide(
            rows[self.group.rank :: self.group.size],
            [self.lengths[row] for row in rows[self.group.rank :: self.group.size]],
            parts=self.config.parts,
            max_tokens=self.config.max_part_tokens,
        )
        return [(self.objective.collate(part), sum(self.weights[row] for row in part) / whole, part) for part in parts]


class _Nothing(TorchDataset[int]):
    def __len__(self) -> int:
        return 0


def save_offending(batch: Batch, rows: Sequence[int], step: int, loss: float, work: Path) -> Path:
    """Write a batch that gave no number, and which rows it was, into ``work``; the folder."""
    from safetensors.torch import save_file

    folder = work / "offending-batch"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in batch.items()},
        folder / "batch.safetensors",
    )
    about = {"step": step, "loss": str(loss), "rows": list(rows)}
    (folder / "batch.json").write_text(json.dumps(about, indent=1), "utf-8")
    return folder


def _first(items: Sequence[Any]) -> Any:
    return items[0]


def autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    """bf16 matrix products with fp32 weights, or nothing."""
    if precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def rate_factor(config: LoopConfig) -> Callable[[int], float]:
    """Step -> what the learning rate is multiplied with: a linear rise, then the schedule; never less than 0.01."""
    warmup_steps = max(1, round(config.warmup_share * config.steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = min(1.0, (step - warmup_steps) / max(1, config.steps - warmup_steps))
        match config.schedule:
            case "cosine":
                value = 0.5 * (1 + math.cos(math.pi * done))
            case "linear":
                value = 1 - done
            case "constant":
                value = 1.0
            case "inverse_sqrt":
                value = math.sqrt(warmup_steps / (step + 1))
        return max(0.01, value)

    return factor


def _keep_frozen_in_bf16(model: nn.Module) -> None:
    """Matrices that no gradient reaches, without those that are looked up in too (an embedding tied to the output)."""
    looked_up = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    for part in model.modules():
        if type(part) is nn.Linear and not part.weight.requires_grad and id(part.weight) not in looked_up:
            part.weight.data = part.weight.data.to(torch.bfloat16)


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
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        batch = {name: part.to(device) for name, part in objective.collate(indices).items()}
        seconds = {precision: _time_step(model, objective, batch, precision) for precision in ("fp32", "bf16")}
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
        device = next(model.parameters()).device
        wait_for(device)
        started = time.perf_counter()
        with autocast(precision):
            loss = objective.loss(model, dict(batch))
        loss.backward()  # type: ignore[no-untyped-call]
        wait_for(device)
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
