"""A generator over onnxruntime-genai.

Guarantees: the prompt's ids are those of :mod:`slmops.chat`; the key-value cache is sized to the request, not to the
model's context; a batch's greedy answers are those of its requests one by one (rows are padded on the right: with
padding on the left the engine's attention is off, so nothing here does it); the same seed gives the same sample on the
same machine; nothing is sent anywhere. ``max_tokens`` is cut to what the context leaves.
Answers under a constraint, or with log-probabilities, run one by one: their logits are looked at before each token.
Not covered: continuous batching.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import ContextLengthError, CorruptArtifactError, ModelError
from slmops.runtime.answer import Answer
from slmops.runtime.base import (
    Delta,
    Generation,
    GenerationRequest,
    States,
    TextScore,
)
from slmops.runtime.description import ADAPTER_SUFFIX, ADAPTERS_FOLDER, ModelDescription
from slmops.runtime.guide import Guide, masked
from slmops.runtime.prompted import Prompted
from slmops.runtime.sampling import log_likelihood

CONFIG_FILE = "genai_config.json"
STATES = "hidden_states"
"""An output that the builder adds where it is told to."""
MAX_BATCH = 8
"""Rows of one static batch: on two cores 8 give twice the tokens per second of 1, and the cache grows with each."""


class GenaiGenerator(Prompted):
    """See the module. One instance may be used from one thread at a time."""

    def __init__(
        self, model: Any, chat: ChatTokenizer, description: ModelDescription, config: dict[str, Any], folder: Path
    ) -> None:
        self._model = model
        self._own_tokenizer: Any = None
        self._chat = chat
        self.description = description
        self._context_tokens = int(config["model"]["context_length"])
        self._pad_token_id = int(config["model"].get("pad_token_id") or 0)
        self._adapters: Any = None
        self._read: set[str] = set()
        self._folder = folder
        self._end_ids = end_ids(chat, config)

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> GenaiGenerator:
        """Open the model folder at ``path``. ``threads``: of one forward pass; None leaves it to the engine.

        Raises:
            ModelNotFoundError: not a model folder.
            CorruptArtifactError: a file of it is missing, damaged, or does not fit the others.
            ModelError: the folder holds another kind of model.
        """
        folder = Path(path)
        description = ModelDescription.read(folder)
        if (description.runtime, description.form) != ("onnx-genai", "generator"):
            raise ModelError(
                f"{folder} holds a {description.form} for {description.runtime}, not a generator for onnx-genai.",
                remedy="Name a variant that was compressed for an open task.",
            )
        config = read_config(folder / CONFIG_FILE)
        return cls(_open_model(folder, threads), ChatTokenizer.load(folder), description, config, folder)

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        return self._context_tokens

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of ``requests``. Greedy requests share batches of up to :data:`MAX_BATCH` rows of like
        length; sampled ones run alone, so that each keeps its seed.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
        """
        prompts = [self._chat.encode_prompt(request.messages, request.tools) for request in requests]
        batches: list[list[int]] = []
        alone = [row for row, request in enumerate(requests) if request.temperature > 0 or _is_guided(request)]
        wanted = [self.description.adapter_of(request.adapter) for request in requests]
        for adapter in dict.fromkeys(wanted):  # one generator has one adapter
            sizes = {
                row: (len(prompts[row]), r.max_tokens)
                for row, r in enumerate(requests)
                if row not in alone and wanted[row] == adapter
            }
            batches += greedy_batches(sizes, self._context_tokens)
        batches += [[row] for row in alone]
        results: dict[int, Generation] = {}
        for rows in batches:
            answers = self._answers([prompts[row] for row in rows], [requests[row] for row in rows])
            results.update(zip(rows, answers, strict=True))
        return [results[row] for row in range(len(requests))]

    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]:
        """Like :meth:`stream`, for a prompt that is ids already; ``request.messages`` is not read."""
        generator, (answer,) = self._start([prompt], [request])
        return _stream(generator, answer, self._guide_of(request))

    def embed(self, texts: Sequence[str]) -> tuple[States, int]:
        """The mean of the last hidden state over each text's tokens, ``[len(texts), width]`` float32, and the tokens
        read.

        Raises:
            ContextLengthError: a text does not fit in the context.
            NotImplementedError: the graph was built without its states.
        """
        prompts = [self._chat.encode(text) or [self._pad_token_id] for text in texts]
        for prompt in prompts:
            self._check_room(len(prompt), len(prompt))
        return np.stack([self._state(prompt) for prompt in prompts]), sum(map(len, prompts))

    def _state(self, prompt: list[int]) -> NDArray[np.float32]:
        generator = self._generator(len(prompt) + 1, 1, GenerationRequest((), adapter=""))
        generator.append_tokens(np.asarray(prompt, dtype=np.int32))
        try:
            states = generator.get_output(STATES)  # [1, tokens, width]
        except RuntimeError:
            raise NotImplementedError("the graph does not give its hidden states") from None
        mean: NDArray[np.float32] = states[0].astype(np.float32).mean(axis=0)
        return mean

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """Log-probability of each target after its messages, from one forward pass over both.

        Raises:
            ContextLengthError: messages and target do not fit in the context.
            NotImplementedError: the graph was built to give the logits of the last position alone.
        """
        return [self._score(messages, target) for messages, target in conversations]

    def close(self) -> None:
        """Free the model. The generator cannot be used afterwards."""
        self._adapters = self._model = self._own_tokenizer = None

    def _answers(self, prompts: list[list[int]], requests: list[GenerationRequest]) -> list[Generation]:
        if len(requests) == 1 and _is_guided(requests[0]):
            *pieces, last = self.stream_ids(prompts[0], requests[0])
            whole = "".join(piece.text for piece in (*pieces, last))
            return [Generation(whole, last.finish_reason or "length", last.prompt_tokens, last.completion_tokens)]
        generator, answers = self._start(prompts, requests)
        texts: list[list[str]] = [[] for _ in answers]
        while not all(answer.finish_reason for answer in answers) and not generator.is_done():
            generator.generate_next_token()
            for text, answer, token in zip(texts, answers, generator.get_next_tokens(), strict=True):
                text.append(answer.push(int(token)))
        return [
            Generation(
                "".join(text) + answer.finish(), answer.finish_reason or "length", len(answer.prompt), answer.tokens
            )
            for text, answer in zip(texts, answers, strict=True)
        ]

    def _start(self, prompts: list[list[int]], requests: list[GenerationRequest]) -> tuple[Any, list[Answer]]:
        """A generator that has read the prompts, and one answer a row to be filled."""
        for prompt in prompts:
            self._check_room(len(prompt) + 1, len(prompt))
        longest = max(map(len, prompts))
        answers = [
            Answer(
                prompt,
                min(request.max_tokens, self._context_tokens - longest),
                self._end_ids,
                self._chat,
                request.stop,
            )
            for prompt, request in zip(prompts, requests, strict=True)
        ]
        ids = np.full((len(prompts), longest), self._pad_token_id, dtype=np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt
        max_length = longest + max(answer.max_tokens for answer in answers)
        generator = self._generator(max_length, len(prompts), requests[0])
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        return generator, answers

    def _generator(self, max_length: int, rows: int, request: GenerationRequest) -> Any:
        import onnxruntime_genai

        sampled = request.temperature > 0
        options: dict[str, Any] = {"max_length": max_length, "batch_size": rows, "do_sample": sampled}
        if sampled:
            # top_k=0: off. The export's default of 50 would cut the distribution behind the caller's back.
            options |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
            if request.seed is not None:
                options["random_seed"] = request.seed % 2**31
        params = onnxruntime_genai.GeneratorParams(self._model)
        params.set_search_options(**options)
        generator = onnxruntime_genai.Generator(self._model, params)
        if adapter := self.description.adapter_of(request.adapter):
            generator.set_active_adapter(self._loaded(adapter), adapter)
        return generator

    def _loaded(self, adapter: str) -> Any:
        """The adapters of this model, ``adapter`` among those that were read."""
        import onnxruntime_genai

        if self._adapters is None:
            self._adapters = onnxruntime_genai.Adapters(self._model)
        if adapter not in self._read:
            path = self._folder / ADAPTERS_FOLDER / f"{adapter}{ADAPTER_SUFFIX}"
            try:
                self._adapters.load(str(path), adapter)
            except RuntimeError as error:
                raise CorruptArtifactError(
                    f"{path} cannot be loaded: {error}", remedy="Fetch the bundle anew, or run again."
                ) from error
            self._read.add(adapter)
        return self._adapters

    def target_logits(self, messages: tuple[Message, ...], target: str) -> NDArray[np.float32]:
        """Logits that predict each token of ``target``, ``[tokens, vocabulary]``; raises as :meth:`score`."""
        rows, _ = self._target_rows(messages, target)
        return rows.astype(np.float32)

    def engine_tokens(self, text: str) -> list[int]:
        """Ids of plain text, as the engine's own tokenizer makes them out of the same files."""
        if self._own_tokenizer is None:
            import onnxruntime_genai

            self._own_tokenizer = onnxruntime_genai.Tokenizer(self._model)
        return [int(token) for token in self._own_tokenizer.encode(text)]

    def _score(self, messages: tuple[Message, ...], target: str) -> TextScore:
        rows, ids = self._target_rows(messages, target)
        return TextScore(log_likelihood(rows, ids), len(ids), len(target.encode("utf-8", "replace")))

    def _target_rows(self, messages: tuple[Message, ...], target: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Logits before each token of the target, and the tokens."""
        encoded = self._chat.encode_training(messages, target)
        ids = encoded.input_ids
        self._check_room(len(ids), len(ids))
        generator = self._generator(len(ids), 1, GenerationRequest(messages))
        generator.append_tokens(np.asarray(ids[:-1], dtype=np.int32))
        logits = generator.get_output("logits")  # [1, len(ids) - 1, vocabulary]
        if logits.shape[1] != len(ids) - 1:
            raise NotImplementedError(
                f"{self.description.name or 'This model'} gives the logits of {logits.shape[1]} of {len(ids) - 1} "
                "positions: its graph was built for generation alone."
            )
        wanted = [position for position, counts in enumerate(encoded.loss_mask) if counts and position > 0]
        return logits[0, [position - 1 for position in wanted]], np.asarray(ids)[wanted]

    def _check_room(self, needed_tokens: int, prompt_tokens: int) -> None:
        if needed_tokens > self._context_tokens:
            raise ContextLengthError(prompt_tokens, self._context_tokens)


def greedy_batches(sizes: Mapping[int, tuple[int, int]], context_tokens: int) -> list[list[int]]:
    """Rows grouped by like prompt length, at most :data:`MAX_BATCH` together.

    ``sizes``: row to ``(prompt tokens, new tokens at most)``. Rows share a batch only where the longest prompt and the
    longest answer fit in the context together, so that no row's answer is cut because of its neighbours.
    """
    batches: list[list[int]] = []
    answer_tokens = 0
    for row in sorted(sizes, key=lambda row: sizes[row]):
        prompt_tokens, new_tokens = sizes[row]
        together = max(answer_tokens, new_tokens)
        if not batches or len(batches[-1]) == MAX_BATCH or prompt_tokens + together > context_tokens:
            batches.append([])
            together = new_tokens
        batches[-1].append(row)
        answer_tokens = together
    return batches


def _stream(generator: Any, answer: Answer, guide: Guide | None) -> Iterator[Delta]:
    while not answer.finish_reason and not generator.is_done():
        if guide:
            _show(generator, guide)
        generator.generate_next_token()
        token = int(generator.get_next_tokens()[0])
        text = answer.push(token)
        if guide:
            guide.took(token, ends=answer.ends(token))
            if guide.finished and not answer.finish_reason:
                answer.finish_reason = "stop"
        if text:
            yield Delta(text, tokens=guide.flush() if guide else ())
    rest = answer.finish()
    tokens = guide.flush() if guide else ()
    yield Delta(rest, answer.finish_reason or "length", len(answer.prompt), answer.tokens, tokens)


def _show(generator: Any, guide: Guide) -> None:
    """Show the guide the logits of the next token, and take from the engine what may not come."""
    logits = generator.get_logits()  # [1, 1, vocabulary]
    allowed = guide.see(logits.reshape(-1))
    if allowed is not None:
        generator.set_logits(masked(logits.reshape(-1), allowed).reshape(logits.shape))


def _is_guided(request: GenerationRequest) -> bool:
    return request.constraint is not None or request.top_logprobs is not None


def end_ids(chat: ChatTokenizer, config: Mapping[str, Any]) -> frozenset[int]:
    """Tokens that end an answer: the tokenizer's, and those of ``genai_config.json``."""
    named: int | list[int] | None = config["model"].get("eos_token_id")
    ids = [] if named is None else [named] if isinstance(named, int) else named
    return frozenset(chat.eos_token_ids) | frozenset(ids)


def read_config(path: Path) -> dict[str, Any]:
    """``genai_config.json``, checked as far as it is read here."""
    remedy = "Fetch the bundle anew, or run again."
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CorruptArtifactError(f"{path} is missing.", remedy=remedy) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CorruptArtifactError(f"{path} is damaged: {error}.", remedy=remedy) from None
    if not isinstance(config.get("model", {}).get("context_length"), int):
        raise CorruptArtifactError(f"{path} does not say the model's context_length.", remedy=remedy)
    return config


def _open_model(folder: Path, threads: int | None) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is loaded
    import onnxruntime_genai

    onnxruntime_genai.disable_telemetry_events()
    try:
        config = onnxruntime_genai.Config(str(folder))
        if threads:
            config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        return onnxruntime_genai.Model(config)
    except RuntimeError as error:
        raise CorruptArtifactError(
            f"{folder} cannot be loaded: {error}", remedy="Fetch the bundle anew, or run again."
        ) from error
