"""All that a model costs on this machine, as one JSON object that can be sent to somebody else.

Guarantees: every model runs in a fresh process that holds its runtime and itself alone; models take turns, in an order
that rotates, so that other load meets all alike; the report names neither host, user, path nor prompt. Runs from the
device size of the installation.
What is measured: time to the first text, per token and of whole answers (p50, p95, p99); tokens and answers a second by
how many requests come at once and by the length of the input; memory (anonymous pages and swap, and the peak); the
processor's time; joules where the machine tells them; loading; size on disk.
Not covered: requests over HTTP. "At once" is one batch of so many requests, all handed over together.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slmops import __version__
from slmops.artifacts import Message
from slmops.errors import DataError, ModelError, UsageError
from slmops.evaluate.energy import EnergyCounter, energy_counter
from slmops.evaluate.estimate import estimate_on
from slmops.evaluate.limits import Limits
from slmops.evaluate.machine import machine_facts
from slmops.evaluate.measure import PROBE, SETTLE_S, Child, Form, Measurement
from slmops.evaluate.peers import peers_here
from slmops.evaluate.speed import MachineSpeed, machine_speed
from slmops.hardware import DeviceProfile
from slmops.progress import Progress, ProgressSink, ignore
from slmops.runtime import GenerationRequest, ModelDescription

KIND = "slmops-bench"
SCHEMA = 1
PEER_PROBE = (sys.executable, "-P", "-m", "slmops.evaluate.peers")
ROUNDS = 5
LENGTH_REQUESTS = 3  # of each input length
WARM_REQUESTS = 2
PROMPTS = (
    "My card was charged twice for the same order. What should I do?",
    "Explain in two sentences why the sky is blue.",
    "Write a short, polite reply to a customer whose parcel is late.",
    "How do I change the address of my account?",
    "List three things to check before a long drive.",
    "Please tell me when the shop opens on Saturday and whether I can return shoes without the box.",
)
FILLER = "the parcel was sent on monday and should have been here by now but nothing has come so far"


UNLIMITED = Limits()


@dataclass(frozen=True)
class BenchSettings:
    """
    ``requests``    single requests, in all
    ``max_tokens``  new tokens of an answer at most (generators)
    ``at_once``     how many requests are handed over together
    ``lengths``     input lengths that are tried, in words; tokens are counted by the engine
    ``limit_s``     seconds that one model may take for its single requests, and for each further part a fifth of it
    ``threads``     None: the runtime's choice
    ``limits``      what every measured process is held to
    """

    requests: int = 30
    max_tokens: int = 64
    at_once: tuple[int, ...] = (1, 4, 8)
    lengths: tuple[int, ...] = (16, 64, 256)
    limit_s: float = 30.0
    threads: int | None = None
    limits: Limits = UNLIMITED

    def quick(self) -> BenchSettings:
        """Less work, for a look."""
        return BenchSettings(6, 16, self.at_once[:2], self.lengths[:2], 5.0, self.threads, self.limits)


@dataclass(frozen=True)
class Subject:
    """A model that is measured. ``engine``: ``slmops`` for a model folder, else a peer's name with its own path."""

    name: str
    path: Path
    engine: str = "slmops"
    digest: str = ""


def bench(
    subjects: Sequence[Subject],
    settings: BenchSettings,
    *,
    prompts: Sequence[str] = PROMPTS,
    device: DeviceProfile | None = None,
    progress: ProgressSink = ignore,
    energy: EnergyCounter | None = None,
) -> dict[str, Any]:
    """Measure ``subjects`` side by side; the report as plain JSON.

    ``prompts``  what is asked, again and again; a classifier gets them as texts
    ``device``   estimate the same for it too; what the processes are held to is said in ``settings``

    Raises:
        UsageError: nothing to measure, or classifiers beside generators.
        ModelError: a model cannot be opened, or its process died.
    """
    if not subjects or not prompts:
        raise UsageError("There is nothing to measure.", remedy="Name a bundle, and leave --prompts out or fill it.")
    form = _common_form(subjects)
    counter = energy or energy_counter()
    steps, done = len(subjects) * (1 + ROUNDS + len(settings.at_once) + len(settings.lengths)), 0

    def step(note: str) -> None:
        nonlocal done
        done += 1
        progress(Progress("bench", done, steps, "turns", note))

    with contextlib.ExitStack() as stack:
        runs = []
        for subject in subjects:
            run = _Run(subject, form, settings, prompts, counter)
            stack.enter_context(run.open())
            runs.append(run)
            step(f"{subject.name}: opened")
        for number in range(ROUNDS):
            for run in runs[number % len(runs) :] + runs[: number % len(runs)]:
                time.sleep(SETTLE_S)
                run.single(number)
                step(run.subject.name)
        for count in settings.at_once:
            for run in runs:
                run.together(count)
                step(f"{run.subject.name}: {count} at once")
        for length in settings.lengths:
            for run in runs:
                run.of_length(length)
                step(f"{run.subject.name}: {length} words")
        entries = [run.entry() for run in runs]
    machine = machine_facts()
    if device is not None:
        here = machine_speed(settings.limits.cores)
        entries = [{**one, "on_device": _on_device(one, device, here, machine["cpu_flags"])} for one in entries]
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "slmops": __version__,
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine,
        "engines": peers_here(),
        "form": form,
        "settings": {**asdict(settings), "prompts": len(prompts)},
        "models": entries,
    }


