"""OpenVINO GenAI's continuous batching in a process of its own: ``python -m slmops.runtime.openvino_batch_child``.

A step of its pipeline holds Python's interpreter lock until it is done, some 15 ms: in the server's process nothing
else would run. JSON lines come in on standard input and go out on standard output; the end of standard input ends the
process, however its parent ended.

::

    in    {"folder", "properties": {...}, "blocks"}                                   first, once
          {"admit": number, "prompt": [...], "tokens", "ends": [...], "logprobs",
           "temperature", "top_p", "seed"}
          {"drop": number}
    out   {"ready": true} or {"error"}                                                first, once
          {"step": [[number, [token, ...], [logprob, ...] or null, ended], ...]}      of one step or several
          {"refused": number, "why"}
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from typing import Any, TextIO

MAX_ANSWERS = 64
GATHER_S = 0.035
"""Tokens that come within this time are told together: whoever is woken for each takes the cores from the next step,
which waits for the slower of its threads. An answer's first token, and its end, are told at once."""


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints must not be taken for an answer
    asked = json.loads(sys.stdin.readline())
    try:
        core = Core(opened(asked["folder"], asked["properties"], asked["blocks"]))
    except (RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        tell(out, {"error": lines[-1], "missing": isinstance(error, ImportError)})
        return
    tell(out, {"ready": True})
    commands: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=read, args=(commands,), daemon=True).start()
    run(core, commands, out)
    os._exit(0)  # the library's threads have nothing to say any more


def read(commands: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Lines of standard input to ``commands``; None at its end."""
    for line in sys.stdin:
        commands.put(json.loads(line))
    commands.put(None)


def run(core: Core, commands: queue.SimpleQueue[dict[str, Any] | None], out: TextIO) -> None:
    """Take what came, step, tell; sleep while there is nothing to do."""
    gathered = Gathered()
    while True:
        while not (core.busy and commands.empty()):
            command = commands.get()
            if command is None:
                return
            if "drop" in command:
                core.drop(command["drop"])
                gathered.forget(command["drop"])
            elif refused := core.admit(command):
                tell(out, refused)
        gathered.add(core.step())
        if gathered.urgent or not core.busy or time.monotonic() - gathered.told_s >= GATHER_S:
            tell(out, {"step": gathered.take()})


class Gathered:
    """What several steps brought, by answer."""

    def __init__(self) -> None:
        self.urgent = False
        self.told_s = 0.0
        self._begun: set[int] = set()
        self._rows: dict[int, list[Any]] = {}

    def add(self, rows: list[list[Any]]) -> None:
        """The rows of one step: number, tokens, log-probabilities or None, whether it ended."""
        for number, tokens, logprobs, ended in rows:
            self.urgent = self.urgent or ended or number not in self._begun
            self._begun.add(number)
            if ended:
                self._begun.discard(number)
            row = self._rows.setdefault(number, [number, [], [], False])
            row[1] += tokens
            row[2] = None if logprobs is None or row[2] is None else row[2] + logprobs
            row[3] = ended

    def take(self) -> list[list[Any]]:
        """All of it; nothing is left."""
        rows, self._rows = list(self._rows.values()), {}
        self.urgent, self.told_s = False, time.monotonic()
        return rows

    def forget(self, number: int) -> None:
        """An answer was given up."""
        self._begun.discard(number)
        self._rows.pop(number, None)


def tell(out: TextIO, what: dict[str, Any]) -> None:
    out.write(json.dumps(what) + "\n")
    out.flush()


class Core:
    """The pipeline, and the answers that run in it by their numbers."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._handles: dict[int, Any] = {}
        self._leaving = False

    @property
    def busy(self) -> bool:
        return bool(self._handles) or self._leaving

    def admit(self, asked: dict[str, Any]) -> dict[str, Any] | None:
        """Take an answer in; what to tell where it is refused."""
        number = asked["admit"]
        try:
            self._handles[number] = self._admitted(number, asked)
        except RuntimeError as error:
            return {"refused": number, "why": str(error).strip().splitlines()[-1]}
        return None

    def drop(self, number: int) -> None:
        """Nobody wants the rest of this answer."""
        handle = self._handles.pop(number, None)
        if handle is not None:
            handle.cancel()
            self._leaving = True  # its blocks are freed by the next step

    def step(self) -> list[list[Any]]:
        """One step: the new tokens of each answer, and whether it ended."""
        import openvino_genai

        done = (openvino_genai.GenerationStatus.FINISHED, openvino_genai.GenerationStatus.IGNORED)
        self._leaving = False
        self._pipeline.step()
        told: list[list[Any]] = []
        for number, handle in list(self._handles.items()):
            ended = handle.get_status() in done
            tokens: list[int] = []
            logprobs: list[float] = []
            if handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
                    logprobs += output.generated_log_probs
            if ended:
                del self._handles[number]
            if tokens or ended:
                told.append([number, tokens, logprobs if len(logprobs) == len(tokens) else None, ended])
        return told

    def _admitted(self, number: int, command: dict[str, Any]) -> Any:
        import numpy as np
        import openvino
        import openvino_genai

        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = command["tokens"]
        settings.apply_chat_template = False
        settings.stop_token_ids = set(command["ends"])
        settings.logprobs = int(command["logprobs"])
        settings.do_sample = command["temperature"] > 0
        if settings.do_sample:
            settings.temperature, settings.top_p = command["temperature"], command["top_p"]
            settings.rng_seed = command["seed"]
        return self._pipeline.add_request(number, openvino.Tensor(np.asarray([command["prompt"]], np.int64)), settings)


def opened(folder: str, properties: dict[str, Any], blocks: int) -> Any:
    """The pipeline over the model in ``folder``, its cache of ``blocks`` blocks filled as it is used."""
    from slmops.runtime.openvino import import_openvino

    import_openvino()
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.max_num_seqs = MAX_ANSWERS
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    return openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)


if __name__ == "__main__":
    main()
