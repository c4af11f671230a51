"""Other engines in the measured process: ``python -m slmops.evaluate.peers REQUEST.json``.

The protocol is that of :mod:`slmops.evaluate.probe`. They answer the same messages, greedily, with as many new tokens
at most. Each is optional and imported when it is opened:

    transformers  a folder of transformers, fp32 on the CPU
    llama.cpp     a GGUF file, through xllamacpp; prompts are not kept between requests, as with the others
    foundry-local a model folder of ours (``onnx-genai``), in Foundry Local's own process on loopback, whose memory and
                  processor time are what is counted
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from slmops.errors import ModelNotFoundError, UsageError
from slmops.evaluate import probe
from slmops.runtime.foundry import find_foundry, foundry_version
from slmops.runtime.upstream import UpstreamGenerator

PEERS: dict[str, tuple[str, str]] = {
    "transformers": ("transformers", "slmops[train]"),
    "llama.cpp": ("xllamacpp", "xllamacpp"),
}
"""Name -> module, and what to install for it."""
FOUNDRY = "foundry-local"
CONTEXT_TOKENS = 2048
MOST_AT_ONCE = 8


def peers_here() -> dict[str, str | None]:
    """Engines beside slmops' own, by name: the version that is installed, or None."""
    return {**{name: _version(module) for name, (module, _) in PEERS.items()}, FOUNDRY: foundry_version()}


def _version(module: str) -> str | None:
    if importlib.util.find_spec(module) is None:
        return None
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def parse_peer(text: str) -> tuple[str, Path]:
    """``NAME=PATH`` as the command line has it.

    Raises:
        UsageError: no such peer, or it is not installed.
        ModelNotFoundError: nothing at the path.
    """
    name, separator, path = text.partition("=")
    if not separator or name not in (*PEERS, FOUNDRY):
        raise UsageError(
            f"--peer {text} is not NAME=PATH with a known engine.",
            remedy="transformers=FOLDER, llama.cpp=FILE.gguf, or foundry-local=BUNDLE.",
        )
    if name == FOUNDRY:
        find_foundry()
    elif importlib.util.find_spec(PEERS[name][0]) is None:
        raise UsageError(f"{name} is not installed.", remedy=f"Install it: pip install '{PEERS[name][1]}'.")
    if not Path(path).exists():
        raise ModelNotFoundError(f"{path} does not exist.", remedy=f"Name a model that {name} can open.")
    return name, Path(path)


