"""Which engine serves a bundle on this machine: measured at the first start, decided by a pure function, remembered.

Guarantees: engines are measured in a child process (:mod:`slmops.serve.measure_child`), so that one which crashes or
wants too much memory is out of the choice and nothing else; what was measured is kept under a key made of the models'
digests, the machine, the versions of the engines, the threads and the number of callers, and is not measured again
while these stay. The choice is about speed alone: whether a variant is good enough was decided by the gates before.
What was measured on a busy machine is used once and not kept. Not covered: a machine that is busy for a moment only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slmops.errors import ServeError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.runtime.engines import engines_of

log = logging.getLogger(__name__)
CLIENTS = 8
"""Callers at once that a choice is made for, where nobody says how many there will be."""
MEASURE_LIMIT_S = 300.0
METHOD = 2
"""Of measuring (:mod:`slmops.serve.measure_child`): what was measured by an older one is measured again."""
LIBRARIES = ("onnxruntime", "onnxruntime-genai", "openvino", "openvino-genai", "xllamacpp", "torch")


@dataclass(frozen=True)
class Candidate:
    """An engine that could serve the model in ``folder``."""

    engine: str
    folder: str


@dataclass(frozen=True)
class Speed:
    """What a candidate reached: new tokens/s of one caller, and of ``clients`` callers together."""

    engine: str
    folder: str
    clients: int
    alone_per_s: float
    crowd_per_s: float


@dataclass(frozen=True)
class Choice:
    """``speeds``: of all that could be measured; ``why``: a sentence for people."""

    engine: str
    folder: str
    why: str
    speeds: tuple[Speed, ...] = ()


def decide(speeds: Sequence[Speed]) -> Speed:
    """The candidate with the largest share of the best, alone and in a crowd alike (their geometric mean): one that is
    quick for one caller and collapses under eight is no choice, nor the other way about. With one caller expected, the
    quickest for one. Pure; ``speeds`` must not be empty.
    """
    best_alone = max(speed.alone_per_s for speed in speeds)
    best_crowd = max(speed.crowd_per_s for speed in speeds)

    def share(speed: Speed) -> float:
        alone = speed.alone_per_s / best_alone
        return alone if speed.clients == 1 else alone * speed.crowd_per_s / best_crowd

    return max(speeds, key=share)


def candidates_of(folders: Sequence[Path]) -> list[Candidate]:
    """Every engine that can serve one of ``folders`` here."""
    return [Candidate(engine, str(folder)) for folder in folders for engine in engines_of(folder)]


def choose(
    candidates: Sequence[Candidate],
    *,
    digests: Sequence[str],
    machine: Mapping[str, Any],
    kept: Path,
    clients: int = CLIENTS,
    threads: int | None = None,
    again: bool = False,
    progress: ProgressSink = ignore,
) -> Choice:
    """The engine for ``candidates``; measured, or remembered in ``kept``.

    ``digests``  of the models, in the order of their folders
    ``machine``  what the speed depends on: processor, cores
    ``again``    measure even where that was done before

    Raises:
        ServeError: none of them can be run here.
    """
    if not candidates:
        raise ServeError("No engine that is installed can serve this model.", remedy="Run slmops doctor.")
    if len(candidates) == 1:
        one = candidates[0]
        return Choice(one.engine, one.folder, "the only engine that can run it here")
    record = kept / f"{_key(candidates, digests, machine, clients, threads)}.json"
    speeds = None if again else _remembered(record, candidates)
    when = "measured here before"
    if speeds is None:
        speeds = measure(candidates, clients, threads, progress=progress)
        when = "measured here just now"
        if was_busy(_load_1min(), machine.get("cores")):
            when += ", while other programs kept the machine busy, hence not remembered"
        else:
            _remember(record, speeds, candidates, machine)
    best = decide(speeds)
    return Choice(best.engine, best.folder, reason(best, speeds, when), tuple(speeds))


def was_busy(load_1min: float | None, cores: int | None) -> bool:
    """Whether more wanted a core than there are, the engine that was measured taken off. Pure."""
    return load_1min is not None and cores is not None and load_1min > 2 * cores + 1


def reason(best: Speed, speeds: Sequence[Speed], when: str) -> str:
    """What was measured, best first, in one sentence."""
    told = sorted(speeds, key=lambda speed: (speed is not best, -speed.crowd_per_s))
    numbers = [f"{one.engine} {one.crowd_per_s:.0f} and {one.alone_per_s:.0f}" for one in told]
    if best.clients == 1:
        numbers = [f"{one.engine} {one.alone_per_s:.0f}" for one in told]
        return f"{when}: tokens/s for one caller: {', '.join(numbers)}"
    return f"{when}: tokens/s for {best.clients} callers and for one: {', '.join(numbers)}"


def measure(
    candidates: Sequence[Candidate], clients: int, threads: int | None, *, progress: ProgressSink = ignore
) -> list[Speed]:
    """The speed of each candidate that runs.

    Raises:
        ServeError: none does.
    """
    speeds: list[Speed] = []
    left = list(candidates)
    failures: list[str] = []
    while left:
        progress(Progress("measure engines", len(candidates) - len(left), len(candidates), "engines", left[0].engine))
        done, failure = _measured(left, clients, threads)
        speeds += [speed for speed in done if speed is not None]
        left = left[len(done) :]
        if left:  # the child ended within the first of those that are left
            failures.append(f"{left.pop(0).engine}: {failure}")
            log.warning("%s", failures[-1])
    progress(Progress("measure engines", len(candidates), len(candidates), "engines"))
    if not speeds:
        raise ServeError(
            f"No engine could be measured: {'; '.join(failures) or 'none of them opened the model'}.",
            remedy="Name one with --engine to see its error.",
        )
    return speeds


def _measured(candidates: Sequence[Candidate], clients: int, threads: int | None) -> tuple[list[Speed | None], str]:
    """One child over ``candidates``: what it told until its end, and its last words."""
    asked = {"candidates": [asdict(one) for one in candidates], "clients": clients, "threads": threads}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as told:
        failure = ""
        try:
            command = [sys.executable, "-m", "slmops.serve.measure_child", json.dumps(asked)]
            subprocess.run(command, stdout=told, stderr=said, timeout=MEASURE_LIMIT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            failure = f"it took more than {MEASURE_LIMIT_S:.0f} s"
        told.seek(0)
        said.seek(0)
        raw = [json.loads(line) for line in told if line.startswith("{")]
        failure = failure or next(reversed(said.read().strip().splitlines()), "it ended without a word")
    return [Speed(**one["speed"]) if "speed" in one else None for one in raw], failure


def _key(
    candidates: Sequence[Candidate],
    digests: Sequence[str],
    machine: Mapping[str, Any],
    clients: int,
    threads: int | None,
) -> str:
    content = {
        "method": METHOD,
        "engines": [one.engine for one in candidates],
        "digests": list(digests),
        "machine": {name: machine.get(name) for name in ("cpu", "cores", "cpu_flags", "arch")},
        "versions": {name: _version(name) for name in LIBRARIES},
        "clients": clients,
        "threads": threads,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _load_1min() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):  # not on Windows
        return None


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _remembered(record: Path, candidates: Sequence[Candidate]) -> list[Speed] | None:
    """What was measured before, for the folders as they are named now; None where there is nothing of use."""
    try:
        raw = json.loads(record.read_text("utf-8"))["speeds"]
        return [Speed(**{**one["speed"], "folder": candidates[one["candidate"]].folder}) for one in raw] or None
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def _remember(
    record: Path, speeds: Sequence[Speed], candidates: Sequence[Candidate], machine: Mapping[str, Any]
) -> None:
    """A record that cannot be written is measured again next time."""
    order = [(one.engine, one.folder) for one in candidates]
    told = [{"candidate": order.index((one.engine, one.folder)), "speed": asdict(one)} for one in speeds]
    text = json.dumps({"speeds": told, "machine": dict(machine)}, indent=1)
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_suffix(f".{os.getpid()}.tmp")
        unfinished.write_text(text, "utf-8")
        unfinished.replace(record)
    except OSError as error:
        log.warning("%s could not be written (%s): the engines are measured again next time", record, error)
