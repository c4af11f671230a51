"""An Ollama ``Modelfile`` beside a GGUF file.

Ollama renders conversations with a template of its own language, not with the model's. What the model's template puts
before and after each turn is found by rendering marked turns; it is written down only where the pieces, put together
again, give the model's own text for several conversations. Where they do not, the file says so and Ollama has to guess.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import SlmopsError

_MARKS = {"system": "\ue010S\ue011", "user": "\ue010U\ue011", "assistant": "\ue010A\ue011"}
_S, _U, _A = (_MARKS[role] for role in ("system", "user", "assistant"))


@dataclass(frozen=True)
class Turns:
    """What stands around each turn. ``start`` before all, ``answer`` where the model goes on, ``without_system`` in
    place of a system message where a conversation has none (a default that the template brings)."""

    start: str
    around: dict[str, tuple[str, str]]
    answer: str
    without_system: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        told = [f"{self.around[m.role][0]}{m.content}{self.around[m.role][1]}" for m in messages]
        missing = "" if messages and messages[0].role == "system" else self.without_system
        return self.start + missing + "".join(told) + self.answer


def find_turns(chat: ChatTokenizer) -> Turns | None:
    """None where the model has no template, or one that is not made of turns."""
    if not chat.has_template:
        return None
    try:
        whole = _render(chat, ("system", _S), ("user", _U), ("assistant", _A), ("user", _U))
        start, first_suffix = whole.split(_S)
        between, after_user = first_suffix.split(_U)[0], first_suffix.split(_U)[1]
        to_assistant, after_assistant = after_user.split(_A)
        answer_text = first_suffix.split(_U)[2]
        bare = _render(chat, ("user", _U)).split(_U)[0]
        opened = _render(chat, ("user", _U), opened=False).split(_U)[1]
    except (SlmopsError, ValueError, IndexError):
        return None
    user_suffix = _suffix(opened, to_assistant, start)
    answer = answer_text[len(user_suffix) :] if answer_text.startswith(user_suffix) else ""
    assistant_prefix = to_assistant[len(user_suffix) :]
    cuts = {between[cut:] for cut in range(len(between) + 1)}
    # What begins like the assistant's turn is the user's; what is before that ends the turn before.
    for user_prefix in sorted(cuts, key=lambda cut: (len(_shared(cut, assistant_prefix)), len(cut)), reverse=True):
        if not after_assistant.endswith(user_prefix):
            continue
        around = {
            "system": (start, between[: len(between) - len(user_prefix)]),
            "user": (user_prefix, user_suffix),
            "assistant": (assistant_prefix, after_assistant[: len(after_assistant) - len(user_prefix)]),
        }
        if not bare.endswith(user_prefix):
            continue
        turns = Turns("", around, answer, bare[: len(bare) - len(user_prefix)])
        if _agrees(chat, turns):
            return turns
    return None


def _suffix(opened: str, to_assistant: str, start: str) -> str:
    """What ends the user's turn. ``opened``: what stands behind a last message; some templates end the whole text
    there, and then the end is where the rest begins most like a turn does (``start``)."""
    if to_assistant.startswith(opened):
        return opened
    shared = _shared(opened, to_assistant)
    cuts = range(len(shared) + 1)
    return shared[: max(cuts, key=lambda cut: (len(_shared(to_assistant[cut:], start)), cut))]


def _shared(one: str, other: str) -> str:
    """The beginning that both texts have."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _agrees(chat: ChatTokenizer, turns: Turns) -> bool:
    said = {"system": "Be kind.", "user": "Hello, you?", "assistant": "Well."}
    orders = (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user", "assistant", "user"),
    )
    try:
        return all(
            _render(chat, *((role, said[role]) for role in order))
            == turns.render([Message(role, said[role]) for role in order])  # type: ignore[arg-type]
            for order in orders
        )
    except SlmopsError:
        return False


def _render(chat: ChatTokenizer, *turns: tuple[str, str], opened: bool = True) -> str:
    messages = [Message(role, text) for role, text in turns]  # type: ignore[arg-type]
    return chat.render(messages, add_generation_prompt=opened)


def modelfile(
    chat: ChatTokenizer, gguf_name: str, *, context_tokens: int, system: str | None, stops: Sequence[str]
) -> str:
    """The file's text. ``stops``: texts of the tokens that end a turn."""
    turns = find_turns(chat)
    lines = [f"FROM ./{gguf_name}"]
    template = None if turns is None else go_template(turns)
    if template is None:
        lines.append(
            "# The model's chat template could not be said in Ollama's language: Ollama takes the one in the file."
        )
    else:
        lines.append(f'TEMPLATE """{template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""' if '"""' not in system else f"SYSTEM {json.dumps(system)}")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER num_ctx {context_tokens}", "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"


def go_template(turns: Turns) -> str | None:
    """The turns in Go's template language; None where a piece of them would be read as a part of that language."""
    pieces = [
        turns.start,
        turns.answer,
        turns.without_system,
        *(text for pair in turns.around.values() for text in pair),
    ]
    if any(sign in piece for piece in pieces for sign in ("{{", "}}", '"""')):
        return None
    roles = [
        f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
        for role, (before, after) in turns.around.items()
    ]
    missing = (
        f'{{{{ if ne (index .Messages 0).Role "system" }}}}{turns.without_system}{{{{ end }}}}'
        if turns.without_system
        else ""
    )
    return f"{turns.start}{missing}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{turns.answer}"