class TransformersModel:
    """A language model by ``transformers.generate``."""

    def __init__(self, folder: str, threads: int | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if threads is not None:
            torch.set_num_threads(threads)
        self._torch = torch
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def timed(self, request: dict[str, Any]) -> dict[str, Any]:
        moments: list[float] = []

        class Streamer:
            def put(self, _tokens: Any) -> None:
                moments.append(time.perf_counter())

            def end(self) -> None: ...

        started = time.perf_counter()
        prompt, answers = self._generate([request], streamer=Streamer())
        done = time.perf_counter()
        return _timed(started, moments[1:], done, len(answers[0]), prompt)  # the first put is the prompt

    def together(self, requests: Sequence[dict[str, Any]]) -> int:
        return sum(map(len, self._generate(requests)[1]))

    def _generate(self, requests: Sequence[dict[str, Any]], **options: Any) -> tuple[int, list[list[int]]]:
        """Tokens of the longest prompt, and of each answer."""
        encoded = self._tokenizer.apply_chat_template(
            [_turns(request) for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        most = max(request["max_tokens"] for request in requests)
        with self._torch.inference_mode():
            out = self._model.generate(
                **encoded, max_new_tokens=most, do_sample=False, pad_token_id=self._tokenizer.pad_token_id, **options
            )
        length = encoded["input_ids"].shape[1]
        enders = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        return length, [_until(row[length:].tolist(), enders) for row in out]

    def close(self) -> None:
        self._model = None


def _until(tokens: list[int], enders: set[int]) -> list[int]:
    end = next((at for at, token in enumerate(tokens) if token in enders), len(tokens))
    return tokens[:end]


class LlamaCppModel:
    """A GGUF file by llama.cpp's own server, in this process."""

    def __init__(self, path: str, threads: int | None) -> None:
        import xllamacpp  # type: ignore[import-not-found, unused-ignore]

        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_parallel = MOST_AT_ONCE
        params.n_ctx = CONTEXT_TOKENS * MOST_AT_ONCE
        params.cache_prompt = False
        params.verbosity = 0
        if threads is not None:
            params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self._server: Any = xllamacpp.Server(params)

    def timed(self, request: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        moments, tokens, prompt_tokens = self._ask(request)
        return _timed(started, moments, time.perf_counter(), tokens, prompt_tokens)

    def together(self, requests: Sequence[dict[str, Any]]) -> int:
        with ThreadPoolExecutor(len(requests)) as pool:
            return sum(tokens for _, tokens, _ in pool.map(self._ask, requests))

    def _ask(self, request: dict[str, Any]) -> tuple[list[float], int, int]:
        """When each piece of text came, tokens of the answer, and of the prompt."""
        moments: list[float] = []
        usage: dict[str, int] = {}

        def take(chunk: Any) -> bool:
            raw = json.loads(chunk) if isinstance(chunk, str | bytes) else chunk
            if any(choice.get("delta", {}).get("content") for choice in raw.get("choices", ())):
                moments.append(time.perf_counter())
            usage.update(raw.get("usage") or {})
            return False

        body = {
            "messages": _turns(request),
            "max_tokens": request["max_tokens"],
            "temperature": 0,
            "stream": True,  # without it this version of xllamacpp asks for a callback all the same
            "stream_options": {"include_usage": True},
        }
        self._server.handle_chat_completions(json.dumps(body), take)
        return moments, usage.get("completion_tokens", len(moments)), usage.get("prompt_tokens", 0)

    def close(self) -> None:
        self._server = None


def _timed(started: float, moments: list[float], done: float, tokens: int, prompt_tokens: int) -> dict[str, Any]:
    return {
        "latency_ms": (done - started) * 1e3,
        "ttft_ms": (moments[0] - started) * 1e3 if moments else None,
        "gaps_ms": [(after - before) * 1e3 for before, after in itertools.pairwise(moments)],
        "tokens": tokens,
        "prompt_tokens": prompt_tokens,
    }


class PeerTurns:
    """What the measured process asks of a model; see :class:`slmops.evaluate.probe.GeneratorTurns`."""

    def __init__(self, model: TransformersModel | LlamaCppModel, requests: list[dict[str, Any]]) -> None:
        self.model = model
        self.requests = requests
        self.timed, self.together = model.timed, model.together

    def one(self, index: int) -> tuple[float | None, int]:
        found = self.timed(self.requests[index % len(self.requests)])
        return found["ttft_ms"] and found["ttft_ms"] / 1e3, found["tokens"]

    def many(self, first: int, count: int) -> int:
        return self.together([self.requests[(first + i) % len(self.requests)] for i in range(count)])


def open_peer(job: dict[str, Any]) -> Any:
    """Open the engine that the job names. Foundry Local chooses its threads itself."""
    limited = (job.get("limits") or {}).get("cores")
    threads = job["threads"] or limited
    match job["engine"]:
        case "transformers":
            return PeerTurns(TransformersModel(job["path"], threads), job["requests"])
        case "llama.cpp":
            return PeerTurns(LlamaCppModel(job["path"], threads), job["requests"])
        case _:
            opened = UpstreamGenerator.foundry(Path(job["path"]))
            return probe.GeneratorTurns(opened, [probe.read_request(raw) for raw in job["requests"]])


def _turns(request: dict[str, Any]) -> list[dict[str, str]]:
    """Role and text alone: other programs take a key without a value for a fault."""
    return [{"role": one["role"], "content": one["content"]} for one in request["messages"]]


if __name__ == "__main__":
    probe.main(sys.argv[1:], open_peer)
