"""Rate of the teacher engine against the ideal: 64 at once, 200 ms an answer; and its memory over the run.

The fake teacher is a process of its own. The peer is arithmetic: prompts * 0.2 s / 64. Measured is the stage that a run
does, journal and checks included, from the first request to the last answer on disk; what comes before and after
(reading rows, writing the data set) is told beside it. Memory is this process's resident size after a fifth of the
answers, and at the end of asking.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import spread
from slmops.artifacts import Dataset, Draft, drafting
from slmops.distill import OpenAITeacher, ask_teacher
from slmops.progress import Progress
from slmops.recipe import TeacherConfig

PROMPTS, QUICK_PROMPTS = 20_000, 4_000
DELAY_S, AT_ONCE = 0.2, 64
TARGET = 0.95
LARGEST_GROWTH = 1.1
REPEATS = 3
FAKES = Path(__file__).resolve().parents[1] / "tests"


def run(options: argparse.Namespace) -> dict[str, Any]:
    prompts, repeats = (QUICK_PROMPTS, 1) if options.quick else (PROMPTS, REPEATS)
    ideal_per_s = AT_ONCE / DELAY_S
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = rows(Path(folder), prompts)
        for number in range(repeats):
            runs.append(asked(dataset, Path(folder) / f"run-{number}", prompts))
    shares = [one["per_s"] / ideal_per_s for one in runs]
    growth = [one["memory_bytes_end"] / one["memory_bytes_early"] for one in runs]
    ratio = sum(shares) / len(shares)
    return {
        "ours": sum(one["per_s"] for one in runs) / len(runs),
        "peer": ideal_per_s,
        "ratio": ratio,
        "spread": spread(shares),
        "target": TARGET,
        "passed": ratio >= TARGET and max(growth) <= LARGEST_GROWTH,
        "unit": "answers/s",
        "prompts": prompts,
        "memory_growth": {"values": growth, "target": LARGEST_GROWTH},
        "runs": runs,
    }


def rows(folder: Path, count: int) -> Dataset:
    """``count`` different questions in an artifact."""
    with drafting("dataset", folder / "data") as draft:
        for split, numbers in (("train", range(count)), ("validation", range(0)), ("test", range(0))):
            with (draft.path / f"{split}.jsonl").open("w", encoding="utf-8") as lines:
                for number in numbers:
                    text = f"Question {number}: what becomes of a parcel that nobody fetched within {number % 30} days?"
                    row = {
                        "id": str(number),
                        "messages": [{"role": "user", "content": text}],
                        "target": None,
                        "meta": {},
                    }
                    lines.write(json.dumps(row) + "\n")
        (draft.path / "quarantine.jsonl").write_text("")
        (draft.path / "summary.json").write_text(json.dumps({"labels": None}))
    return Dataset.open(folder / "data")


def asked(dataset: Dataset, folder: Path, prompts: int) -> dict[str, Any]:
    """One whole stage against a fresh server."""
    command = [sys.executable, "-m", "fakes.teacher_server", "0", str(DELAY_S)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FAKES), os.environ.get("PYTHONPATH", "")])}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    process = psutil.Process()
    seen: dict[str, float] = {}

    def follow(event: Progress) -> None:
        if event.done == prompts // 5:
            seen["memory_bytes_early"] = process.memory_info().rss
        if event.done == event.total:
            seen["ended_s"] = time.perf_counter()
            seen["memory_bytes_end"] = process.memory_info().rss

    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        config = TeacherConfig(
            model="openai:fake",
            base_url=f"http://127.0.0.1:{port}/v1",
            concurrency=AT_ONCE,
            timeout_s=30,
            max_tokens=64,
        )
        teacher = _Timed(config)
        (folder / "out").mkdir(parents=True)
        (folder / "work").mkdir()
        cpu_before, started_s = sum(process.cpu_times()[:2]), time.perf_counter()
        ask_teacher(dataset, "qa", config, teacher, Draft(folder / "out", folder / "work"), progress=follow)
        whole_s, cpu_s = time.perf_counter() - started_s, sum(process.cpu_times()[:2]) - cpu_before
    finally:
        server.kill()
        server.wait()
    asking_s = seen.pop("ended_s") - teacher.begun_s
    return {**seen, "per_s": prompts / asking_s, "asking_s": asking_s, "stage_s": whole_s, "cpu_s": cpu_s}


class _Timed(OpenAITeacher):
    """Remembers when the first request was handed over."""

    begun_s = 0.0

    def answer(self, *arguments: Any, **named: Any) -> Any:
        self.begun_s = time.perf_counter()
        return super().answer(*arguments, **named)
