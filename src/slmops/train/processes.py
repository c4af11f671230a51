"""Several processes that train one model together, each on its share of every step's rows.

Stands on accelerate for finding the others (its environment: ``WORLD_SIZE``, ``RANK``, ``MASTER_ADDR``, ...) and
talking to them. Gradients are summed once a step, after the last part, each part being weighed by its share of the
whole step: so the division does not change what is learnt, up to rounding.

Guarantees: a process that fails ends the others; its error is raised where the group was started. Not covered: several
machines (start the verb under ``accelerate launch`` there), and models larger than one process's memory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import nn

from slmops.errors import ModelError, SlmopsError
from slmops.progress import Progress, ProgressSink

T = TypeVar("T")
POLL_S = 0.2


@dataclass(frozen=True)
class ProcessGroup:
    """This process among ``size``; one alone talks to nobody."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> ProcessGroup:
        """The group that accelerate found in the environment."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        import torch
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes)

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, in all."""
        if self.size == 1:
            return decide()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [decide() if self.rank == 0 else None]
        broadcast_object_list(box)
        return cast(T, box[0])

    def sum_gradients(self, model: nn.Module, loss: float) -> float:
        """Add up the gradients and the loss of all processes; a parameter without a gradient somewhere counts as 0."""
        if self.size == 1:
            return loss
        import torch
        from accelerate.utils import reduce

        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        pieces = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in trained]
        flat = reduce(torch.cat([*pieces, torch.tensor([loss], device=trained[0].device)]), "sum")
        start = 0
        for parameter in trained:
            size = parameter.numel()
            parameter.grad = flat[start : start + size].view_as(parameter).to(parameter.dtype)
            start += size
        return float(flat[-1])


def run_together(work: Callable[[ProgressSink], None], processes: int, progress: ProgressSink) -> None:
    """Run ``work`` in ``processes`` fresh processes on this machine that find one another through accelerate.

    ``work`` must survive pickling; it gets a sink whose events reach ``progress`` (the first process's alone).

    Raises:
        SlmopsError: what the first process to fail raised.
    """
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    port = _free_port()
    team = [
        context.Process(target=_member, args=(work, rank, processes, port, events), daemon=True)
        for rank in range(processes)
    ]
    for process in team:
        process.start()
    error: BaseException | None = None
    try:
        while error is None and any(process.is_alive() for process in team):
            error = _drain(events, progress)
            if any(process.exitcode not in (None, 0) for process in team):
                error = (
                    error
                    or _drain(events, progress, wait_s=1.0)
                    or ModelError(
                        "One of the training processes ended without a word.",
                        remedy="Run again: training goes on from the last checkpoint. If it was killed for its memory, "
                        "lower train.processes or train.batch_size.",
                    )
                )
        error = error or _drain(events, progress)
    finally:
        for process in team:
            if process.is_alive() and error is not None:
                process.terminate()
            process.join()
    if error is not None:
        raise error


def _drain(events: Any, progress: ProgressSink, wait_s: float = POLL_S) -> BaseException | None:
    """Pass events on until there are none for a while; the error, where one is among them."""
    from queue import Empty

    while True:
        try:
            event = events.get(timeout=wait_s)
        except Empty:
            return None
        if isinstance(event, BaseException):
            return event
        progress(event)


def _member(work: Callable[[ProgressSink], None], rank: int, size: int, port: int, events: Any) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // size))

    def sink(event: Progress) -> None:
        if rank == 0:
            events.put(event)

    try:
        work(sink)
    except SlmopsError as error:
        events.put(error)
        events.close()
        events.join_thread()
        os._exit(error.exit_code)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
