"""What HTTP adds to one classification, and what logging, redaction and metrics take of the server's throughput.

The model is a student of the usual size (int8 in onnxruntime). Overhead: single requests over a kept connection to
``slmops serve`` in a process of its own, against the same model called in this one, round by round in turns; the p50 of
each round. Cost of observation: servers of the same model and keys, asked by several callers in turns: without
observers; with JSON log and metrics; and with every redacted text written to the events' database too
(``--monitor full``), which is the one that is judged. Compared is the processor time that the server takes for a
request, which is what bounds its throughput and which other load on the machine leaves alone; requests a second are
told beside.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import say, small_classifier, spread
from slmops.evaluate.probe import cpu_s
from slmops.evaluate.served import Served
from slmops.package import resolve_model_folder
from slmops.runtime import open_classifier
from slmops.serve.keys import KeyFile

OVERHEAD_MS, COST = 2.0, 0.05
ROUNDS, REQUESTS = 20, 300
QUICK_ROUNDS, QUICK_REQUESTS = 4, 100
CALLERS = 4
SETTLE_S = 1.2
"""After the last answer events are still written: within a second."""
WHOLE = "log, metrics, redacted events"
TEXTS = (
    "where is my parcel, it was due on tuesday",
    "i want my money back",
    "can i change the address of my order after it was sent?",
    "the shop charged me twice",
)


def run(options: argparse.Namespace) -> dict[str, Any]:
    rounds, requests = (QUICK_ROUNDS, QUICK_REQUESTS) if options.quick else (ROUNDS, REQUESTS)
    bundle = small_classifier(options)
    with server(bundle) as (url, pid, key):
        added = overheads(bundle, Served(url, pid=pid, key=key), rounds, requests)
    say(f"overhead, p50 of each round: {added}")
    with server(bundle, plain=True) as plain, server(bundle) as logged, server(bundle, "full") as recorded:
        served = {"plain": plain, "log and metrics": logged, WHOLE: recorded}
        sides = {side: Served(url, pid=pid, key=key) for side, (url, pid, key) in served.items()}
        shares, rates = costs(sides, rounds, requests)
    overhead, cost = median(one["added_ms"] for one in added), median(shares[WHOLE])
    return {
        "ours": overhead,
        "peer": {"bare model p50 ms": median(one["bare_ms"] for one in added)},
        "ratio": overhead / OVERHEAD_MS,
        "spread": spread([one["added_ms"] for one in added]),
        "target": OVERHEAD_MS,
        "passed": overhead <= OVERHEAD_MS and cost <= COST,
        "unit": "ms added to a request, p50",
        "requests": rounds * requests,
        "observation": {
            "cost": cost,
            "spread": spread(shares[WHOLE]),
            "target": COST,
            "what": "processor time of the server for a request, more than without observers",
            "beside": {side: {"cost": median(values), "spread": spread(values)} for side, values in shares.items()},
            "per_s": {side: fmean(values) for side, values in rates.items()},
        },
        "rounds": added,
    }


def overheads(bundle: Path, served: Served, rounds: int, requests: int) -> list[dict[str, float]]:
    """The p50 of the bare model and of the server, round by round, and their difference."""
    model = open_classifier(resolve_model_folder(bundle))
    found = []
    for number in range(rounds + 1):
        bare, http = [], []
        for at in range(requests):
            text = TEXTS[at % len(TEXTS)]
            started = time.perf_counter()
            model.probabilities([text])
            bare.append(1e3 * (time.perf_counter() - started))
            http.append(served.post("/v1/classify", {"input": text}).ms)
        if number:  # the first one warms both
            bare_ms, http_ms = median(bare), median(http)
            found.append({"bare_ms": bare_ms, "http_ms": http_ms, "added_ms": http_ms - bare_ms})
    model.close()
    return found


def costs(
    sides: dict[str, Served], rounds: int, requests: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By how much a request takes more of the processor on each side than on the plain one, round by round; requests a
    second."""
    rates: dict[str, list[float]] = {side: [] for side in sides}
    shares: dict[str, list[float]] = {side: [] for side in sides if side != "plain"}
    for number in range(rounds + 1):
        taken_s = {}
        for side in list(sides) if number % 2 else list(reversed(sides)):
            taken_s[side], per_s = load(sides[side], 2 * requests)
            if number:
                rates[side].append(per_s)
        for side, values in shares.items():
            if number:
                values.append(taken_s[side] / taken_s["plain"] - 1)
    return shares, rates


def load(served: Served, requests: int) -> tuple[float, float]:
    """Processor seconds of the server's process for a request, and requests a second, from several callers."""

    def caller(count: int) -> None:
        for at in range(count):
            reply = served.post("/v1/classify", {"input": TEXTS[at % len(TEXTS)]})
            assert reply.status == 200, reply

    process = str(served.pid)
    before, started = cpu_s(process), time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(caller, [requests // CALLERS] * CALLERS))
    spent_s = time.perf_counter() - started
    time.sleep(SETTLE_S)
    return (cpu_s(process) - before) / requests, requests / spent_s


@contextmanager
def server(bundle: Path, monitor: str = "", *, plain: bool = False) -> Iterator[tuple[str, int, str]]:
    """URL, process id and key of a server in a process of its own. ``plain``: the application without its observers."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        keys = place / "keys.json"
        key = KeyFile(keys).make("bench", ["infer"])[1]
        if plain:
            command = [sys.executable, "-m", "benchmarks.classify_overhead", str(bundle), str(keys)]
        else:
            command = [sys.executable, "-m", "slmops", "serve", str(bundle), "--port", "0", "--json"]
            command += ["--log", "json", "--keys", str(keys)]
            command += ["--monitor", monitor, "--store", str(place / "store")] if monitor else []
        with (place / "log").open("wb") as logged:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=logged, text=True)
            try:
                assert child.stdout is not None
                yield json.loads(child.stdout.readline())["url"], child.pid, key
            finally:
                child.terminate()
                child.wait()


def serve_plain(bundle: Path, keys: Path) -> None:
    """The same server without its observers."""
    from slmops.serve.engine import Engine
    from slmops.serve.limits import Limits
    from slmops.serve.operate import Operated, ServeOptions, operate
    from slmops.serve.reload import Version
    from slmops.serve.server import bind, run

    def load(source: str) -> tuple[Version, Engine]:
        folder = resolve_model_folder(Path(source))
        return Version(source, folder), Engine.open(folder)

    whole = operate(str(bundle), load, ServeOptions("plain", keys))
    assert isinstance(whole.app, Limits)
    bare = Operated(Limits(whole.app.app, observers=()), whole.switch, whole.metrics)
    with bind("127.0.0.1", 0) as taken:
        run(bare, taken, on_ready=lambda url: print(json.dumps({"url": url}), flush=True))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    serve_plain(Path(sys.argv[1]), Path(sys.argv[2]))
