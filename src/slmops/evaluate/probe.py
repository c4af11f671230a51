"""The measured process: ``python -m slmops.evaluate.probe REQUEST.json``.

It opens one model and then does what its parent (:mod:`slmops.evaluate.measure`) says, one JSON object a line on
standard input, answered by one JSON object a line on standard output:

    (opened)                              -> {"load_s", "memory_bytes_loaded", "memory_bytes_peak", "threads", "limits"}
    {"do": "warm", "first", "count"}      -> {}
    {"do": "latency", "first", "step", "limit_s"}
                                          -> {"latency_ms": [...], "ttft_ms": [...], "tokens", "memory_bytes_peak"}
    {"do": "throughput", "batch", "limit_s"}
                                          -> {"answers", "tokens", "wall_s", "memory_bytes_peak"}

    {"do": "ask", "requests", "limit_s"}  -> {"latency_ms", "ttft_ms", "gaps_ms", "prompt_tokens", "tokens": [...],
                                              "wall_s", "cpu_s", "memory_bytes_peak", "memory_bytes_anon_swap"}
    {"do": "ask_together", "requests", "limit_s"}
                                          -> {"answers", "tokens", "wall_s", "memory_bytes_peak"}

The end of standard input ends it. A model that cannot be opened is answered with ``{"error", "remedy"}``.

Nothing is imported here but the runtime and what it needs, so that the peak of the process is the model's true cost,
Python included.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from slmops.artifacts import Message
from slmops.errors import SlmopsError
from slmops.evaluate.limits import Limits, apply_limits
from slmops.runtime import Classifier, GenerationRequest, Generator

LEAST_LATENCY_REQUESTS = 3  # a turn answers so many whatever its time limit, or it has no median


OWN = "self"
"""This process, as ``/proc`` names it."""


def memory_bytes(field: str, process: str = OWN) -> int:
    """A field of a process's memory in bytes: ``VmHWM`` (peak resident), ``RssAnon`` (resident, not file-backed).

    Where there is no ``/proc``, the peak resident size of this process stands in for both.
    """
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as status:  # noqa: PTH123 - pathlib costs memory, little but ours
            for line in status:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
        if field == "VmSwap":
            return 0
    except FileNotFoundError:
        if field == "VmSwap":
            return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def cpu_s(process: str = OWN) -> float:
    """Seconds of processor time that a process has taken; of this one where that cannot be had."""
    if process != OWN and sys.platform == "linux":
        try:
            # Its clock as clock_getcpuclockid(3) numbers it; /proc itself counts in steps of 10 ms.
            return time.clock_gettime((~int(process) << 3) | 2)
        except OSError:
            pass  # it has ended
    return time.process_time()


def process_of(turns: Turns) -> str:
    """Whose cost is counted: that of the child in which the model runs, else of this process."""
    child = getattr(turns.model, "child_pid", None)
    pid = child() if child is not None else 0
    return str(pid) if pid else OWN


class ClassifierTurns:
    """What a classifier does in its turn. ``requests`` are texts."""

    def __init__(self, model: Classifier, requests: list[str]) -> None:
        self.model = model
        self.requests = requests

    def one(self, index: int) -> tuple[float | None, int]:
        self.model.probabilities([self.requests[index % len(self.requests)]])
        return None, 0

    def timed(self, request: Any) -> dict[str, Any]:
        started = time.perf_counter()
        self.model.probabilities([request])
        latency_ms = (time.perf_counter() - started) * 1e3
        count = getattr(self.model, "count_tokens", None)
        prompt = int(count(request)) if count else 0
        return {"latency_ms": latency_ms, "ttft_ms": None, "gaps_ms": [], "tokens": 0, "prompt_tokens": prompt}

    def together(self, requests: list[Any]) -> int:
        self.model.probabilities(list(requests))
        return 0

    def many(self, first: int, count: int) -> int:
        self.model.probabilities([self.requests[(first + i) % len(self.requests)] for i in range(count)])
        return 0


class GeneratorTurns:
    """What a generator does in its turn. Answers are streamed for latency and batched for throughput."""

    def __init__(self, model: Generator, requests: list[GenerationRequest]) -> None:
        self.model = model
        self.requests = requests

    def one(self, index: int) -> tuple[float | None, int]:
        """Seconds to the first text, and tokens of the whole answer."""
        started, first_s, tokens = time.perf_counter(), None, 0
        for delta in self.model.stream(self.requests[index % len(self.requests)]):
            if first_s is None and delta.text:
                first_s = time.perf_counter() - started
            tokens = delta.completion_tokens or tokens
        return first_s, tokens

    def timed(self, request: Any) -> dict[str, Any]:
        """One answer with the time of each piece of text. Pieces are tokens, but for those that hold no text yet."""
        started = time.perf_counter()
        moments: list[float] = []
        tokens = prompt_tokens = 0
        for delta in self.model.stream(read_request(request)):
            if delta.text:
                moments.append(time.perf_counter())
            tokens, prompt_tokens = delta.completion_tokens or tokens, delta.prompt_tokens or prompt_tokens
        return {
            "latency_ms": (time.perf_counter() - started) * 1e3,
            "ttft_ms": (moments[0] - started) * 1e3 if moments else None,
            "gaps_ms": [(after - before) * 1e3 for before, after in itertools.pairwise(moments)],
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
        }

    def together(self, requests: list[Any]) -> int:
        return sum(answer.completion_tokens for answer in self.model.generate([read_request(raw) for raw in requests]))

    def many(self, first: int, count: int) -> int:
        batch = [self.requests[(first + i) % len(self.requests)] for i in range(count)]
        return sum(answer.completion_tokens for answer in self.model.generate(batch))


Turns = ClassifierTurns | GeneratorTurns


def take_turn(turns: Turns, order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order of the parent."""
    match order["do"]:
        case "warm":
            for index in range(order["first"], order["first"] + order["count"]):
                turns.one(index)
            return {}
        case "latency":
            return _latency(turns, order["first"], order["step"], order["limit_s"])
        case "throughput":
            return _throughput(turns, order["batch"], order["limit_s"])
        case "ask":
            return _ask(turns, order["requests"], order["limit_s"])
        case "ask_together":
            return _ask_together(turns, order["requests"], order["limit_s"])
        case unknown:
            raise ValueError(f"no such order: {unknown}")