def _on_device(
    entry: Mapping[str, Any], device: DeviceProfile, here: MachineSpeed, flags: Sequence[str]
) -> dict[str, Any]:
    measured = Measurement(
        latency_ms=entry["latency_ms"],
        throughput_per_s=entry["answers_per_s"],
        memory_bytes_peak=entry["memory"]["peak_bytes"] or entry["memory"]["peak_bytes_single"],
        memory_bytes_peak_single=entry["memory"]["peak_bytes_single"],
        memory_bytes_loaded=entry["memory"]["loaded_bytes"],
        load_s=entry["load_s"],
        threads=entry["threads"],
        batch=1,
        requests=entry["requests"],
        rounds_p50_ms=(),
        tokens_per_s=entry["tokens_per_s"],
        ttft_ms=entry["ttft_ms"],
    )
    return estimate_on(
        device,
        here,
        measured,
        size_bytes=entry["size_bytes"],
        parameters=entry["parameters"],
        precision=entry["precision"],
        flags_here=flags,
    ).to_json()


def _common_form(subjects: Sequence[Subject]) -> Form:
    forms: set[Form] = {_form(subject) for subject in subjects}
    if len(forms) > 1:
        raise UsageError(
            "A classifier and a model that writes text cannot be measured side by side.", remedy="Name them apart."
        )
    return forms.pop()


def _form(subject: Subject) -> Form:
    if subject.engine != "slmops":
        return "generator"
    return "classifier" if ModelDescription.read(subject.path).form == "classifier" else "generator"


