"""Several answers at once over llama.cpp: its slots, which share every step of the model.

Guarantees: the prompt's ids are those of :mod:`slmops.chat`; greedy answers by the largest logit, no penalties; the
same seed gives the same sample on the same machine where nothing else is asked meanwhile; what a slot has read is kept,
and a prompt that begins alike goes on from there. Each slot has room for a whole context, allocated when the model is
opened. Stop texts are found here, in whole characters.
Answers under a constraint and scores are left to :mod:`slmops.runtime.gguf`, which asks for one token at a time.
Not covered: adapters; accelerators.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import ContextLengthError, ServeError
from slmops.runtime.base import Delta, FinishReason, Generation, GenerationRequest, TextScore
from slmops.runtime.careful import Careful, needs_care
from slmops.runtime.description import ModelDescription
from slmops.runtime.gguf import GgufGenerator, checked_file, open_server
from slmops.runtime.prompted import Prompted
from slmops.runtime.side_by_side import called_back
from slmops.runtime.stops import StopScanner

SLOTS = 4
"""Answers at once. A cache of 2,048 tokens for each is 190 MB together for a model of 135 M."""
Chunk = Mapping[str, Any]


class GgufSlots(Prompted):
    """See the module. :attr:`at_once` threads may use it at the same time."""

    at_once = SLOTS

    def __init__(self, server: Any, chat: ChatTokenizer, description: ModelDescription, careful: Careful) -> None:
        self._server, self._chat, self._careful = server, chat, careful
        self.description = description

    @classmethod
    def load(cls, path: Path | str, *, threads: int | None = None) -> GgufSlots:
        """Open the model folder at ``path``; errors as :meth:`slmops.runtime.gguf.GgufGenerator.load`."""
        folder = Path(path)
        file, description = checked_file(folder)
        chat = ChatTokenizer.load(folder)
        server = open_server(file, description, threads, secrets.token_urlsafe(32), slots=SLOTS)
        return cls(server, chat, description, Careful(lambda: GgufGenerator.load(folder, threads=threads)))

    @property
    def context_tokens(self) -> int:
        """Prompt and answer together may have so many tokens."""
        return self.description.max_tokens

    def embed(self, texts: Sequence[str]) -> Any:
        """As the engine for one answer at a time does: mean states ``[len(texts), width]``, and the tokens read."""
        return self._careful.embed(texts)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Answers in the order of ``requests``, as many at once as there are slots.

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
        """
        with ThreadPoolExecutor(self.at_once) as threads:
            return list(threads.map(lambda request: whole(self.stream(request)), requests))

    def stream_ids(self, prompt: list[int], request: GenerationRequest) -> Iterator[Delta]:
        """Like :meth:`stream`, for a prompt that is ids already; ``request.messages`` is not read."""
        if needs_care(request):
            return self._careful.stream_ids(prompt, request)
        if len(prompt) + 1 > self.context_tokens:
            raise ContextLengthError(len(prompt), self.context_tokens)
        self.description.adapter_of(request.adapter)
        asked = asking(prompt, min(request.max_tokens, self.context_tokens - len(prompt)), request)
        return written(called_back(partial(self._ask, asked)), len(prompt), request.stop)

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        """As :class:`slmops.runtime.gguf.GgufGenerator` does."""
        return self._careful.use(lambda model: model.score(conversations))

    def close(self) -> None:
        """Free the model. The generator cannot be used afterwards."""
        self._careful.close()
        self._server = None

    def _ask(self, asked: Mapping[str, Any], take: Callable[[Chunk], bool]) -> None:
        self._server.handle_completions(dict(asked), take)


def asking(prompt: list[int], max_tokens: int, request: GenerationRequest) -> dict[str, Any]:
    """The request in llama.cpp's words: its penalties, top-k and min-p, which are on by default, are left out."""
    options: dict[str, Any] = {
        "prompt": prompt,
        "n_predict": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n_probs": 1,
        "cache_prompt": True,
        "temperature": max(request.temperature, 0.0),
    }
    if request.temperature > 0:
        options |= {"top_p": request.top_p, "samplers": ["top_p", "temperature"]}
        if request.seed is not None:
            options["seed"] = request.seed % 2**32
    return options


def written(chunks: Iterator[Chunk], prompt_tokens: int, stop: tuple[str, ...]) -> Iterator[Delta]:
    """llama.cpp's chunks as pieces; ends at a stop text.

    Raises:
        ServeError: the engine refused, or ended within the answer.
    """
    scanner, tokens, logprobs = StopScanner(stop), 0, list[float]()
    reason: FinishReason | None = None
    for chunk in chunks:
        if "error" in chunk:
            raise ServeError(f"llama.cpp: {chunk['error']}")
        choice = (chunk.get("choices") or [{}])[0]
        told = [float(one["logprob"]) for one in (choice.get("logprobs") or {}).get("content") or ()]
        logprobs += told
        tokens += len(told)
        text = scanner.push(choice.get("text") or "")
        if scanner.stopped:
            reason = "stop"
        elif choice.get("finish_reason"):
            reason = "length" if choice["finish_reason"] == "length" else "stop"
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
        if text:
            yield Delta(text)
        if reason:
            break
    close = getattr(chunks, "close", None)
    if close is not None:
        close()
    if reason is None:
        raise ServeError("llama.cpp ended within an answer.", remedy="Ask again.")
    # Of a token that is half a character nothing is told: then the sum is not the answer's.
    logprob = sum(logprobs) if len(logprobs) == tokens else None
    yield Delta(scanner.flush(), reason, prompt_tokens, tokens, logprob=logprob)


def whole(pieces: Iterator[Delta]) -> Generation:
    """A streamed answer at once."""
    *before, last = pieces
    text = "".join(piece.text for piece in (*before, last))
    return Generation(text, last.finish_reason or "stop", last.prompt_tokens, last.completion_tokens, last.logprob)
