"""Continuous batching over OpenVINO GenAI: requests join and leave between two steps, and share what they have in common.

Guarantees: the prompt's ids are those of :mod:`slmops.chat`, and so are the ends of a turn, stop texts and counts;
greedy answers by the largest logit; the same seed gives the same sample on the same machine. The keys and values of a
prompt's beginning are kept and found again by whoever begins alike (a system prompt is computed once), as long as the
cache has room: it holds :data:`CACHE_TOKENS` tokens, or one whole context where that is more; memory is taken as it
fills. A model of the precision fp32 or fp16 is computed and cached in fp32.
OpenVINO computes models of 8 and 4 bits in bf16 where the processor has it. ``exact`` asks for fp32 instead, with the
products of 8-bit numbers where the processor has those: often the faster of the two, hence measured and not assumed.
Answers under a constraint and scores are left to :mod:`slmops.runtime.openvino`.
Not covered: adapters; accelerators.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slmops.chat import ChatTokenizer
from slmops.errors import CorruptArtifactError, MissingExtraError, ModelError
from slmops.runtime.batch import BatchedStream, BatchGenerator
from slmops.runtime.careful import Careful
from slmops.runtime.description import ModelDescription
from slmops.runtime.openvino import EXACT, GRAPH_NAME, WEIGHTS_NAME, OpenvinoGenerator, import_openvino

BLOCK_TOKENS = 32
"""Tokens of one block of the engine's cache, on processors."""
CACHE_TOKENS = 16_384
"""Of all answers at hand and of beginnings that are kept: 240 MB for a model of 135 M, once they are filled."""
MAX_ANSWERS = 64
TOKENIZERS = ("openvino_tokenizer.xml", "openvino_detokenizer.xml")


class OpenvinoBatch(BatchGenerator):
    """See the module."""

    tells_logprobs = True

    def __init__(self, pipeline: Any, chat: ChatTokenizer, description: ModelDescription, careful: Careful) -> None:
        super().__init__(chat, description, description.max_tokens, chat.eos_token_ids, careful)
        self._pipeline = pipeline
        self._handles: dict[BatchedStream, Any] = {}
        self._number = 0
        self._leaving = False

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
        blocks = -(-max(cache_tokens, description.max_tokens) // BLOCK_TOKENS) + 1
        pipeline = _open(folder, _properties(description.precision, threads, exact), blocks)
        careful = Careful(lambda: OpenvinoGenerator.load(folder, threads=threads))
        return cls(pipeline, ChatTokenizer.load(folder), description, careful)

    def _most(self) -> int:
        return MAX_ANSWERS

    def _admit(self, stream: BatchedStream) -> None:
        import openvino

        self._number += 1
        ids = openvino.Tensor(np.asarray([stream.answer.prompt], np.int64))
        self._handles[stream] = self._pipeline.add_request(self._number, ids, self._settings(stream))

    def _settings(self, stream: BatchedStream) -> Any:
        import openvino_genai

        request = stream.request
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = stream.answer.max_tokens
        settings.apply_chat_template = False
        settings.stop_token_ids = set(self._end_ids)
        settings.logprobs = 1
        settings.do_sample = request.temperature > 0
        if settings.do_sample:
            settings.temperature, settings.top_p = request.temperature, request.top_p
            settings.rng_seed = secrets.randbits(31) if request.seed is None else request.seed % 2**31
        return settings

    def _advance(self) -> Iterator[tuple[BatchedStream, int, float]]:
        import openvino_genai

        self._leaving = False
        self._pipeline.step()
        done = (openvino_genai.GenerationStatus.FINISHED, openvino_genai.GenerationStatus.IGNORED)
        for stream, handle in list(self._handles.items()):
            if handle.can_read():
                for output in handle.read().values():
                    for token, logprob in zip(output.generated_ids, output.generated_log_probs, strict=False):
                        yield stream, int(token), float(logprob)
            if stream in self._handles and handle.get_status() in done:
                self._finish(stream)  # it ended by itself, and no token of ours said so

    def _drop(self, stream: BatchedStream) -> None:
        import openvino_genai

        handle = self._handles.pop(stream, None)
        if handle is not None and handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
            handle.cancel()
            self._leaving = True  # its blocks are freed by the next step

    def _unsettled(self) -> bool:
        return self._leaving

    def _free(self) -> None:
        with contextlib.suppress(RuntimeError):  # of an engine that has failed already
            for handle in self._handles.values():
                handle.cancel()
            if self._leaving or self._handles:
                self._pipeline.step()
        self._handles.clear()
        self._pipeline = None


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


def _open(folder: Path, properties: dict[str, Any], blocks: int) -> Any:
    import_openvino()
    try:
        import openvino_genai
    except ImportError:
        raise MissingExtraError("Continuous batching over OpenVINO", "openvino") from None
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.num_kv_blocks = blocks
    scheduler.max_num_seqs = MAX_ANSWERS
    scheduler.enable_prefix_caching = True
    scheduler.dynamic_split_fuse = True
    try:
        return openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CorruptArtifactError(
            f"{folder / GRAPH_NAME} cannot be loaded: {first}", remedy="Fetch the bundle anew, or run again."
        ) from error
