"""Continuous batching over OpenVINO GenAI: requests join and leave between two steps, and share beginnings.

Guarantees: the prompt's ids are those of :mod:`slmops.chat`, and so are the ends of a turn, stop texts and counts;
greedy answers by the largest logit; the same seed gives the same sample on the same machine. The keys and values of a
prompt's beginning are kept and found again by whoever begins alike (a system prompt is computed once), as long as the
cache has room: it holds :data:`CACHE_TOKENS` tokens, or one whole context where that is more; memory is taken as it
fills. A model of the precision fp32 or fp16 is computed and cached in fp32. The engine runs in a child process
(:mod:`slmops.runtime.openvino_batch_child`): its death is an error here and no more, and it never outlives us.
OpenVINO computes models of 8 and 4 bits in bf16 where the processor has it. ``exact`` asks for fp32 instead, with the
products of 8-bit numbers where the processor has those: often the faster of the two, hence measured and not assumed.
Answers under a constraint and scores are left to :mod:`slmops.runtime.openvino`.
Not covered: adapters; accelerators.
"""

from __future__ import annotations

import contextlib
import json
import queue
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slmops.chat import ChatTokenizer
from slmops.errors import CorruptArtifactError, MissingExtraError, ModelError, ServeError
from slmops.runtime.batch import BatchedStream, BatchGenerator
from slmops.runtime.careful import Careful
from slmops.runtime.description import ModelDescription
from slmops.runtime.openvino import EXACT, GRAPH_NAME, WEIGHTS_NAME, OpenvinoGenerator
from slmops.runtime.openvino_batch_child import MAX_ANSWERS

BLOCK_TOKENS = 32
"""Tokens of one block of the engine's cache, on processors."""
CACHE_TOKENS = 16_384
"""Of all answers at hand and of beginnings that are kept: 240 MB for a model of 135 M, once they are filled."""
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")
END_S = 5.0
Told = Mapping[str, Any]