def _latency(turns: Turns, first: int, step: int, limit_s: float | None) -> dict[str, Any]:
    latency_ms: list[float] = []
    ttft_ms: list[float] = []
    tokens, begun = 0, time.perf_counter()
    for index in range(first, len(turns.requests), step):
        over = limit_s is not None and time.perf_counter() - begun > limit_s
        if over and len(latency_ms) >= LEAST_LATENCY_REQUESTS:
            break
        started = time.perf_counter()
        first_s, answer_tokens = turns.one(index)
        latency_ms.append((time.perf_counter() - started) * 1e3)
        tokens += answer_tokens
        if first_s is not None:
            ttft_ms.append(first_s * 1e3)
    peak = memory_bytes("VmHWM", process_of(turns))
    return {"latency_ms": latency_ms, "ttft_ms": ttft_ms, "tokens": tokens, "memory_bytes_peak": peak}


def _throughput(turns: Turns, batch: int, limit_s: float) -> dict[str, Any]:
    """Whole batches, one after another, until ``limit_s`` is over; at least one."""
    answers = tokens = 0
    started = time.perf_counter()
    while not answers or time.perf_counter() - started < limit_s:
        tokens += turns.many(answers, batch)
        answers += batch
    wall_s = time.perf_counter() - started
    peak = memory_bytes("VmHWM", process_of(turns))
    return {"answers": answers, "tokens": tokens, "wall_s": wall_s, "memory_bytes_peak": peak}