class _Run:
    """One model's turns, and what came of them."""

    def __init__(
        self, subject: Subject, form: Form, settings: BenchSettings, prompts: Sequence[str], counter: EnergyCounter
    ) -> None:
        self.subject = subject
        self._form = form
        self._settings = settings
        self._counter = counter
        self._requests = [self._request(prompts[i % len(prompts)]) for i in range(settings.requests)]
        self._turns: list[dict[str, Any]] = []
        self._joules = 0.0
        self._at_once: list[dict[str, Any]] = []
        self._by_length: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        settings, peer = self._settings, self.subject.engine != "slmops"
        job = {
            "path": str(self.subject.path),
            "form": self._form,
            "threads": settings.threads,
            "requests": self._requests[:1],
            "engine": self.subject.engine,
        }
        child = Child(
            self.subject.path, job, PEER_PROBE if peer else PROBE, limits=settings.limits, name=self.subject.name
        )
        with child:
            self._child = child
            child.order({"do": "ask", "requests": self._requests[:WARM_REQUESTS], "limit_s": None})
            yield

    def _request(self, text: str) -> Any:
        if self._form == "classifier":
            return text
        messages: tuple[Message, ...] = (Message("user", text),)
        if self.subject.engine == "slmops":
            messages = ModelDescription.read(self.subject.path).conversation(messages)
        return asdict(GenerationRequest(messages, max_tokens=self._settings.max_tokens))

    def single(self, number: int) -> None:
        share = self._requests[number::ROUNDS]
        if not share:
            return
        before = self._counter.read()
        limit_s = self._settings.limit_s / ROUNDS
        self._turns.append(self._child.order({"do": "ask", "requests": share, "limit_s": limit_s}))
        self._joules += self._counter.joules(before, self._counter.read())

    def together(self, count: int) -> None:
        requests = [self._requests[i % len(self._requests)] for i in range(count)]
        order = {"do": "ask_together", "requests": requests, "limit_s": 0.0}
        if self._form == "classifier":  # one batch that is not timed: engines plan for a shape when they first see it
            self._child.order(order)
        found = self._child.order({**order, "limit_s": min(2.0, self._settings.limit_s / 5)})
        self._at_once.append(
            {
                "requests": count,
                "answers_per_s": found["answers"] / found["wall_s"],
                "tokens_per_s": found["tokens"] / found["wall_s"] if found["tokens"] else None,
                "memory_bytes_peak": found["memory_bytes_peak"],
            }
        )

    def of_length(self, words: int) -> None:
        text = " ".join(itertools.islice(itertools.cycle(FILLER.split()), words))
        order = {
            "do": "ask",
            "requests": [self._request(text)] * LENGTH_REQUESTS,
            "limit_s": self._settings.limit_s / 5,
        }
        try:
            found = self._child.order(order)
        except ModelError as error:
            self._by_length.append({"words": words, "why_not": error.message})
            return
        first_ms = [ms for ms in found["ttft_ms"] if ms is not None]
        tokens = sum(found["tokens"])
        median_ms = float(np.median(first_ms)) if first_ms else None
        prompt = int(np.median(found["prompt_tokens"]))
        self._by_length.append(
            {
                "words": words,
                "prompt_tokens": prompt or None,
                "ttft_ms": median_ms,
                "prompt_tokens_per_s": prompt / median_ms * 1e3 if prompt and median_ms else None,
                "tokens_per_s": tokens / found["wall_s"] if tokens else None,
                "answers_per_s": len(found["latency_ms"]) / found["wall_s"],
                "latency_ms": float(np.median(found["latency_ms"])),
            }
        )

    def entry(self) -> dict[str, Any]:
        def every(key: str) -> list[Any]:
            return [value for turn in self._turns for value in turn[key] if value is not None]

        latency_ms, tokens = every("latency_ms"), sum(every("tokens"))
        wall_s = sum(turn["wall_s"] for turn in self._turns)
        opened = self._child.opened
        return {
            **_identity(self.subject, self._form),
            "load_s": opened["load_s"],
            "threads": opened["threads"],
            "limits": opened.get("limits"),
            "requests": len(latency_ms),
            "latency_ms": percentiles(latency_ms),
            "ttft_ms": percentiles(every("ttft_ms")),
            "per_token_ms": percentiles(every("gaps_ms")),
            "tokens_per_s": tokens / (sum(latency_ms) / 1e3) if tokens else None,
            "answers_per_s": len(latency_ms) / wall_s,
            "at_once": self._at_once,
            "by_length": self._by_length,
            "memory": {
                "loaded_bytes": opened["memory_bytes_loaded"],
                "anon_swap_bytes": max(turn["memory_bytes_anon_swap"] for turn in self._turns),
                "peak_bytes_single": max(turn["memory_bytes_peak"] for turn in self._turns),
                "peak_bytes": max([one["memory_bytes_peak"] for one in self._at_once], default=None),
            },
            "cpu_percent": 100 * sum(turn["cpu_s"] for turn in self._turns) / wall_s,
            "energy": self._energy(len(latency_ms), tokens),
        }

    def _energy(self, answers: int, tokens: int) -> dict[str, Any]:
        if self._counter.why_not:
            return {"available": False, "why": self._counter.why_not}
        return {
            "available": True,
            "joules": self._joules,
            "joules_per_answer": self._joules / answers,
            "joules_per_token": self._joules / tokens if tokens else None,
        }


def _identity(subject: Subject, form: Form) -> dict[str, Any]:
    own = subject.engine == "slmops"
    description = ModelDescription.read(subject.path) if own else None
    return {
        "name": subject.name,
        "engine": description.runtime if description else subject.engine,
        "form": form,
        "precision": description.precision if description else "",
        "parameters": description.parameters if description else 0,
        "digest": subject.digest,
        "size_bytes": size_bytes(subject.path),
    }