class OpenvinoBatch(BatchGenerator):
    """See the module."""

    def __init__(self, child: _Child, chat: ChatTokenizer, description: ModelDescription, careful: Careful) -> None:
        super().__init__(chat, description, description.max_tokens, chat.eos_token_ids, careful)
        self._child = child
        self._numbers: dict[BatchedStream, int] = {}
        self._streams: dict[int, BatchedStream] = {}
        self._number = 0

    @classmethod
    def load(
        cls, path: Path | str, *, threads: int | None = None, exact: bool = True, cache_tokens: int = CACHE_TOKENS
    ) -> OpenvinoBatch:
        """Open the model folder at ``path``. ``threads``: of one step; None leaves it to the engine. ``exact``: see the
        module. ``cache_tokens``: at least one context is taken.

        Raises:
            MissingExtraError: openvino-genai is not installed.
            ModelNotFoundError: not a model folder.
            CorruptArtifactError: a file of it is missing or damaged.
            ModelError: the folder holds another kind of model, or was made without what this engine needs.
        """
        folder = Path(path)
        description = ModelDescription.read(folder)
        if (description.runtime, description.form) != ("openvino", "generator"):
            raise ModelError(
                f"{folder} holds a {description.form} for {description.runtime}, not a generator for openvino.",
                remedy="Name a variant that was exported with the format openvino.",
            )
        _check_files(folder)
        chat = ChatTokenizer.load(folder)
        blocks = -(-max(cache_tokens, description.max_tokens) // BLOCK_TOKENS) + 1
        child = _Child(folder.resolve(), _properties(description.precision, threads, exact), blocks)
        return cls(child, chat, description, Careful(lambda: OpenvinoGenerator.load(folder, threads=threads)))

    @property
    def pid(self) -> int:
        """Of the process that computes."""
        return self._child.pid

    def woken(self) -> None:
        self._child.told.put({})  # whoever waits for tokens looks at what has come
        super().woken()

    def _most(self) -> int:
        return MAX_ANSWERS

    def _admit(self, stream: BatchedStream) -> None:
        self._number += 1
        self._numbers[stream], self._streams[self._number] = self._number, stream
        request = stream.request
        self._child.tell(
            {
                "admit": self._number,
                "prompt": stream.answer.prompt,
                "tokens": stream.answer.max_tokens,
                "ends": sorted(self._end_ids),
                "logprobs": self.tells_logprobs,
                "temperature": request.temperature,
                "top_p": request.top_p,
                "seed": secrets.randbits(31) if request.seed is None else request.seed % 2**31,
            }
        )

    def _advance(self) -> Iterator[tuple[BatchedStream, int, float]]:
        told = self._child.told.get()
        if told is None:
            raise ServeError(
                f"OpenVINO's process ended with exit code {self._child.exit_code}.", remedy="It is started again."
            )
        if "refused" in told:
            self._refuse(told)
        for number, tokens, logprobs, ended in told.get("step", ()):
            stream = self._streams.get(number)
            if stream is None:  # it has ended here, and the word had not reached the child
                continue
            for place, token in enumerate(tokens):
                yield stream, token, logprobs[place] if logprobs else 0.0
            if ended and number in self._streams:
                self._finish(stream)  # it ended by itself, and no token of ours said so

    def _refuse(self, told: Told) -> None:
        stream = self._streams.get(told["refused"])
        if stream is not None:
            self._running.remove(stream)
            self._forget(stream)
            stream.put(ModelError(f"OpenVINO does not take this request: {told['why']}"), last=True)

    def _drop(self, stream: BatchedStream) -> None:
        number = self._forget(stream)
        if number is not None:
            self._child.tell({"drop": number})

    def _forget(self, stream: BatchedStream) -> int | None:
        number = self._numbers.pop(stream, None)
        if number is not None:
            del self._streams[number]
        return number

    def _free(self) -> None:
        self._numbers.clear()
        self._streams.clear()
        self._child.close()


class _Child:
    """The process. ``told``: what it says, in order; None once it has ended."""

    def __init__(self, folder: Path, properties: Mapping[str, Any], blocks: int) -> None:
        command = [sys.executable, "-m", "slmops.runtime.openvino_batch_child"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.told: queue.SimpleQueue[Told | None] = queue.SimpleQueue()
        self.tell({"folder": str(folder), "properties": dict(properties), "blocks": blocks})
        first = self._line()
        if "ready" not in first:
            self.close()
            if first.get("missing"):
                raise MissingExtraError("Continuous batching over OpenVINO", "openvino")
            raise CorruptArtifactError(
                f"{folder / GRAPH_NAME} cannot be loaded: {first.get('error', 'the engine ended without a word')}",
                remedy="Fetch the bundle anew, or run again.",
            )
        threading.Thread(target=self._read, name="openvino", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        return self._process.returncode

    def tell(self, what: Mapping[str, Any]) -> None:
        """A child that is gone is noticed by who listens to it."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _line(self) -> Told:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        told: Told = json.loads(line) if line else {}
        return told

    def _read(self) -> None:
        while told := self._line():
            self.told.put(told)
        self.told.put(None)


def _properties(precision: str, threads: int | None, exact: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    if precision in ("fp32", "fp16"):
        properties |= EXACT
    elif exact:
        properties["INFERENCE_PRECISION_HINT"] = "f32"
    if threads:
        properties["INFERENCE_NUM_THREADS"] = threads
    return properties


def _check_files(folder: Path) -> None:
    for name in (GRAPH_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise CorruptArtifactError(f"{folder / name} is missing.", remedy="Fetch the bundle anew, or run again.")
    missing = [name for name in TOKENIZERS if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} was made without {missing[0]}, which continuous batching needs.",
            remedy="Serve it with --engine openvino, or export it again where openvino-tokenizers is installed.",
        )
