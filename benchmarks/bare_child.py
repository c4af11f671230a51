"""An engine without a server around it: ``python -m benchmarks.bare_child KIND FOLDER``.

A line ``{"prompts": [[...], ...], "tokens"}`` comes in on standard input for every run: as many callers as there are
rows, each with its prompts one after the other. One goes out: ``{"tokens_per_s", "first_s": [...]}``. Kinds:

================ ==============================================================================
``openvino``     its continuous batching as it is; ``openvino-f32``: with fp32 asked for
``genai``        onnxruntime-genai's generator, one caller
``llama``        llama.cpp's slots
``llama-server`` llama.cpp's HTTP server: it is asked over HTTP, the first line has its URL
================ ==============================================================================
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer

SLOTS = 8
THREADS = 2
CACHE_GB = 1
SLOT_TOKENS = 1024


def main(kind: str, folder: Path) -> None:
    """Open the engine, say so, and run what is asked until standard input ends."""
    opener = {"genai": Genai, "llama": Llama, "llama-server": LlamaServer}.get(kind)
    engine = opener(folder) if opener else Openvino(folder, exact=kind == "openvino-f32")
    print(json.dumps({"ready": True, "url": getattr(engine, "url", None)}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.perf_counter()
        tokens, first_s = engine.run(asked["prompts"], asked["tokens"])
        told = {"tokens_per_s": tokens / (time.perf_counter() - started), "first_s": first_s}
        print(json.dumps(told), flush=True)


class Openvino:
    """``ContinuousBatchingPipeline``, stepped as its documentation shows."""

    def __init__(self, folder: Path, *, exact: bool) -> None:
        from slmops.runtime.openvino import import_openvino

        import_openvino()
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.enable_prefix_caching = CACHE_GB, True
        settings = {"INFERENCE_PRECISION_HINT": "f32"} if exact else {}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", settings)
        self.chat = ChatTokenizer.load(folder)
        self.number = 0

    def run(self, prompts: Sequence[Sequence[str]], count: int) -> tuple[int, list[float]]:
        """New tokens, and the seconds until each answer's first."""
        left = [list(row) for row in prompts]
        running = [self.begin(row.pop(0), count) for row in left]
        tokens, first_s = 0, []
        while any(running):
            self.pipeline.step()
            for row, one in enumerate(running):
                if one is None:
                    continue
                handle, asked_s, begun = one
                if handle.can_read():
                    tokens += sum(len(output.generated_ids) for output in handle.read().values())
                    if not begun:
                        first_s.append(time.perf_counter() - asked_s)
                        running[row] = (handle, asked_s, True)
                if handle.get_status().name == "FINISHED":
                    running[row] = self.begin(left[row].pop(0), count) if left[row] else None
        return tokens, first_s

    def begin(self, text: str, count: int) -> Any:
        import openvino
        import openvino_genai

        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.do_sample, settings.apply_chat_template = count, False, False
        settings.stop_token_ids = set(self.chat.eos_token_ids)
        ids = np.asarray([self.chat.encode_prompt((Message("user", text),))], np.int64)
        self.number += 1
        asked_s = time.perf_counter()
        return self.pipeline.add_request(self.number, openvino.Tensor(ids), settings), asked_s, False


class Genai:
    """``onnxruntime_genai.Generator``, one answer after the other."""

    def __init__(self, folder: Path) -> None:
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()
        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(str(folder))
        self.chat = ChatTokenizer.load(folder)

    def run(self, prompts: Sequence[Sequence[str]], count: int) -> tuple[int, list[float]]:
        tokens, first_s = 0, []
        for text in (text for row in prompts for text in row):
            ids = self.chat.encode_prompt((Message("user", text),))
            asked_s = time.perf_counter()
            params = self.genai.GeneratorParams(self.model)
            params.set_search_options(max_length=len(ids) + count, do_sample=False)
            generator = self.genai.Generator(self.model, params)
            generator.append_tokens(np.asarray(ids, np.int32))
            begun = False
            while not generator.is_done():
                generator.generate_next_token()
                tokens += 1
                if not begun:
                    first_s.append(time.perf_counter() - asked_s)
                    begun = True
        return tokens, first_s


class Llama:
    """llama.cpp's slots, called in its own process."""

    def __init__(self, folder: Path) -> None:
        self.server = _llama(folder)

    def run(self, prompts: Sequence[Sequence[str]], count: int) -> tuple[int, list[float]]:
        def caller(row: Sequence[str]) -> tuple[int, list[float]]:
            tokens, first_s = 0, []
            for text in row:
                asked = {"messages": [{"role": "user", "content": text}], "max_tokens": count, "temperature": 0}
                asked_s = time.perf_counter()
                reply = self.server.handle_chat_completions(asked)
                tokens += reply["usage"]["completion_tokens"]
                first_s.append(time.perf_counter() - asked_s)  # of the whole answer: it is not streamed
            return tokens, first_s

        with ThreadPoolExecutor(len(prompts)) as threads:
            found = list(threads.map(caller, prompts))
        return sum(one for one, _ in found), [each for _, row in found for each in row]


class LlamaServer:
    """llama.cpp's HTTP server. Runs nothing by itself: it is asked over HTTP."""

    def __init__(self, folder: Path) -> None:
        self.server = _llama(folder)
        self.url = self.server.listening_address

    def run(self, prompts: Sequence[Sequence[str]], count: int) -> tuple[int, list[float]]:
        raise NotImplementedError


def _llama(folder: Path) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder if folder.is_file() else folder / "model.gguf")
    params.n_ctx, params.n_parallel = SLOTS * SLOT_TOKENS, SLOTS
    params.n_gpu_layers, params.verbosity, params.offline = 0, -1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
