"""A generator over OpenVINO: a graph that keeps its cache inside, and the plain runtime around it.

Guarantees: the prompt's ids are those of :mod:`slmops.chat`; greedy answers by the largest logit, no penalties; the
same seed gives the same sample on the same machine; ``max_tokens`` is cut to what the context leaves; ``score`` is one
forward pass. A model of the precision fp32 or fp16 is computed and cached in fp32; others as OpenVINO does by default,
which on processors with such instructions means bf16 products and a cache of 8 bits.
OpenVINO reports every import to its makers through a package of its own; that package is kept out of the process.
Not covered: accelerators, several requests in one batch, adapters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import ContextLengthError, CorruptArtifactError, MissingExtraError, ModelError
from slmops.runtime.answer import Answer
from slmops.runtime.base import Delta, Generation, GenerationRequest, TextScore
from slmops.runtime.description import ModelDescription
from slmops.runtime.guide import Guide, masked
from slmops.runtime.prompted import Prompted
from slmops.runtime.sampling import draw, log_likelihood, log_softmax

GRAPH_NAME = "openvino_model.xml"
WEIGHTS_NAME = "openvino_model.bin"
TELEMETRY = "openvino_telemetry"
EXACT = {
    "EXECUTION_MODE_HINT": "ACCURACY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}


class OpenvinoGenerator(Prompted):
    """See the module. One instance may be used from one thread at a time."""

    def __init__(self, request: Any, chat: ChatTokenizer, description: ModelDescription) -> None:
        self._request = request
        self._chat = chat
        self.description = description
        self._end_ids = frozenset(chat.eos_token_ids)

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> OpenvinoGenerator:
        """Open the model folder at ``path``. ``threads``: of one forward pass; None leaves it to the engine.

        Raises:
            MissingExtraError: openvino is not installed.
            ModelNotFoundError: not a model folder.
            CorruptArtifactError: a file of it is missing or damaged.
            ModelError: the folder holds another kind of model.
        """
        folder = Path(path)
        description = ModelDescription.read(folder)
        if (description.runtime, description.form) != ("openvino", "generator"):
            raise ModelError(
                f"{folder} holds a {description.form} for {description.runtime}, not a generator for openvino.",
                remedy="Name a variant that was exported with the format openvino.",
            )
        for name in (GRAPH_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise CorruptArtifactError(
                    f"{folder / name} is missing.", remedy="Fetch the bundle anew, or run again."
                )
        return cls(_open(folder, description.precision, threads), ChatTokenizer.load(folder), description)

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        return self.description.max_tokens

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of ``requests``, one after the other.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
        """
        answers = []
        for request in requests:
            answer = self._answer(self._chat.encode_prompt(request.messages, request.tools), request)
            guide = self._guide_of(request)
            logprob, text = 0.0, []
            for token, its_logprob in self._tokens(answer, request, guide):
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
        scores = []
        for messages, target in conversations:
            rows, ids = self._target_rows(messages, target)
            scores.append(TextScore(log_likelihood(rows, ids), len(ids), len(target.encode("utf-8", "replace"))))
        return scores

    def target_logits(self, messages: tuple[Message, ...], target: str) -> NDArray[np.float32]:
        """Logits that predict each token of ``target``, ``[tokens, vocabulary]``; raises as :meth:`score`."""
        return self._target_rows(messages, target)[0].astype(np.float32)

    def close(self) -> None:
        """Free the model. The generator cannot be used afterwards."""
        self._request = None

    def _answer(self, prompt: list[int], request: GenerationRequest) -> Answer:
        if len(prompt) + 1 > self.context_tokens:
            raise ContextLengthError(len(prompt), self.context_tokens)
        self.description.adapter_of(request.adapter)
        room = min(request.max_tokens, self.context_tokens - len(prompt))
        return Answer(prompt, room, self._end_ids, self._chat, request.stop)

    def _stream(self, answer: Answer, request: GenerationRequest) -> Iterator[Delta]:
        guide = self._guide_of(request)
        for token, _ in self._tokens(answer, request, guide):
            text = answer.push(token)
            if text:
                yield Delta(text, tokens=guide.flush() if guide else ())
            if answer.finish_reason:
                break
        rest = answer.finish()
        tokens = guide.flush() if guide else ()
        yield Delta(rest, answer.finish_reason or "length", len(answer.prompt), answer.tokens, tokens)

    def _tokens(self, answer: Answer, request: GenerationRequest, guide: Guide | None) -> Iterator[tuple[int, float]]:
        random = np.random.default_rng(request.seed)
        ids, seen = answer.prompt, 0
        self._request.reset_state()
        for _ in range(answer.max_tokens):
            logits = self._forward(ids, seen)[-1]
            seen += len(ids)
            allowed = guide.see(logits) if guide else None
            logprobs = log_softmax(logits if allowed is None else masked(logits, allowed))
            if request.temperature <= 0:
                token = int(np.argmax(logprobs))
            else:
                token = draw(logprobs, request.temperature, request.top_p, random)
            if guide:
                guide.took(token, ends=token in self._end_ids)
            yield token, float(logprobs[token])
            if guide and guide.finished:
                answer.end()
                return
            ids = [token]

    def _forward(self, ids: Sequence[int], seen: int) -> NDArray[np.float32]:
        """Logits ``[len(ids), vocabulary]`` of tokens that follow ``seen`` others in the cache."""
        total = seen + len(ids)
        self._request.infer(
            {
                "input_ids": np.asarray([ids], np.int64),
                "attention_mask": np.ones((1, total), np.int64),
                "position_ids": np.arange(seen, total, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=False,
        )
        logits: NDArray[np.float32] = self._request.get_tensor("logits").data[0]
        return logits

    def _target_rows(self, messages: tuple[Message, ...], target: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Logits before each token of the target, and the tokens."""
        encoded = self._chat.encode_training(messages, target)
        ids = encoded.input_ids
        if len(ids) > self.context_tokens:
            raise ContextLengthError(len(ids), self.context_tokens)
        self._request.reset_state()
        logits = self._forward(ids[:-1], 0)
        wanted = [position for position, counts in enumerate(encoded.loss_mask) if counts and position > 0]
        return logits[[position - 1 for position in wanted]], np.asarray(ids)[wanted]


def import_openvino() -> Any:
    """The module, without its telemetry.

    Raises:
        MissingExtraError: it is not installed.
    """
    sys.modules.setdefault(TELEMETRY, None)  # type: ignore[arg-type] # None: importing it fails, and a stub steps in
    try:
        import openvino
    except ImportError:
        raise MissingExtraError("Running an OpenVINO model", "openvino") from None
    return openvino


def _open(folder: Path, precision: str, threads: int | None) -> Any:
    openvino = import_openvino()
    settings: dict[str, Any] = dict(EXACT) if precision in ("fp32", "fp16") else {}
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(folder / GRAPH_NAME), "CPU", settings).create_infer_request()
    except RuntimeError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CorruptArtifactError(
            f"{folder / GRAPH_NAME} cannot be loaded: {first}", remedy="Fetch the bundle anew, or run again."
        ) from error
