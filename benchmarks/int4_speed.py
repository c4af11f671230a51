"""Tokens a second of one client: 4 bits in onnxruntime-genai beside llama.cpp, the same weights at the same bits.

SmolLM2-135M as trained here. Ours is 4 bits by GPTQ in blocks of 64; the peer is llama.cpp's Q4_0 (blocks of 32)
through xllamacpp. Blocks of 32, the builder's own 4 bits and Q4_K_M are told beside. All
forms are open in this process, on all cores, and answer the same questions greedily by turns, :data:`TOKENS` new tokens
each, past the end of the answer where it is shorter; what is timed is the whole answer, prompt included. The order
changes every round. The ratio is of the medians, its spread the smallest and largest ratio of a round.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common import say, spread
from benchmarks.int4_quality import Forms, ask
from benchmarks.trained import Row, trained_weights
from slmops.runtime import open_generator

TOKENS, ROUNDS, QUESTIONS = 64, 8, 3
QUICK_TOKENS, QUICK_ROUNDS, QUICK_QUESTIONS = 8, 2, 1
OURS, PEER = "int4 gptq, blocks of 64", "gguf q4_0"
BESIDE = ("int4 gptq", "builder int4", "gguf q4_k_m")
TARGET = 1.0


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    trained = trained_weights(options)
    forms = Forms(trained, options.store, quick=quick)
    names = (OURS, PEER) if quick else (OURS, PEER, *BESIDE)
    questions = trained.answers[: QUICK_QUESTIONS if quick else QUESTIONS]
    opened = {name: open_generator(forms.made(name)) for name in names}
    for one in opened.values():
        rate_of(one, questions[:1], 4)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for number in range(QUICK_ROUNDS if quick else ROUNDS):
        for name in names if number % 2 else reversed(names):
            rates[name].append(rate_of(opened[name], questions, QUICK_TOKENS if quick else TOKENS))
            say(f"round {number}, {name}: {rates[name][-1]:.1f} tokens/s")
    for one in opened.values():
        one.close()
    ratios = [ours / peer for ours, peer in zip(rates[OURS], rates[PEER], strict=True)]
    ratio = median(rates[OURS]) / median(rates[PEER])
    return {
        "ours": {"tokens_per_s": median(rates[OURS])},
        "peer": {"tokens_per_s": median(rates[PEER])},
        "ratio": ratio,
        "spread": spread(ratios),
        "target": TARGET,
        "passed": quick or ratio >= TARGET,
        "forms": {name: {"tokens_per_s": median(values), "range": spread(values)} for name, values in rates.items()},
        "tokens": TOKENS,
    }


def rate_of(opened: Any, questions: list[Row], tokens: int) -> float:
    """New tokens a second over all ``questions``: exactly ``tokens`` each, whether or not the answer would end."""
    make = _by_llama_cpp if hasattr(opened, "_server") else _by_genai
    prompts = [opened._chat.encode_prompt(ask(row.question)) for row in questions]
    started = time.perf_counter()
    for prompt in prompts:
        make(opened, prompt, tokens)
    return tokens * len(prompts) / (time.perf_counter() - started)


def _by_genai(opened: Any, prompt: list[int], tokens: int) -> None:
    import onnxruntime_genai

    params = onnxruntime_genai.GeneratorParams(opened._model)
    length = len(prompt) + tokens
    params.set_search_options(max_length=length, min_length=length, batch_size=1, do_sample=False)
    running = onnxruntime_genai.Generator(opened._model, params)
    running.append_tokens(np.asarray(prompt, dtype=np.int32))
    made = 0
    while not running.is_done():
        running.generate_next_token()
        made += 1
    if made < tokens:
        raise SystemExit(f"onnxruntime-genai made {made} of {tokens} tokens")


def _by_llama_cpp(opened: Any, prompt: list[int], tokens: int) -> None:
    asked = {"prompt": prompt, "n_predict": tokens, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
    made = opened._server.handle_completions(asked)["usage"]["completion_tokens"]
    if made != tokens:
        raise SystemExit(f"llama.cpp made {made} of {tokens} tokens")
