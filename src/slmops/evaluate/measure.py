"""Speed and memory of a model folder, measured in a process of its own.

Guarantees: the process is fresh and holds the runtime and the model alone, so its peak (``VmHWM``) is what a device
would pay, Python included; latency is of single requests, one at a time, after warm-up; several models take turns in
the same minutes, in an order that rotates, so that other load on the machine meets all alike.

Not covered: concurrent clients (the server's benchmark does that), and energy. File-backed pages that the kernel could
drop count towards the peak while they are resident.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np

from slmops.errors import MemoryBudgetError, ModelError
from slmops.evaluate.limits import Limits, control_group
from slmops.progress import Progress, ProgressSink, ignore
from slmops.runtime import GenerationRequest

log = logging.getLogger(__name__)

Form = Literal["classifier", "generator"]
PROBE: tuple[str, ...] = (sys.executable, "-P", "-m", "slmops.evaluate.probe")
THROUGHPUT_BATCH: Mapping[Form, int] = {"classifier": 32, "generator": 4}
SETTLE_S = 0.05  # between turns: the threads of the model before still spin for a moment
STDERR_LINES = 5
_NO_MEMORY = ("bad_alloc", "bad allocation", "MemoryError", "cannot allocate memory", "can't allocate")
"""What libraries say when the memory that they ask for is refused."""
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # a model folder stands alone: no hub is asked


@dataclass(frozen=True)
class Measurement:
    """
    ``latency_ms``                ``{"p50", "p95"}`` of single requests
    ``throughput_per_s``          answers a second, in batches of ``batch``
    ``memory_bytes_peak``         peak resident size of the process over its whole life (VmHWM), batches included
    ``memory_bytes_peak_single``  the same before the first batch: what one request at a time needs
    ``memory_bytes_loaded``       resident and not file-backed, right after loading (RssAnon)
    ``load_s``                    opening the model
    ``tokens_per_s``              generators: new tokens a second of a single request
    ``batch_tokens_per_s``        generators: new tokens a second over a batch
    ``ttft_ms``                   generators: ``{"p50", "p95"}`` to the first text
    ``threads``                   what the runtime was told; None: its own choice
    ``requests``                  single requests that were timed
    ``rounds_p50_ms``             median latency of each round, in order
    ``limits``                    what the process was held to: ``{"memory_bytes", "memory_by", "cores"}``, and
                                  ``"fits": False`` where it did not hold the model and had to be lifted
    """

    latency_ms: dict[str, float]
    throughput_per_s: float
    memory_bytes_peak: int
    memory_bytes_peak_single: int
    memory_bytes_loaded: int
    load_s: float
    threads: int | None
    batch: int
    requests: int
    rounds_p50_ms: tuple[float, ...]
    tokens_per_s: float | None = None
    batch_tokens_per_s: float | None = None
    ttft_ms: dict[str, float] | None = None
    limits: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rounds_p50_ms": list(self.rounds_p50_ms)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Measurement:
        return cls(**{**raw, "rounds_p50_ms": tuple(raw["rounds_p50_ms"])})


class DoesNotFitError(MemoryBudgetError):
    """The model named ``name`` did not fit in the memory that it was held to."""

    def __init__(self, message: str, *, name: str, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.name = name


def measure(
    model_path: Path,
    *,
    form: Form,
    requests: Sequence[str] | Sequence[GenerationRequest],
    threads: int | None = None,
    warmup: int = 10,
    rounds: int = 5,
    limit_s: float | None = None,
    limits: Limits | None = None,
    timeout_s: float = 1800.0,
    progress: ProgressSink = ignore,
    probe: Sequence[str] = PROBE,
) -> Measurement:
    """Measure one model folder; see :func:`measure_interleaved`."""
    return measure_interleaved(
        {"model": model_path},
        form=form,
        requests=requests,
        threads=threads,
        warmup=warmup,
        rounds=rounds,
        limit_s=limit_s,
        limits=None if limits is None else {"model": limits},
        timeout_s=timeout_s,
        progress=progress,
        probe=probe,
    )["model"]


def measure_interleaved(
    paths: Mapping[str, Path],
    *,
    form: Form,
    requests: Sequence[str] | Sequence[GenerationRequest],
    threads: int | None = None,
    warmup: int = 10,
    rounds: int = 5,
    limit_s: float | None = None,
    throughput_s: float = 1.0,
    limits: Mapping[str, Limits] | None = None,
    timeout_s: float = 1800.0,
    progress: ProgressSink = ignore,
    probe: Sequence[str] = PROBE,
) -> dict[str, Measurement]:
    """Measure several model folders in the same time window, each in its own process, taking turns.

    All are loaded at once. In each of ``rounds`` rounds every model answers the same share of ``requests`` one at a
    time; afterwards each fills ``throughput_s`` seconds with whole batches (see :data:`THROUGHPUT_BATCH`).

    ``paths``      name -> ``model/`` folder of a variant or bundle
    ``requests``   texts for a classifier, requests for a generator; each is answered once
    ``threads``    None: the runtime's choice
    ``limit_s``    seconds of single requests that one model may take in all; slower ones answer fewer requests,
                   at least three a round
    ``limits``     name -> what its process is held to, as a device would
    ``timeout_s``  longest silence of a process before it is given up
    ``probe``      the command of the measured process (tests put their own here)

    Raises:
        ModelError: a process died or was silent too long; its last words are in the message.
        MemoryBudgetError: a process was killed, as the kernel does when memory runs out.
        DoesNotFitError: a process did not get the memory that it asked for within its limit.
        ValueError: no requests, or no rounds.
    """
    if not requests or rounds < 1:
        raise ValueError(f"{len(requests)} requests in {rounds} rounds leave nothing to measure")
    rounds = min(rounds, len(requests))
    raw_requests = [r if isinstance(r, str) else asdict(r) for r in requests]
    steps, done = len(paths) * (rounds + 2), 0

    def step(name: str) -> None:
        nonlocal done
        done += 1
        progress(Progress("measure", done, steps, "turns", name))

    with contextlib.ExitStack() as stack:
        children: dict[str, Child] = {}
        for name, path in paths.items():
            job = {"path": str(path), "form": form, "threads": threads, "requests": raw_requests}
            held = (limits or {}).get(name)
            children[name] = stack.enter_context(Child(path, job, probe, timeout_s, limits=held, name=name))
            children[name].order({"do": "warm", "first": 0, "count": warmup})
            step(name)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in paths}
        share_s = None if limit_s is None else limit_s / rounds
        for number in range(rounds):
            for name in _rotated(list(paths), number):
                time.sleep(SETTLE_S)
                order = {"do": "latency", "first": number, "step": rounds, "limit_s": share_s}
                turns[name].append(children[name].order(order))
                step(name)
        batch = THROUGHPUT_BATCH[form]
        throughput: dict[str, dict[str, Any]] = {}
        for name, child in children.items():
            if form == "classifier":  # one batch that is not timed: engines plan for a shape when they first see it
                child.order({"do": "throughput", "batch": batch, "limit_s": 0.0})
            throughput[name] = child.order({"do": "throughput", "batch": batch, "limit_s": throughput_s})
            step(name)
        return {name: _summarise(children[name].opened, turns[name], throughput[name], batch) for name in paths}


def latency_ratio(a: Measurement, b: Measurement) -> tuple[float, float, float]:
    """How many times slower ``a`` is than ``b``: median over rounds of the ratio of p50, with the lowest and highest
    round. Both must come from one :func:`measure_interleaved`, or the rounds were not neighbours.

    Raises:
        ValueError: unequal numbers of rounds.
    """
    ratios = [x / y for x, y in zip(a.rounds_p50_ms, b.rounds_p50_ms, strict=True)]
    return float(np.median(ratios)), min(ratios), max(ratios)


def _rotated(names: list[str], by: int) -> list[str]:
    start = by % len(names)
    return names[start:] + names[:start]


def _percentiles(values_ms: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(values_ms, [50, 95])
    return {"p50": float(p50), "p95": float(p95)}


def _summarise(
    opened: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], throughput: Mapping[str, Any], batch: int
) -> Measurement:
    latency_ms = [value for turn in turns for value in turn["latency_ms"]]
    ttft_ms = [value for turn in turns for value in turn["ttft_ms"]]
    tokens = sum(turn["tokens"] for turn in turns)
    return Measurement(
        latency_ms=_percentiles(latency_ms),
        throughput_per_s=throughput["answers"] / throughput["wall_s"],
        memory_bytes_peak=throughput["memory_bytes_peak"],
        memory_bytes_peak_single=turns[-1]["memory_bytes_peak"],
        memory_bytes_loaded=opened["memory_bytes_loaded"],
        load_s=opened["load_s"],
        threads=opened["threads"],
        batch=batch,
        requests=len(latency_ms),
        rounds_p50_ms=tuple(float(np.median(turn["latency_ms"])) for turn in turns),
        tokens_per_s=tokens / (sum(latency_ms) / 1e3) if tokens else None,
        batch_tokens_per_s=throughput["tokens"] / throughput["wall_s"] if throughput["tokens"] else None,
        ttft_ms=_percentiles(ttft_ms) if ttft_ms else None,
        limits=opened.get("limits"),
    )


class Child:
    """One measured process: opened on entry, gone on exit whatever happened. ``opened``: its first answer."""

    def __init__(
        self,
        path: Path,
        job: dict[str, Any],
        command: Sequence[str] = PROBE,
        timeout_s: float = 1800.0,
        *,
        limits: Limits | None = None,
        name: str = "",
    ) -> None:
        self.path = path
        self.name = name or path.name
        self.timeout_s = timeout_s
        self._limits = limits
        self.opened: dict[str, Any] = {}
        self._job = job
        self._command = command
        self._timed_out = False
        self._files = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slmops-measure-")))
            if self._limits is not None:
                group = stack.enter_context(control_group(self._limits.memory_bytes))
                self._job |= {"limits": self._limits.to_json(), "group": str(group) if group else None}
            (folder / "job.json").write_text(json.dumps(self._job), "utf-8")
            self._stderr = stack.enter_context((folder / "stderr").open("w+b"))
            self._process = subprocess.Popen(
                [*self._command, str(folder / "job.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=_environment(self._job["threads"]),
            )
            stack.callback(self._stop)
            self.opened = self._answer()
            self._files = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def order(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: the missing answer says why
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        with self._given_up_after(self.timeout_s):
            line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death()
        answer = cast("dict[str, Any]", json.loads(line))
        if "error" in answer and self._refused_memory(answer["error"]):
            raise self._does_not_fit(answer["error"])
        if "error" in answer:
            raise ModelError(f"{self.path} could not be measured: {answer['error']}", remedy=answer["remedy"])
        return answer

    @contextlib.contextmanager
    def _given_up_after(self, seconds: float) -> Iterator[None]:
        def give_up() -> None:
            self._timed_out = True
            self._process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _death(self) -> ModelError:
        code = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", "replace").strip().splitlines()[-STDERR_LINES:]
        last_words = " Its last lines: " + " | ".join(said) if said else " It said nothing."
        who = f"The process that measured {self.path}"
        if self._timed_out:
            return ModelError(
                f"{who} gave no answer for {self.timeout_s:g} s and was stopped.{last_words}",
                remedy="Measure fewer or shorter requests, or give it more time.",
            )
        limited = self._limits is not None and self._limits.memory_bytes is not None
        if limited and (code == -signal.SIGKILL or self._refused_memory(last_words)):
            return self._does_not_fit(last_words.strip())
        if code == -signal.SIGKILL:
            return MemoryBudgetError(
                f"{who} was killed (SIGKILL), most likely because memory ran out.{last_words}",
                remedy="Free memory, or measure a smaller model.",
            )
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ModelError(f"{who} {how}.{last_words}")

    def _refused_memory(self, said: str) -> bool:
        limited = self._limits is not None and self._limits.memory_bytes is not None
        return limited and any(sign.lower() in said.lower() for sign in _NO_MEMORY)

    def _does_not_fit(self, said: str) -> DoesNotFitError:
        assert self._limits is not None
        assert self._limits.memory_bytes is not None
        return DoesNotFitError(
            f"{self.path} does not run in {self._limits.memory_bytes / 1e6:.0f} MB. {said}",
            name=self.name,
            remedy="Choose a smaller model, or allow it more memory.",
        )

    def _stop(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            log.warning("the process that measured %s did not end by itself", self.path)
            self._process.kill()
            self._process.wait()


def _environment(threads: int | None) -> dict[str, str]:
    limits = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    return {**os.environ, **QUIET, **limits, "PYTHONUNBUFFERED": "1"}
