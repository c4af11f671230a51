"""The loop: exact resume after a kill at any moment, early stopping, precision, and losses that are no numbers."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from train_helpers import Net, Regression

from slmops.errors import ModelError
from slmops.progress import Progress
from slmops.train.loop import (
    LoopConfig,
    ParameterGroup,
    fit,
    iterate_batches,
    last_checkpoint,
    parameter_groups,
    rate_factor,
)

# One process imports torch; each run is forked off it, and can be killed for itself.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train_helpers", "slmops.train.loop"])


def run_apart(work: Path, pause_s: float, patience: int | None, checkpoint_every_s: float) -> None:
    """A whole training, in a process of its own; what it ends with goes into ``work/end.pt``."""
    torch.set_num_threads(1)
    net, froms = Net(pause_s=pause_s), work / "froms"
    config = quick(60, validate_every_steps=7, patience=patience, checkpoint_every_s=checkpoint_every_s, seed=3)

    first: list[int] = []

    def report(event: Progress) -> None:
        if not first:
            first.append(event.done)
            with froms.open("a") as file:
                file.write(f"{event.done}\n")

    work.mkdir(exist_ok=True)
    groups = parameter_groups(list(net.parameters()), 0.05, 0.01)
    history = fit(net, Regression(), groups, config, work, progress=report)
    torch.save({"weights": net.state_dict(), "history": history}, work / "end.pt")


def lines_of(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def quick(steps: int = 40, **more: Any) -> LoopConfig:
    return LoopConfig(**{"steps": steps, "batch_size": 8, "validate_every_steps": 10, "precision": "fp32", **more})


def train(work: Path, config: LoopConfig, objective: Regression | None = None) -> tuple[Net, list[dict[str, float]]]:
    net = Net()
    history = fit(net, objective or Regression(), parameter_groups(list(net.parameters()), 0.05, 0.01), config, work)
    return net, history


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- exact resume -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("patience", [None, 3])
def test_killed_again_and_again_the_weights_are_bit_identical(tmp_path: Path, patience: int | None) -> None:
    """Dropout, AdamW's moments, the schedule, the order of batches, the loss curve and early stopping all go on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = PROCESSES.Process(target=run_apart, args=(whole, 0.0, patience, 1e9))
    process.start()
    process.join(500)
    assert process.exitcode == 0

    moments, kills = random.Random(5), 0
    for attempt in range(9):
        before = len(lines_of(killed / "froms"))
        process = PROCESSES.Process(target=run_apart, args=(killed, 0.02, patience, 0.05))
        process.start()
        if attempt < 8:
            while len(lines_of(killed / "froms")) == before and process.is_alive():
                time.sleep(0.01)
            process.join(moments.uniform(0.0, 0.6))
            process.kill()
        process.join(500)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert process.exitcode == 0
    assert kills >= 3
    froms = [int(line) for line in lines_of(killed / "froms")]
    assert froms == sorted(froms), "a later run started before an earlier one's checkpoint"
    assert froms[-1] > froms[0] == 1, "no run went on from another's checkpoint"
    ends = [torch.load(folder / "end.pt", weights_only=False) for folder in (whole, killed)]
    assert same_weights(ends[0]["weights"], ends[1]["weights"])
    assert ends[0]["history"] == ends[1]["history"]


def interrupted(work: Path, config: LoopConfig, at_step: int, objective: Regression | None = None) -> None:
    """Train until a progress event of ``at_step``, then stop as abruptly as an exception can."""

    class StopError(Exception):
        pass

    def stop(event: Progress) -> None:
        if event.done == at_step:
            raise StopError

    net = Net()
    with pytest.raises(StopError):
        fit(
            net,
            objective or Regression(),
            parameter_groups(list(net.parameters()), 0.05, 0.01),
            config,
            work,
            progress=stop,
        )


@pytest.mark.parametrize("at_step", [2, 13, 20, 39])
def test_resumed_in_one_process_at_odd_steps(tmp_path: Path, at_step: int) -> None:
    net, history = train(tmp_path / "whole", quick())
    interrupted(tmp_path / "cut", quick(checkpoint_every_s=0.0), at_step)
    assert last_checkpoint(tmp_path / "cut" / "checkpoints") == tmp_path / f"cut/checkpoints/checkpoint-{at_step - 1}"
    objective = Regression()
    again, resumed_history = train(tmp_path / "cut", quick(), objective)
    assert same_weights(net.state_dict(), again.state_dict())
    assert resumed_history == history
    assert len(objective.seen) == 40 - (at_step - 1), "batches that were done were made again"


