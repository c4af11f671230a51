"""``slmops chat``: talk to a bundle in the terminal, without a server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from slmops.artifacts import Message
    from slmops.runtime.base import Classifier, Generator
    from slmops.runtime.description import ModelDescription

BAR_WIDTH = 30
LABELS_SHOWN = 5


def chat(
    bundle: Annotated[Path, typer.Argument(help="A bundle, a variant, or a model folder.", show_default=False)],
    prompt: Annotated[
        str | None, typer.Option(help="Ask this and end; without it, standard input is read.", show_default=False)
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0 is greedy.")] = 0.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one forward pass.", show_default="chosen by the model's size")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object an answer.")] = False,
) -> None:
    """Talk to a bundle. A classifier shows its label and how sure it is; any other model streams its answer."""
    from slmops.errors import UsageError
    from slmops.package import check_digests, resolve_model_folder

    folder = resolve_model_folder(bundle)
    check_digests(bundle)
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty.", remedy="Give it some text.")
    turns = open_turns(folder, max_tokens=max_tokens, temperature=temperature, threads=threads)
    try:
        if prompt is not None:
            turns.answer(prompt, as_json=as_json)
        elif not sys.stdin.isatty():
            text = sys.stdin.read().strip()
            if not text:
                raise UsageError("Standard input is empty.", remedy="Pipe some text in, or use --prompt.")
            turns.answer(text, as_json=as_json)
        else:
            for text in typed():
                turns.answer(text, as_json=as_json)
    finally:
        turns.close()


class Turns(Protocol):
    def answer(self, text: str, *, as_json: bool) -> None: ...

    def close(self) -> None: ...


def open_turns(folder: Path, *, max_tokens: int, temperature: float, threads: int | None) -> Turns:
    """The model in ``folder``, ready to be talked to."""
    from slmops.runtime import open_classifier, open_generator
    from slmops.runtime.description import ModelDescription

    description = ModelDescription.read(folder)
    if description.form == "classifier":
        return LabelTurns(open_classifier(folder, threads=threads))
    return TextTurns(open_generator(folder, threads=threads), description, max_tokens, temperature)


class LabelTurns:
    """Every turn stands alone: a classifier remembers nothing."""

    def __init__(self, model: Classifier) -> None:
        self._model = model

    def answer(self, text: str, *, as_json: bool) -> None:
        row = self._model.probabilities([text])[0]
        order = row.argsort()[::-1][:LABELS_SHOWN]
        top = [(self._model.labels[index], float(row[index])) for index in order]
        if as_json:
            _print_json({"label": top[0][0], "confidence": top[0][1], "probabilities": dict(top)})
        else:
            typer.echo("\n".join(bars(top)))

    def close(self) -> None:
        self._model.close()


class TextTurns:
    """A conversation: each answer is part of the next question's past."""

    def __init__(self, model: Generator, description: ModelDescription, max_tokens: int, temperature: float) -> None:
        self._model = model
        self._description = description
        self._max_tokens = max_tokens
        self._temperature = temperature
        self._past: list[Message] = []

    def answer(self, text: str, *, as_json: bool) -> None:
        from slmops.artifacts import Message
        from slmops.runtime.base import GenerationRequest

        messages = self._description.conversation([*self._past, Message("user", text)])
        request = GenerationRequest(messages, max_tokens=self._max_tokens, temperature=self._temperature)
        pieces: list[str] = []
        for delta in self._model.stream(request):
            pieces.append(delta.text)
            if not as_json:
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        answer = "".join(pieces)
        if as_json:
            counts: dict[str, Any] = {
                "prompt_tokens": delta.prompt_tokens, "completion_tokens": delta.completion_tokens,
            }  # fmt: skip
            _print_json({"text": answer, "finish_reason": delta.finish_reason, **counts})
        else:
            typer.echo()
        self._past += [Message("user", text), Message("assistant", answer)]

    def close(self) -> None:
        self._model.close()


def bars(top: list[tuple[str, float]]) -> list[str]:
    """One line a label: name, bar, share."""
    width = max(len(label) for label, _ in top)
    return [f"{label:<{width}}  {'█' * round(BAR_WIDTH * p):<{BAR_WIDTH}}  {100 * p:5.1f} %" for label, p in top]


def typed() -> Iterator[str]:
    """Lines that a person types, until Ctrl-D."""
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            typer.echo()
            return
        if text:
            yield text


def _print_json(value: dict[str, Any]) -> None:
    from slmops.cli.render import print_json

    print_json(value)
