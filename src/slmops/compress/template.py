"""A model that is to be talked to needs a chat template; one without is refused before it is converted."""

from __future__ import annotations

from pathlib import Path

from slmops.chat import ChatTokenizer
from slmops.errors import ModelError


def check_template(chat: ChatTokenizer, folder: Path) -> None:
    """Raises :class:`ModelError` for a model that was not made to be talked to."""
    if not chat.has_template:
        raise ModelError(
            f"{folder} has no chat template: it was not made to be talked to.",
            remedy="Choose an instruction-tuned model, or put its chat_template.jinja into the folder.",
        )