def test_a_half_written_checkpoint_is_not_taken_for_whole(tmp_path: Path) -> None:
    net, history = train(tmp_path / "whole", quick())
    interrupted(tmp_path / "cut", quick(checkpoint_every_s=0.0), 25)
    checkpoints = tmp_path / "cut" / "checkpoints"
    good = last_checkpoint(checkpoints)
    for number, (missing, cut) in enumerate(
        [("trainer_state.json", None), ("trainer_state.json", 100), ("trainer_state.json", 0)]
    ):
        half = checkpoints / f"checkpoint-{30 + number}"
        half.mkdir()
        for file in good.iterdir():
            if file.name != missing:
                (half / file.name).write_bytes(file.read_bytes())
            elif cut is not None:
                (half / file.name).write_bytes(file.read_bytes()[:cut])
    (checkpoints / "checkpoint-99").write_text("a file where a folder should be")
    assert last_checkpoint(checkpoints) == good
    again, resumed_history = train(tmp_path / "cut", quick())
    assert same_weights(net.state_dict(), again.state_dict())
    assert resumed_history == history


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    assert last_checkpoint(tmp_path) is None


def test_two_runs_are_the_same_and_another_seed_is_not(tmp_path: Path) -> None:
    nets = [train(tmp_path / str(number), quick(20, seed=seed))[0] for number, seed in enumerate([0, 0, 1])]
    assert same_weights(nets[0].state_dict(), nets[1].state_dict())
    assert not same_weights(nets[0].state_dict(), nets[2].state_dict())


# --- what is learnt, and what is told ---------------------------------------------------------------------------


def test_it_learns_and_keeps_the_curve(tmp_path: Path) -> None:
    events: list[Progress] = []
    net, objective = Net(), Regression()
    groups = parameter_groups(list(net.parameters()), 0.05, 0.0)
    history = fit(net, objective, groups, quick(120), tmp_path, task="a task", progress=events.append)
    validations = [point for point in history if "validation_loss" in point]
    assert [point["step"] for point in validations] == list(range(10, 121, 10))
    assert validations[-1]["validation_accuracy"] > 0.9
    assert validations[-1]["validation_loss"] < 0.5 * validations[0]["validation_loss"]
    losses = [point for point in history if "loss" in point]
    assert len(losses) == 20
    assert {"loss", "grad_norm", "learning_rate", "step"} == set(losses[0])
    assert all(isinstance(value, float) for point in history for value in point.values())
    json.dumps(history, allow_nan=False)
    steps = [event for event in events if not event.figures]
    assert [(event.task, event.done, event.total) for event in steps] == [("a task", n, 120) for n in range(1, 121)]
    told = [event.figures["validation_loss"] for event in events if event.figures]
    assert told == [point["validation_loss"] for point in validations]
    assert "loss" in events[-1].note


def test_the_logged_loss_is_the_mean_of_the_steps(tmp_path: Path) -> None:
    losses: list[float] = []

    class Recording(Regression):
        def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            loss = super().loss(model, batch)
            losses.append(loss.item())
            return loss

    _, history = train(tmp_path, quick(60), Recording())
    logged = [point["loss"] for point in history if "loss" in point]
    assert len(logged) == 20
    np.testing.assert_allclose(logged, np.array(losses).reshape(20, 3).mean(axis=1), rtol=1e-12)


