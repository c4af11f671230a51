"""A generator over llama.cpp, through xllamacpp.

Guarantees: the prompt's ids are those of :mod:`slmops.chat`; greedy answers by the largest logit, no penalties; the
same seed gives the same sample on the same machine; ``max_tokens`` is cut to what the context leaves. ``score`` asks
for each of the target's tokens in turn what the model thinks of it, with the cache of the ones before: as slow as
generating it.
The engine tells nothing of a token that is half a character until it is whole; such tokens are asked for in a way that
names them all the same.
The engine's own HTTP listener, which cannot be left out, is bound to the loopback interface at a free port, behind a
key that is made anew each time and told to nobody; its web page, metrics and slots are off.
A model of the precision f32 keeps its cache in f32 and leaves the fused attention (half precision inside) out: its
numbers are torch's but for rounding. Others run as llama.cpp runs them by default.
Under a constraint, the likeliest tokens are asked for at each step, and all of them where none of those may come (or
where the token is drawn): a tenth of a second a token for a vocabulary of 50,000.
Not covered: accelerators, several requests in one batch, adapters.
"""

from __future__ import annotations

import json
import secrets
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import ContextLengthError, CorruptArtifactError, MissingExtraError, ModelError
from slmops.models.gguf_file import check_gguf
from slmops.runtime.answer import Answer
from slmops.runtime.base import Delta, Generation, GenerationRequest, TextScore
from slmops.runtime.description import ModelDescription
from slmops.runtime.guide import Guide, masked
from slmops.runtime.prompted import Prompted
from slmops.runtime.sampling import draw, log_softmax

GGUF_NAME = "model.gguf"
TOKENIZE_TIMEOUT_S = 60.0
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
FORCED = 1e6
"""A bias that no logit outweighs: the token that is scored is the one that is chosen. What is told of it is from
before the bias."""


