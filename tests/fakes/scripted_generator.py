"""A generator that says what it was told to say: for what is about the form of an answer, not about a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.runtime import Ability, Delta, Generation, GenerationRequest, TextScore


class ScriptedGenerator:
    """Answers every request with ``script``, three characters a piece. ``asked`` holds the requests. ``folder`` has
    tokenizer and template."""

    def __init__(self, folder: Path, script: str = "") -> None:
        self.chat = ChatTokenizer.load(folder)
        self.script = script
        self.asked: list[GenerationRequest] = []
        self.finish_reason = "stop"
        self.abilities: frozenset[Ability] = frozenset({"json_schema", "grammar", "logprobs", "tools"})

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        raise NotImplementedError

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        self.asked.append(request)
        for start in range(0, len(self.script), 3):
            yield Delta(self.script[start : start + 3])
        yield Delta("", self.finish_reason, 7, len(self.script))  # type: ignore[arg-type] # set by tests

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        raise NotImplementedError

    def close(self) -> None:
        pass