def _ask(turns: Turns, requests: list[Any], limit_s: float | None) -> dict[str, Any]:
    """Each request once, one at a time, with all that can be timed of it."""
    found: list[dict[str, Any]] = []
    process = process_of(turns)
    before_s, begun = cpu_s(process), time.perf_counter()
    for request in requests:
        over = limit_s is not None and time.perf_counter() - begun > limit_s
        if over and len(found) >= LEAST_LATENCY_REQUESTS:
            break
        found.append(turns.timed(request))
    wall_s = time.perf_counter() - begun
    return {
        **{key: [one[key] for one in found] for key in ("latency_ms", "ttft_ms", "tokens", "prompt_tokens")},
        "gaps_ms": [gap for one in found for gap in one["gaps_ms"]],
        "wall_s": wall_s,
        "cpu_s": cpu_s(process) - before_s,
        "memory_bytes_peak": memory_bytes("VmHWM", process),
        "memory_bytes_anon_swap": memory_bytes("RssAnon", process) + memory_bytes("VmSwap", process),
    }


def _ask_together(turns: Turns, requests: list[Any], limit_s: float) -> dict[str, Any]:
    """All of ``requests`` at once, again and again until ``limit_s`` is over; at least once."""
    answers = tokens = 0
    started = time.perf_counter()
    while not answers or time.perf_counter() - started < limit_s:
        tokens += turns.together(requests)
        answers += len(requests)
    wall_s = time.perf_counter() - started
    peak = memory_bytes("VmHWM", process_of(turns))
    return {"answers": answers, "tokens": tokens, "wall_s": wall_s, "memory_bytes_peak": peak}


def read_request(raw: dict[str, Any]) -> GenerationRequest:
    return GenerationRequest(
        messages=tuple(Message(m["role"], m["content"]) for m in raw["messages"]),
        max_tokens=raw["max_tokens"],
        temperature=raw["temperature"],
        top_p=raw["top_p"],
        seed=raw["seed"],
        stop=tuple(raw["stop"]),
    )


def open_turns(job: dict[str, Any]) -> Turns:
    """Open the model that the job names, with the package's own runtimes."""
    from slmops import runtime

    limited = (job.get("limits") or {}).get("cores")
    if limited and job["threads"] is None and job["form"] == "generator":
        job["threads"] = limited  # engines count the machine's cores, not those that this process may use
    if job["form"] == "classifier":
        return ClassifierTurns(runtime.open_classifier(job["path"], threads=job["threads"]), job["requests"])
    model = runtime.open_generator(job["path"], threads=job["threads"])
    return GeneratorTurns(model, [read_request(raw) for raw in job["requests"]])


def run(job: dict[str, Any], orders: Iterator[str], answer: IO[str], opener: Callable[[dict[str, Any]], Turns]) -> None:
    """Open the model, then answer orders until they end."""

    def say(value: dict[str, Any]) -> None:
        answer.write(json.dumps(value) + "\n")
        answer.flush()

    raw = job.get("limits") or {}
    held = apply_limits(Limits(**raw), Path(job["group"]) if job.get("group") else None) if raw else None
    started = time.perf_counter()
    try:
        turns = opener(job)
    except SlmopsError as error:
        say({"error": error.message, "remedy": error.remedy})
        return
    say(
        {
            "load_s": time.perf_counter() - started,
            "memory_bytes_loaded": memory_bytes("RssAnon", process_of(turns)),
            "memory_bytes_peak": memory_bytes("VmHWM", process_of(turns)),
            "threads": job["threads"],
            "limits": held,
        }
    )
    for line in orders:
        try:
            answer_to = take_turn(turns, json.loads(line))
        except SlmopsError as error:  # a request that this model cannot take; the next one may be another
            answer_to = {"error": error.message, "remedy": error.remedy}
        say(answer_to)
    turns.model.close()


def main(arguments: list[str], opener: Callable[[dict[str, Any]], Turns] = open_turns) -> None:
    with open(arguments[0], encoding="utf-8") as file:  # noqa: PTH123 - as above
        job = json.load(file)
    # Libraries print to standard output; the protocol moves to a descriptor of its own and they go to standard error.
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    run(job, iter(sys.stdin), protocol, opener)


if __name__ == "__main__":
    main(sys.argv[1:])