class GgufGenerator(Prompted):
    """See the module. One instance may be used from one thread at a time."""

    def __init__(
        self, server: Any, key: str, chat: ChatTokenizer, description: ModelDescription, context_tokens: int
    ) -> None:
        self._server, self._key = server, key
        self._chat = chat
        self.description = description
        self._context_tokens = context_tokens
        self._end_ids = frozenset(chat.eos_token_ids)
        self._whole = chat.eos_token_ids[0] if chat.eos_token_ids else 0  # a token that is no half character
        self._vocabulary = 0  # known once all tokens were told of

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> GgufGenerator:
        """Open the model folder at ``path``. ``threads``: of one forward pass; None leaves it to the engine.

        Raises:
            MissingExtraError: xllamacpp is not installed.
            ModelNotFoundError: not a model folder.
            CorruptArtifactError: the GGUF file is missing or damaged.
            ModelError: the folder holds another kind of model.
        """
        folder = Path(path)
        file, description = checked_file(folder)
        chat = ChatTokenizer.load(folder)
        key = secrets.token_urlsafe(32)
        server = open_server(file, description, threads, key)
        return cls(server, key, chat, description, description.max_tokens)

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        return self._context_tokens

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of ``requests``, one after the other.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
        """
        answers = []
        for request in requests:
            answer = self._answer(self._chat.encode_prompt(request.messages, request.tools), request)
            logprob = 0.0
            text = []
            guide = self._guide_of(request)
            tokens = self._all_tokens(answer, request) if guide is None else self._guided(answer, request, guide)
            for token, its_logprob in tokens:
                logprob += its_logprob
                text.append(answer.push(token))
                if answer.finish_reason:
                    break
            text.append(answer.finish())
            reason = answer.finish_reason or "length"
            answers.append(Generation("".join(text), reason, len(answer.prompt), answer.tokens, logprob))
        return answers

    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]:
        """Like :meth:`stream`, for a prompt that is ids already; ``request.messages`` is not read."""
        return self._stream(self._answer(prompt, request), request)

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """Log-probability of each target after its messages, the end of the turn included.

        Raises:
            ContextLengthError: messages and target do not fit in the context.
        """
        return [self._score(messages, target) for messages, target in conversations]

    def target_logits(self, messages: tuple[Message, ...], target: str) -> NDArray[np.float32]:
        """Log-probabilities that predict each token of ``target``, ``[tokens, vocabulary]``; raises as :meth:`score`.
        The engine tells them as text: a tenth of a second a token for a vocabulary of 50,000."""
        ids, wanted = self._target(messages, target)
        return np.stack([self._distribution(ids[:position]) for position in wanted])

    def engine_tokens(self, text: str) -> list[int]:
        """Ids of plain text, as llama.cpp makes them out of the same file; no token in front."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False}).encode(),
            {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"},
        )
        with _NO_PROXY.open(request, timeout=TOKENIZE_TIMEOUT_S) as reply:
            return [int(token) for token in json.load(reply)["tokens"]]

    def close(self) -> None:
        """Free the model. The generator cannot be used afterwards."""
        self._server = None

    def _answer(self, prompt: list[int], request: GenerationRequest) -> Answer:
        if len(prompt) + 1 > self._context_tokens:
            raise ContextLengthError(len(prompt), self._context_tokens)
        self.description.adapter_of(request.adapter)
        room = min(request.max_tokens, self._context_tokens - len(prompt))
        return Answer(prompt, room, self._end_ids, self._chat, request.stop)

    def _all_tokens(self, answer: Answer, request: GenerationRequest) -> Iterator[tuple[int, float]]:
        """Of the whole answer, in few calls of the engine where it can be stopped by tokens alone and tells of all."""
        ids, last = list(answer.prompt), len(answer.prompt) + answer.max_tokens
        while not request.stop and request.temperature <= 0 and len(ids) < last:
            asked = {"prompt": ids, "n_predict": last - len(ids), "cache_prompt": True, **GREEDY}
            reply = self._ask(asked)
            found = told(reply)
            if len(found) != reply["usage"]["completion_tokens"]:
                break
            yield from found
            ids += [token for token, _ in found]
            if len(ids) < last:
                # The engine also ends at tokens that it knows by their text; the model's own ends are ours to judge.
                token, logprob = self._greedy(ids)
                yield token, logprob
                ids.append(token)
        yield from self._tokens(ids, last - len(ids), request)

    def _stream(self, answer: Answer, request: GenerationRequest) -> Iterator[Delta]:
        guide = self._guide_of(request)
        if guide is None:
            tokens = self._tokens(answer.prompt, answer.max_tokens, request)
        else:
            tokens = self._guided(answer, request, guide)
        for token, _ in tokens:
            text = answer.push(token)
            if text:
                yield Delta(text, tokens=guide.flush() if guide else ())
            if answer.finish_reason:
                break
        rest = answer.finish()
        told = guide.flush() if guide else ()
        yield Delta(rest, answer.finish_reason or "length", len(answer.prompt), answer.tokens, told)

    def _guided(self, answer: Answer, request: GenerationRequest, guide: Guide) -> Iterator[tuple[int, float]]:
        """As :meth:`_tokens`, with each position shown to ``guide``."""
        random = np.random.default_rng(request.seed)
        ids = list(answer.prompt)
        for _ in range(answer.max_tokens):
            token, logprob = self._guided_token(ids, request, guide, random)
            guide.took(token, ends=token in self._end_ids)
            yield token, logprob
            if guide.finished:
                answer.end()
                return
            ids.append(token)

    def _guided_token(
        self, ids: list[int], request: GenerationRequest, guide: Guide, random: np.random.Generator
    ) -> tuple[int, float]:
        greedy = request.temperature <= 0
        for few in (True, False) if greedy else (False,):
            told = self._likeliest(ids) if few else self._distribution(ids)
            allowed = guide.see(told)
            logprobs = told if allowed is None else log_softmax(masked(told, allowed))
            token = int(np.argmax(logprobs)) if greedy else draw(logprobs, request.temperature, request.top_p, random)
            if not few or told[token] > told.min():  # one of those that were told, and not of the rest
                break
        return token, float(logprobs[token])

    def _likeliest(self, ids: list[int]) -> NDArray[np.float32]:
        """Log-probabilities after ``ids``, ``[vocabulary]``: those of the :data:`LIKELIEST` tokens, and what is left
        shared evenly by the others."""
        if not self._vocabulary:
            self._vocabulary = self._distribution(ids).size
        if self._vocabulary <= LIKELIEST:
            return self._distribution(ids)
        top = self._top(ids, LIKELIEST)
        logprobs = np.full(self._vocabulary, LEAST, np.float32)
        left = max(1.0 - sum(float(np.exp(one["logprob"])) for one in top), 0.0) / (self._vocabulary - len(top))
        logprobs[:] = max(float(np.log(left)), LEAST) if left > 0 else LEAST
        for one in top:
            logprobs[one["id"]] = float(one["logprob"])
        return logprobs

    def _tokens(self, prompt: list[int], count: int, request: GenerationRequest) -> Iterator[tuple[int, float]]:
        """Token after token with its log-probability, each asked for by itself, over the cache of those before."""
        ids = list(prompt)
        for step in range(count):
            token, logprob = self._greedy(ids) if request.temperature <= 0 else self._sampled(ids, request, step)
            yield token, logprob
            ids.append(token)

    def _greedy(self, ids: list[int]) -> tuple[int, float]:
        """The likeliest token is told of even where it is half a character: the one that is chosen is another."""
        asked = {"prompt": ids, "n_predict": 1, "cache_prompt": True, "logit_bias": [[self._whole, FORCED]], **GREEDY}
        first = self._ask(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]
        return int(first["id"]), float(first["logprob"])

    def _sampled(self, ids: list[int], request: GenerationRequest, step: int) -> tuple[int, float]:
        found = told(self._ask({"prompt": ids, "n_predict": 1, **sampling(request, step)}))
        if found:
            return found[0]
        # Half a character: the engine keeps it to itself. Ours is another draw from the same distribution.
        logprobs = self._distribution(ids)
        seed = None if request.seed is None else (request.seed + step * SEED_STEP) % 2**32
        token = draw(logprobs, request.temperature, request.top_p, np.random.default_rng(seed))
        return token, float(logprobs[token])

    def _distribution(self, ids: list[int]) -> NDArray[np.float32]:
        """Log-probabilities of every token after ``ids``, ``[vocabulary]``."""
        top = self._top(ids, ALL_TOKENS)
        logprobs = np.full(len(top), LEAST, np.float32)
        for one in top:
            if one["logprob"] is not None:
                logprobs[one["id"]] = max(float(one["logprob"]), LEAST)
        return logprobs

    def _top(self, ids: list[int], count: int) -> list[dict[str, Any]]:
        """The ``count`` likeliest tokens after ``ids`` as the engine tells them: ``id`` and ``logprob``."""
        asked = {
            "prompt": ids,
            "n_predict": 1,
            "cache_prompt": True,
            "logit_bias": [[self._whole, FORCED]],
            **GREEDY,
            "n_probs": count,
        }
        top: list[dict[str, Any]] = self._ask(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return top

    def _score(self, messages: tuple[Message, ...], target: str) -> TextScore:
        ids, wanted = self._target(messages, target)
        logprob = 0.0
        for position in wanted:
            asked = {
                "prompt": ids[:position],
                "n_predict": 1,
                "cache_prompt": True,
                "logit_bias": [[ids[position], FORCED]],
                **GREEDY,
            }
            found = told(self._ask(asked))
            if found and found[0][0] != ids[position]:
                raise RuntimeError(f"llama.cpp chose the token {found[0][0]} where {ids[position]} was forced")
            logprob += found[0][1] if found else float(self._distribution(ids[:position])[ids[position]])
        return TextScore(logprob, len(wanted), len(target.encode("utf-8", "replace")))

    def _target(self, messages: tuple[Message, ...], target: str) -> tuple[list[int], list[int]]:
        """Ids of the conversation, and the positions of the target's."""
        encoded = self._chat.encode_training(messages, target)
        ids = encoded.input_ids
        if len(ids) > self._context_tokens:
            raise ContextLengthError(len(ids), self._context_tokens)
        return ids, [position for position, counts in enumerate(encoded.loss_mask) if counts and position > 0]

    def _ask(self, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raises :class:`RuntimeError` with the engine's words where it refuses."""
        reply: Mapping[str, Any] = self._server.handle_completions(dict(asked))
        if "error" in reply or "choices" not in reply:
            raise RuntimeError(f"llama.cpp: {reply.get('error', reply)}")
        return reply


SEED_STEP = 0x9E3779B1  # odd and far from 1: neighbouring seeds share no steps
GREEDY: Mapping[str, Any] = {"temperature": 0.0, "n_probs": 1, "ignore_eos": False}
ALL_TOKENS = 2**31 - 1
LIKELIEST = 100
"""Tokens that are asked for under a constraint: of these, one may nearly always come."""
LEAST = -1e4  # log-probability of what the engine gives none


def sampling(request: GenerationRequest, step: int) -> dict[str, Any]:
    """The request for the token ``step`` in llama.cpp's words: its penalties, top-k and min-p, which are on by default,
    are left out."""
    options: dict[str, Any] = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "samplers": ["top_p", "temperature"],
        "n_probs": 1,
        "cache_prompt": True,
    }
    if request.seed is not None:
        options["seed"] = (request.seed + step * SEED_STEP) % 2**32
    return options


def checked_file(folder: Path) -> tuple[Path, ModelDescription]:
    """The GGUF file in the model folder, and what the folder says of it.

    Raises:
        ModelNotFoundError: not a model folder.
        CorruptArtifactError: the file is missing or damaged.
        ModelError: the folder holds another kind of model.
    """
    description = ModelDescription.read(folder)
    if (description.runtime, description.form) != ("llama.cpp", "generator"):
        raise ModelError(
            f"{folder} holds a {description.form} for {description.runtime}, not a generator for llama.cpp.",
            remedy="Name a variant that was exported with the format gguf.",
        )
    file = folder / GGUF_NAME
    if not file.is_file():
        raise CorruptArtifactError(f"{file} is missing.", remedy="Fetch the bundle anew, or run again.")
    check_gguf(file)
    return file, description


def told(reply: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Tokens and their log-probabilities in an answer of the engine; without those at its end that are half a
    character."""
    logprobs = reply["choices"][0].get("logprobs") or {}
    return [(int(one["id"]), float(one["logprob"])) for one in logprobs.get("content") or ()]


def open_server(file: Path, description: ModelDescription, threads: int | None, key: str, *, slots: int = 1) -> Any:
    """llama.cpp over ``file``, with room for ``slots`` whole contexts.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        CorruptArtifactError: the file cannot be loaded.
    """
    try:
        import xllamacpp
    except ImportError:
        raise MissingExtraError("Running a GGUF model", "llamacpp") from None
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = description.max_tokens * slots
    params.n_parallel = slots
    params.no_perf = True
    params.n_gpu_layers = 0
    params.verbosity = -1
    params.warmup = False
    params.offline = True
    params.api_keys = [key]
    params.ui = params.endpoint_slots = params.endpoint_metrics = params.endpoint_props = False
    if description.precision == "f32":  # weights in full precision, mostly to compare with: its attention too
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    try:
        return xllamacpp.Server(params)
    except (RuntimeError, ValueError) as error:
        raise CorruptArtifactError(
            f"{file} cannot be loaded: {error}.", remedy="Fetch the bundle anew, or run again."
        ) from error
