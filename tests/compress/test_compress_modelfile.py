"""Ollama's Modelfile, for the templates of the families: what it says, put together, is what the model was taught."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fakes.tiny_models import write_tiny_llama
from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.compress.modelfile import Turns, find_turns, go_template, modelfile

TEMPLATES = Path(__file__).parents[1] / "chat" / "templates"
CONVERSATIONS = [
    (Message("user", "Hi  there"),),
    (Message("system", "Be kind."), Message("user", "Hello {you}?")),
    (Message("user", "a"), Message("assistant", "b"), Message("user", "c")),
    (
        Message("system", "Be kind."),
        Message("user", "a"),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
        Message("user", "e"),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_llama(folder)
    return folder


def chat_of(folder: Path, template: str) -> ChatTokenizer:
    (folder / "chat_template.jinja").write_text(template, "utf-8")
    return ChatTokenizer.load(folder)


def go(template: str, messages: tuple[Message, ...]) -> str:
    """The few words of Go's template language that are written here, computed."""
    before, _, rest = template.partition("{{ range .Messages }}")
    turn, _, after = rest.rpartition("{{ end }}{{ end }}")
    default = re.fullmatch(
        r'(.*?)(?:\{\{ if ne \(index \.Messages 0\)\.Role "system" \}\}(.*)\{\{ end \}\})?', before, re.S
    )
    assert default is not None
    text = default[1] + (default[2] or "" if messages[0].role != "system" else "")
    roles = re.findall(
        r'\{\{ (?:else )?if eq \.Role "(\w+)" \}\}(.*?)\{\{ \.Content \}\}(.*?)(?=\{\{ else if|\Z)', turn, re.S
    )
    around = {role: (prefix, suffix) for role, prefix, suffix in roles}
    return text + "".join(around[m.role][0] + m.content + around[m.role][1] for m in messages) + after


@pytest.mark.parametrize("family", ["smollm2", "qwen25", "phi3", "phi4mini"])
def test_gos_template_says_what_the_models_own_says(folder: Path, family: str) -> None:
    chat = chat_of(folder, (TEMPLATES / f"{family}.jinja").read_text("utf-8"))
    turns = find_turns(chat)
    assert turns is not None
    template = go_template(turns)
    assert template is not None
    for messages in CONVERSATIONS:
        expected = chat.render(messages, add_generation_prompt=True)
        assert turns.render(messages) == expected
        assert go(template, messages) == expected
    text = modelfile(chat, "m.gguf", context_tokens=64, system="Be kind.", stops=["<|end|>"])
    assert text.startswith(f'FROM ./m.gguf\nTEMPLATE """{template}"""\nSYSTEM """Be kind."""\n')
    assert text.endswith('PARAMETER stop "<|end|>"\nPARAMETER num_ctx 64\nPARAMETER temperature 0\n')


def test_a_turn_ends_where_the_next_one_begins(folder: Path) -> None:
    chat = chat_of(folder, (TEMPLATES / "smollm2.jinja").read_text("utf-8"))
    turns = find_turns(chat)
    assert turns is not None
    assert turns.around == {
        "system": ("<|im_start|>system\n", "<|im_end|>\n"),
        "user": ("<|im_start|>user\n", "<|im_end|>\n"),
        "assistant": ("<|im_start|>assistant\n", "<|im_end|>\n"),
    }
    assert turns.without_system.endswith("<|im_end|>\n")


@pytest.mark.parametrize(
    "template", ["{{ messages | length }}", "{% for m in messages %}{{ m.content | upper }}{% endfor %}"]
)
def test_what_is_not_made_of_turns_is_left_to_ollama(folder: Path, template: str) -> None:
    chat = chat_of(folder, template)
    assert find_turns(chat) is None
    text = modelfile(chat, "m.gguf", context_tokens=64, system=None, stops=[])
    assert "TEMPLATE" not in text
    assert "could not be said" in text
    assert "SYSTEM" not in text


def test_pieces_that_go_would_read_as_its_own_are_not_written() -> None:
    around = dict.fromkeys(("system", "user", "assistant"), ("{{", "\n"))
    assert go_template(Turns("", around, "")) is None


def test_a_system_message_with_quotes_is_escaped(folder: Path) -> None:
    chat = chat_of(folder, (TEMPLATES / "qwen25.jinja").read_text("utf-8"))
    text = modelfile(chat, "m.gguf", context_tokens=64, system='Say """ twice.', stops=[])
    assert 'SYSTEM "Say \\"\\"\\" twice."' in text
