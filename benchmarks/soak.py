"""20,000 requests: the server's memory must not rise; and kill -9 under load: it must come back by itself.

Memory is what no file backs, with what was swapped out, of the server's process; the slope is over requests, after the
first third, with the interval of Newey and West. Then ``slmops serve --supervise --monitor full`` is asked by several
callers while its child is killed three times: told are the requests that were lost with it, those that were refused,
how long nobody was answered, and how long before a kill the oldest answer was given whose event is not in the database.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.classify_overhead import TEXTS
from benchmarks.common import log, say, small_classifier
from slmops.evaluate.served import Served
from slmops.evaluate.validate import RISE_LIMIT_BYTES, Asker, Subject, ValidateSettings, soak
from slmops.monitor.log import Window
from slmops.monitor.place import Place
from slmops.package import resolve_model_folder
from slmops.runtime.description import ModelDescription

REQUESTS, QUICK_REQUESTS = 20_000, 2_000
CALLERS = 4
KILLS, QUICK_KILLS = 3, 1
BACK_LIMIT_S = 15.0
EVENTS_LIMIT_S = 1.0
"""Events of older answers than that have to survive a kill."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    bundle = small_classifier(options)
    requests, kills = (QUICK_REQUESTS, QUICK_KILLS) if options.quick else (REQUESTS, KILLS)
    description = ModelDescription.read(resolve_model_folder(bundle))
    with server(bundle) as (url, child):
        asker = Asker(Served(url, pid=child.pid), Subject("soak", "", description), 16)
        check = soak(asker, ValidateSettings(soak_requests=requests, soak_callers=CALLERS), log())
    say(check.found)
    with tempfile.TemporaryDirectory() as store:
        with server(bundle, "--supervise", "--monitor", "full", "--store", store) as (url, child):
            killed, answers = kill_under_load(url, child.pid, kills)
        killed |= {"events": events_lost(Path(store), answers, killed["kills"])}
    say(f"kills: {killed}")
    low, high = check.evidence["ci95"]
    back = max((one["silent_s"] for one in killed["kills"]), default=float("inf"))
    return {
        "ours": check.evidence["slope_bytes"],
        "peer": 0,
        "ratio": None,
        "spread": [low, high],
        "target": "zero within the interval, or an interval below 1 KiB a request",
        "passed": bool(check.passed)
        and killed["refused"] == 0
        and back <= BACK_LIMIT_S
        and killed["events"]["oldest_lost_s"] <= EVENTS_LIMIT_S,
        "unit": "bytes a request",
        "requests": requests,
        "indistinguishable_from_zero": low <= 0 <= high,
        "rise_limit_bytes": RISE_LIMIT_BYTES,
        "memory_bytes": [check.evidence["start_bytes"], check.evidence["end_bytes"]],
        "failed": check.evidence["failed"],
        "p50_ms": check.evidence["p50_ms"],
        "killed": {**killed, "back_limit_s": BACK_LIMIT_S},
    }


def kill_under_load(url: str, parent: int, kills: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Kill the answering process again and again while callers ask; and when each answer came, by its request's id."""
    stop, lock = threading.Event(), threading.Lock()
    counts = {"answered": 0, "lost": 0, "refused": 0, "other": 0}
    last_answer_s = [time.monotonic()]
    answers: dict[str, float] = {}

    def count(what: str) -> None:
        with lock:
            counts[what] += 1
            if what == "answered":
                last_answer_s[0] = time.monotonic()

    def caller(number: int) -> None:
        while not stop.is_set():
            try:
                reply = httpx.post(f"{url}/v1/classify", json={"input": TEXTS[number % len(TEXTS)]}, timeout=60)
                count("answered" if reply.status_code == 200 else "other")
                answers[reply.headers["x-request-id"]] = time.monotonic()
            except httpx.ConnectError:
                count("refused")
            except httpx.HTTPError:
                count("lost")

    callers = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
    for one in callers:
        one.start()
    told = []
    for _ in range(kills):
        time.sleep(6)
        (child,) = psutil.Process(parent).children()
        before = dict(counts)
        os.kill(child.pid, signal.SIGKILL)
        killed_s = time.monotonic()
        while counts["answered"] <= before["answered"] + CALLERS and time.monotonic() - killed_s < 60:
            time.sleep(0.005)
        silent_s = last_answer_s[0] - killed_s
        told.append({"at_s": killed_s, "silent_s": silent_s, "lost": counts["lost"] - before["lost"]})
    time.sleep(1)
    stop.set()
    for one in callers:
        one.join()
    return {"kills": told, **counts}, answers


def events_lost(store: Path, answers: dict[str, float], kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Answers whose events are not in the database, and how long before the next kill the oldest of them was given."""
    with Place.of(store).open() as events:
        kept = {row["request_id"] for row in events.events(Window(), "request_id")}
        told = [gap for gap in events.gaps() if "ended without closing" in gap["reason"]]
    before_s = [
        min((kill["at_s"] - at_s for kill in kills if kill["at_s"] >= at_s), default=float("inf"))
        for name, at_s in answers.items()
        if name not in kept
    ]
    return {"kept": len(kept), "lost": len(before_s), "oldest_lost_s": max(before_s, default=0.0), "gaps": len(told)}


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """URL and process of ``slmops serve`` with JSON logs to a file."""
    command = [sys.executable, "-m", "slmops", "serve", str(bundle), "--port", "0", "--json", "--log", "json", *options]
    with tempfile.TemporaryFile() as logged:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=logged, text=True)
        try:
            assert child.stdout is not None
            yield json.loads(child.stdout.readline())["url"], child
        finally:
            child.terminate()
            child.wait()