def test_the_optimizer_is_adamw_by_hand(tmp_path: Path) -> None:
    """One parameter, quadratic loss, against the update written out."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([[2.0]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w

    class Quadratic(Regression):
        def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            return (model(torch.ones(1, 1)) ** 2).sum()

        def validate(self, model: nn.Module) -> dict[str, float]:
            return {"loss": 0.0}

    model, config = One(), quick(15, max_gradient_norm=1e9, warmup_share=0.2)
    fit(model, Quadratic(), parameter_groups(list(model.parameters()), 0.1, 0.3), config, tmp_path)
    factor = rate_factor(config)
    w, m, v = 2.0, 0.0, 0.0
    for step in range(15):
        rate, gradient = 0.1 * factor(step), 2 * w
        w *= 1 - rate * 0.3
        m, v = 0.9 * m + 0.1 * gradient, 0.98 * v + 0.02 * gradient**2
        w -= rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.98 ** (step + 1))) ** 0.5 + 1e-8)
    assert model.w.item() == pytest.approx(w, rel=1e-4)


def test_the_schedule_rises_and_falls() -> None:
    factor = rate_factor(quick(100, warmup_share=0.1))
    values = [factor(step) for step in range(100)]
    assert values[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert values[10] == 1.0
    assert values[55] == pytest.approx(0.5)
    assert all(later <= earlier for earlier, later in itertools.pairwise(values[10:]))
    assert values[-1] == 0.01
    assert rate_factor(quick(1))(0) == 1.0


def test_parameter_groups() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    for parameter in net[2].parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(list(net.parameters()), 0.1, 0.5)
    assert groups == [
        ParameterGroup([net[0].weight], 0.1, 0.5),
        ParameterGroup([net[0].bias, net[1].weight, net[1].bias], 0.1, 0.0),
    ]
    assert parameter_groups([net[2].weight], 0.1, 0.5) == []


def test_iterate_batches_takes_every_row_once() -> None:
    lengths = [5, 1, 9, 3, 3, 7, 2]
    batches = list(iterate_batches(lengths, 3))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert [max(lengths[i] for i in batch) for batch in batches] == [3, 7, 9]
    assert list(iterate_batches([], 3)) == []


# --- trouble ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patience", [None, 2])
def test_a_loss_that_is_no_number_stops_and_says_where(tmp_path: Path, patience: int | None) -> None:
    with pytest.raises(ModelError, match=r"The loss became nan at step 7\.") as caught:
        train(tmp_path, quick(patience=patience), Regression(poison_step=7))
    assert caught.value.remedy == "Lower the learning rate, or set train.precision: fp32."


def test_weights_before_the_bad_step_are_kept_for_the_next_run(tmp_path: Path) -> None:
    """After the trouble is gone, the run goes on from its last checkpoint and ends as if nothing had been."""
    net, _ = train(tmp_path / "whole", quick())
    with pytest.raises(ModelError, match="step 21"):
        train(tmp_path / "cut", quick(checkpoint_every_s=0.0), Regression(poison_step=21))
    again, _ = train(tmp_path / "cut", quick())
    assert same_weights(net.state_dict(), again.state_dict())


# --- early stopping ---------------------------------------------------------------------------------------------


def test_patience_stops_early_and_keeps_the_best_weights(tmp_path: Path) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Scripted(Regression):
        def validate(self, model: nn.Module) -> dict[str, float]:
            figures = super().validate(model)
            kept[self.validated] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            return figures

    objective = Scripted(validation_losses=[0.9, 0.5, 0.7, 0.5, 0.6, 0.1])
    net, history = train(tmp_path, quick(100, validate_every_steps=5, patience=3), objective)
    assert [point["validation_loss"] for point in history if "validation_loss" in point] == [0.9, 0.5, 0.7, 0.5, 0.6]
    assert max(point["step"] for point in history) == 25
    assert same_weights(net.state_dict(), kept[2])
    assert not same_weights(net.state_dict(), kept[5])


def test_patience_counts_on_after_a_kill(tmp_path: Path) -> None:
    losses = [0.9, 0.5, 0.7, 0.6, 0.8, 0.1]
    config = quick(100, validate_every_steps=5, patience=3)
    net, history = train(tmp_path / "whole", config, Regression(validation_losses=losses))
    interrupted(tmp_path / "cut", config, 18, Regression(validation_losses=losses))  # after the third validation
    again, resumed = train(tmp_path / "cut", config, Regression(validation_losses=losses[3:]))
    assert resumed == history
    assert same_weights(net.state_dict(), again.state_dict())


def test_without_patience_the_last_weights_are_kept(tmp_path: Path) -> None:
    net, history = train(tmp_path, quick(20, validate_every_steps=5), Regression(validation_losses=[0.1, 0.5, 0.9]))
    assert max(point["step"] for point in history) == 20
    assert same_weights(net.state_dict(), train(tmp_path / "b", quick(20))[0].state_dict())


def test_patience_that_never_runs_out_keeps_the_best(tmp_path: Path) -> None:
    objective = Regression(validation_losses=[0.9, 0.2, 0.3, 0.4])
    net, history = train(tmp_path, quick(20, validate_every_steps=5, patience=10), objective)
    assert max(point["step"] for point in history) == 20
    ten, _ = train(tmp_path / "b", quick(20))
    assert not same_weights(net.state_dict(), ten.state_dict())


# --- precision --------------------------------------------------------------------------------------------------


class Watching(Regression):
    """Notes the type in which the model multiplies."""

    def loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.types = getattr(self, "types", [])
        self.types.append(model(batch["x"]).dtype)
        return super().loss(model, batch)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_what_was_asked_for(tmp_path: Path, precision: Any, dtype: torch.dtype) -> None:
    objective = Watching()
    net, history = train(tmp_path, quick(120, precision=precision), objective)
    assert set(objective.types) == {dtype}
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    assert [point for point in history if "validation_loss" in point][-1]["validation_accuracy"] > 0.9
    assert not (tmp_path / "precision.json").exists()


def test_auto_measures_once_and_a_resumed_run_keeps_the_choice(tmp_path: Path) -> None:
    interrupted(tmp_path, quick(precision="auto", checkpoint_every_s=0.0), 20)
    chosen = json.loads((tmp_path / "precision.json").read_text())
    faster = min(chosen["seconds"], key=chosen["seconds"].get)
    assert chosen["precision"] == faster
    other = {"fp32": "bf16", "bf16": "fp32"}[chosen["precision"]]
    (tmp_path / "precision.json").write_text(json.dumps({"precision": other}))
    objective = Watching()
    train(tmp_path, quick(precision="auto"), objective)
    assert set(objective.types) == {{"fp32": torch.float32, "bf16": torch.bfloat16}[other]}
    assert len(objective.types) == 40 - 19, "the speed was measured again"


def test_measuring_the_speed_changes_nothing(tmp_path: Path) -> None:
    """Neither the weights, nor the random numbers of dropout."""
    net, _ = train(tmp_path / "auto", quick(10, precision="auto"))
    chosen = json.loads((tmp_path / "auto" / "precision.json").read_text())["precision"]
    plain, _ = train(tmp_path / "plain", quick(10, precision=chosen))
    assert same_weights(net.state_dict(), plain.state_dict())


def test_nothing_is_reported_to_any_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("COMET_API_KEY", "x" * 40)
    train(tmp_path, quick(5))
    assert not (tmp_path / "checkpoints" / "runs").exists()
