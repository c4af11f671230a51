"""A generator that knows some answers: it finds them likely, and writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from slmops.artifacts import Message
from slmops.runtime import Delta, Generation, GenerationRequest, TextScore


class KnowingGenerator:
    """``answers``: last message -> what it would say. Anything else costs it a nat a character.

    ``asked`` keeps every conversation; ``scores``: False where the engine cannot score given text.
    """

    def __init__(self, answers: Mapping[str, str], *, scores: bool = True) -> None:
        self.answers, self.scores = dict(answers), scores
        self.asked: list[tuple[Message, ...]] = []
        self.requests: list[GenerationRequest] = []

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        self.requests += requests
        self.asked += [request.messages for request in requests]
        texts = [self.answers.get(request.messages[-1].content, "I do not know") for request in requests]
        return [Generation(text, "stop", 1, len(text)) for text in texts]

    def stream(self, request: GenerationRequest) -> Iterator[Delta]:
        yield Delta(self.generate([request])[0].text, "stop")

    def score(self, conversations: Sequence[tuple[tuple[Message, ...], str]]) -> list[TextScore]:
        if not self.scores:
            raise NotImplementedError("the graph gives the last position alone")
        self.asked += [messages for messages, _ in conversations]
        return [
            TextScore(
                -0.1 if self.answers.get(messages[-1].content) == text else -float(len(text)), 1, len(text.encode())
            )
            for messages, text in conversations
        ]

    def close(self) -> None: ...
