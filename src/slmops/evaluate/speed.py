"""How fast this machine is, in the two figures that decide how fast a model runs: products and memory.

``python -m slmops.evaluate.speed [CORES]`` prints ``{"gflops", "core_gflops", "bandwidth_gb_s", "cores"}``, the best of
several tries each, within about a second. Needs numpy alone.

Not covered: kernels of small precisions; caches (the array that is read is larger than most).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

import numpy as np

from slmops.evaluate.limits import pin_cores

MATRIX = 512
ARRAY_BYTES = 96_000_000
TRIES = 5


@dataclass(frozen=True)
class MachineSpeed:
    """Sustained fp32 products with all ``cores`` and with one, and reading from memory."""

    gflops: float
    core_gflops: float
    bandwidth_gb_s: float
    cores: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def machine_speed(cores: int | None = None, *, timeout_s: float = 120.0) -> MachineSpeed:
    """Measured in a process of its own, pinned to ``cores`` (None: all that this one may use)."""
    command = [sys.executable, "-P", "-m", "slmops.evaluate.speed", *([str(cores)] if cores else [])]
    one_each = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    done = subprocess.run(
        command, env={**os.environ, **one_each}, capture_output=True, text=True, check=True, timeout=timeout_s
    )
    return MachineSpeed(**json.loads(done.stdout.splitlines()[-1]))


def _best_s(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(TRIES):
        started = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - started)
    return best


def _on_threads(works: list[Callable[[], object]]) -> None:
    """numpy lets go of the interpreter in products and sums, so threads of Python do."""
    threads = [Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _measure(cores: int) -> MachineSpeed:
    matrices = [np.ones((MATRIX, MATRIX), dtype=np.float32) for _ in range(cores)]
    outputs = [np.empty_like(matrix) for matrix in matrices]
    repeats = 4
    flops = repeats * 2 * MATRIX**3

    def product(index: int) -> None:
        for _ in range(repeats):
            np.matmul(matrices[index], matrices[index], out=outputs[index])

    parts = np.array_split(np.ones(ARRAY_BYTES // 8), cores)
    product(0)
    one_s = _best_s(lambda: product(0))
    all_s = _best_s(lambda: _on_threads([lambda i=i: product(i) for i in range(cores)]))  # type: ignore[misc]
    read_s = _best_s(lambda: _on_threads([part.max for part in parts]))
    return MachineSpeed(cores * flops / all_s / 1e9, flops / one_s / 1e9, ARRAY_BYTES / read_s / 1e9, cores)


if __name__ == "__main__":
    given = pin_cores(int(sys.argv[1]) if len(sys.argv) > 1 else None) or os.cpu_count() or 1
    print(json.dumps(_measure(given).to_json()))  # noqa: T201 - this is its answer
