"""``python -m slmops.serve.measure_child REQUEST``: how fast engines write, one JSON object a line on standard output.

The request is ``{"candidates": [{"engine", "folder"}], "clients", "threads"}``. For each candidate, in order, one line:
``{"speed": {...}}``, or ``{"error"}`` where it could not be opened. A candidate that crashes the process has no line.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slmops.artifacts import Message
from slmops.errors import SlmopsError
from slmops.runtime.base import GenerationRequest, Generator
from slmops.runtime.batch import BatchGenerator
from slmops.runtime.description import ModelDescription
from slmops.runtime.engines import open_engine
from slmops.serve.choose import Speed

NEW_TOKENS = 64
REPEATS = 2
"""After one run that is not counted, alone and in a crowd alike: engines plan for each number of answers anew."""
TEXTS = (
    "Write a story about a ship.",
    "Tell me how bread is made, step by step.",
    "What should I see in a large city in two days?",
    "Explain why the sky is blue to a child.",
    "List ten things that belong into a suitcase, with a reason for each.",
    "My parcel has not come. What can I do?",
    "Describe a day in the life of a lighthouse keeper.",
    "Compare trains and planes for a journey of 500 km.",
)


def main(arguments: list[str]) -> None:
    asked = json.loads(arguments[0])
    for one in asked["candidates"]:
        told: dict[str, Any]
        try:
            told = {"speed": asdict(speed(one["engine"], one["folder"], asked["clients"], asked["threads"]))}
        except SlmopsError as error:
            told = {"error": str(error)}
        print(json.dumps(told), flush=True)  # noqa: T201 (the answer to the parent)


def speed(engine: str, folder: str, clients: int, threads: int | None) -> Speed:
    """Open the engine, warm it, and take the better of a few runs; errors as :func:`open_engine`."""
    description = ModelDescription.read(Path(folder))
    model = open_engine(engine, Path(folder), threads=threads)
    try:
        one_by_one = not isinstance(model, BatchGenerator) and at_once(model) == 1  # a crowd is as fast as one
        alone = best(model, description, 1)
        crowd = alone if clients == 1 or one_by_one else best(model, description, clients)
        return Speed(engine, folder, clients, alone, crowd)
    finally:
        model.close()


def best(model: Generator, description: ModelDescription, clients: int) -> float:
    """New tokens a second of so many callers: the best run but the first."""
    runs = [tokens_per_s(model, requests(description, clients, 10 * clients + run)) for run in range(REPEATS + 1)]
    return max(runs[1:])


def requests(description: ModelDescription, count: int, run: int) -> list[GenerationRequest]:
    """Different for each ``run``: what an engine remembers of the last one must not help it."""
    texts = [f"{run}, {number}. {TEXTS[number % len(TEXTS)]}" for number in range(count)]
    return [
        GenerationRequest(description.conversation((Message("user", text),)), max_tokens=NEW_TOKENS) for text in texts
    ]


def tokens_per_s(model: Generator, requests: Sequence[GenerationRequest]) -> float:
    """New tokens of all requests together by the time they took, asked as the server asks."""
    started = time.perf_counter()
    if isinstance(model, BatchGenerator):
        tokens = sum(one.completion_tokens for one in model.generate(requests))
    else:
        with ThreadPoolExecutor(at_once(model)) as threads:
            tokens = sum(threads.map(lambda request: written(model, request), requests))
    return max(tokens, 1) / (time.perf_counter() - started)


def at_once(model: Generator) -> int:
    """Answers that it writes side by side."""
    return int(getattr(model, "at_once", 1))


def written(model: Generator, request: GenerationRequest) -> int:
    """New tokens of one streamed answer."""
    return list(model.stream(request))[-1].completion_tokens


if __name__ == "__main__":
    main(sys.argv[1:])
