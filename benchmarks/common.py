"""What several benchmarks share: running a recipe with a plain log, spreads, and what the machine reaches at best."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slmops.artifacts import Row
    from slmops.progress import Progress

LOG_EVERY_S = 15.0
ROWS_TO_COMPRESS = 1500
"""Of banking77, with which the parts of compression are compared: one teacher for all of them, in minutes."""
GEMM_SIZE, GEMM_REPEATS = 2048, 4
GPU_GEMM_SIZE, GPU_GEMM_REPEATS = 8192, 10


def data_file(options: argparse.Namespace, name: str) -> str:
    """A file of the real data sets, which must be there."""
    path: Path = (options.data / name).resolve()
    if not path.exists():
        raise SystemExit(f"{path} is not there; name the folder of the data sets with --data")
    return str(path)


def rows_to_compress(options: argparse.Namespace, quick_rows: int) -> dict[str, Any]:
    """The recipe's ``data`` of the comparisons of compression; a fifth of it for the test, so that points can be told
    apart."""
    return {
        "train": data_file(options, "banking77/train.csv"),
        "input": "{text}",
        "target": "{category}",
        "limit": quick_rows if options.quick else ROWS_TO_COMPRESS,
        "split": {"test": 0.2},
    }


def report_of(options: argparse.Namespace, raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The report of a whole run of the recipe ``raw``; what was done before is not done again."""
    from slmops.pipeline import run_recipe
    from slmops.recipe import Recipe, parse_recipe
    from slmops.store import Store

    recipe: Recipe = parse_recipe(raw)
    with Store.open(options.store) as store:
        return run_recipe(
            recipe, store, out=options.store / "runs" / f"{recipe.name}-{recipe.seed}", progress=log()
        ).report


def log() -> Any:
    """Progress as lines on standard error, so that standard output stays one JSON object."""
    said: dict[str, float] = {}
    started = time.monotonic()

    def sink(event: Progress) -> None:
        now = time.monotonic()
        if event.done == event.total or now - said.get(event.task, 0.0) > LOG_EVERY_S:
            said[event.task] = now
            total = event.total if event.total is not None else "?"
            print(
                f"{now - started:7.0f} s  {event.task} {event.done}/{total} {event.note}", file=sys.stderr, flush=True
            )

    return sink


def say(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)


def classified_right(model: Path, rows: Sequence[Row]) -> list[float]:
    """1 for each row whose label the classifier at ``model`` finds, else 0."""
    from slmops.runtime import open_classifier

    classifier = open_classifier(model)
    best = classifier.probabilities([row.text for row in rows]).argmax(axis=1)
    return [float(classifier.labels[label] == row.target) for label, row in zip(best, rows, strict=True)]


def mean(values: Iterable[float]) -> float:
    return fmean(values)


def spread(values: Sequence[float]) -> list[float]:
    """Smallest and largest."""
    return [min(values), max(values)]


def check(name: str, values: Sequence[float], target: float) -> dict[str, Any]:
    """One claim: its mean over the runs, the runs' spread, and whether the mean reaches ``target``."""
    average = mean(values)
    return {"name": name, "value": average, "spread": spread(values), "target": target, "passed": average >= target}


def gemm_flops_per_s(precision: str) -> float:
    """What this machine, or its GPU, reaches in a product of two square matrices in fp32 or bf16: the best of a few."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, repeats = (GPU_GEMM_SIZE, GPU_GEMM_REPEATS) if device == "cuda" else (GEMM_SIZE, GEMM_REPEATS)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, dtype=kind, device=device) for _ in range(2))
    best_s = float("inf")
    for _ in range(repeats):
        wait()
        started = time.perf_counter()
        a @ b
        wait()
        best_s = min(best_s, time.perf_counter() - started)
    return 2 * size**3 / best_s


def wait() -> None:
    """Until the GPU, where there is one, has done what it was asked to: its work is queued."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    """What is trained on: the GPU's name, or the CPU."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def start_counting_memory() -> None:
    """From here on :func:`memory_bytes_peak` counts, on a GPU; of the CPU the process's highest is all that is kept."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_bytes_peak() -> float:
    """The most that tensors held on the GPU, where there is one; else the process's highest resident memory."""
    import torch

    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's highest memory")


def small_classifier(options: argparse.Namespace) -> Path:
    """The model folder of a student as the demo makes it, int8, after one pass over the sample rows: what it knows is
    not asked here."""
    from slmops.artifacts import Variant, drafting
    from slmops.compress import export_classifier
    from slmops.pipeline.context import Context
    from slmops.pipeline.teach import make_student, prepare_data
    from slmops.recipe import parse_recipe
    from slmops.store import Store

    raw = {
        "name": "small-classifier",
        "task": "classification",
        "data": {"train": "sample:support", "input": "{text}", "target": "{intent}"},
        "train": {"epochs": 1},
    }
    recipe = parse_recipe(raw)
    with Store.open(options.store) as store:
        context = Context(recipe, store, False, log())
        student = make_student(context, "untaught", prepare_data(context), taught=False)
        path = (options.store / "small-classifier" / student.digest.removeprefix("sha256:")[:16]).resolve()
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with drafting("variant", path) as draft:
                export_classifier(
                    student.path, draft, precision="int8", task="classification", name=recipe.name, max_tokens=128
                )
    return Variant.open(path).path