def size_bytes(path: Path) -> int:
    """All files below ``path``, or the one that it is."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """``{"p50", "p95", "p99", "mean", "count"}``; None for no values."""
    if not values:
        return None
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
        "mean": float(np.mean(values)),
        "count": len(values),
    }


def read_bench(path: Path) -> dict[str, Any]:
    """A report that :func:`bench` made, perhaps on another machine.

    Raises:
        DataError: the file cannot be read, or is no such report.
    """
    remedy = "Name a file that was written by: slmops bench BUNDLE --out FILE"
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {why}.", remedy=remedy) from None
    if not isinstance(raw, dict) or raw.get("kind") != KIND or not isinstance(raw.get("models"), list):
        raise DataError(f"{path} is no report of slmops bench.", remedy=remedy)
    if raw.get("schema", 0) > SCHEMA:
        raise DataError(
            f"{path} is of schema {raw['schema']}, and this version reads {SCHEMA}.", remedy="Update slmops."
        )
    return raw


def machine_in_words(machine: Mapping[str, Any]) -> str:
    memory = machine.get("memory_bytes")
    held = f", {memory / 1e9:.0f} GB" if memory else ""
    return f"{machine['cpu']}, {machine['cores']} cores{held}, {machine['os']}"


# --- for people ---------------------------------------------------------------------------------------------------


def held_in_words(limits: Mapping[str, Any]) -> str:
    parts = []
    if limits.get("cores"):
        parts.append(f"{limits['cores']} cores at most")
    if limits.get("memory_bytes"):
        parts.append(f"{limits['memory_bytes'] / 1e6:,.0f} MB")
    return f"; held to {', '.join(parts)}" if parts else ""


def table_rows(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Lines of the table for people, a cell a model; those that nobody has are left out."""
    lines = [
        ("engine", [" ".join(part for part in (m["engine"], m["precision"]) if part) for m in models]),
        ("size on disk", [_megabytes(m["size_bytes"]) for m in models]),
        ("loading", [_seconds(m["load_s"]) for m in models]),
        ("first text, ms: p50 / p95 / p99", [_three(m["ttft_ms"]) for m in models]),
        ("per token, ms: p50 / p95 / p99", [_three(m["per_token_ms"]) for m in models]),
        ("answer, ms: p50 / p95 / p99", [_three(m["latency_ms"]) for m in models]),
        ("tokens/s, one request", [_number(m["tokens_per_s"]) for m in models]),
    ]
    for count in dict.fromkeys(one["requests"] for m in models for one in m["at_once"]):
        found = [_entry(m["at_once"], "requests", count) for m in models]
        lines.append((f"tokens/s, {count} at once", [_number(one.get("tokens_per_s")) for one in found]))
        lines.append((f"answers/s, {count} at once", [_number(one.get("answers_per_s")) for one in found]))
    for words in dict.fromkeys(one["words"] for m in models for one in m["by_length"]):
        found = [_entry(m["by_length"], "words", words) for m in models]
        lines.append((f"{words} words in: tokens", [_number(one.get("prompt_tokens")) for one in found]))
        lines.append((f"{words} words in: first text", [_milliseconds(one.get("ttft_ms")) for one in found]))
        lines.append((f"{words} words in: answer", [_milliseconds(one.get("latency_ms")) for one in found]))
    lines += [
        ("memory, its own and swap", [_megabytes(m["memory"]["anon_swap_bytes"]) for m in models]),
        ("memory, peak", [_megabytes(m["memory"]["peak_bytes"] or m["memory"]["peak_bytes_single"]) for m in models]),
        ("processor (100 % = a core)", [f"{m['cpu_percent']:.0f} %" for m in models]),
        ("energy per answer", [_joules(m["energy"]) for m in models]),
    ]
    there = [m.get("on_device") or {} for m in models]
    device = " or ".join(dict.fromkeys(one["device"] for one in there if one))
    lines += [
        (f"≈ {device}: answer p95", [_span(one.get("latency_ms", {}).get("p95"), " ms") for one in there]),
        (f"≈ {device}: tokens/s", [_span(one.get("tokens_per_s")) for one in there]),
        (f"≈ {device}: memory", [f"{100 * one['memory_share']:.0f} % of its" if one else "" for one in there]),
        (f"≈ {device}: loading", [_span(one.get("load_s"), " s") for one in there]),
    ]
    return [(label, cells) for label, cells in lines if any(cells)]


def _entry(entries: Sequence[Mapping[str, Any]], key: str, value: int) -> Mapping[str, Any]:
    return next((one for one in entries if one[key] == value), {})


def _megabytes(value: float | None) -> str:
    if not value:
        return ""
    unit, scale = next(pair for pair in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)) if value >= pair[1])
    return f"{value / scale:,.{2 if scale == 1e9 else 1}f} {unit}"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def _milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _three(found: Mapping[str, float] | None) -> str:
    if not found:
        return ""
    return " / ".join(_milliseconds(found[key]).removesuffix(" ms") for key in ("p50", "p95", "p99"))


def _joules(found: Mapping[str, Any]) -> str:
    return f"{found['joules_per_answer']:.3g} J" if found["available"] else "not told"


def _span(estimate: Mapping[str, float] | None, unit: str = "") -> str:
    if not estimate:
        return ""
    return f"{_number(estimate['value'])}{unit} ({_number(estimate['low'])}–{_number(estimate['high'])})"
