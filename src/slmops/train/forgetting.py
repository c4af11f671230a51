"""What training costs on rows that it is not about: their loss before and after, and a budget for the difference.

Rows are JSON lines: ``{"messages": [...], "target": "..."}``, of which the target is judged, or ``{"text": "..."}``, of
which every token is. Guarantees: a rise beyond the budget fails the run before anything is kept. Not covered: abilities
that the rows do not show.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.artifacts import Message
from slmops.chat import ChatTokenizer
from slmops.errors import DataError, GateError
from slmops.recipe import ForgettingConfig
from slmops.train.generator.answers import EncodedRow


@dataclass(frozen=True)
class Forgetting:
    """Mean cross-entropy of a token, and the share of tokens foreseen, before and after training."""

    loss_before: float
    loss_after: float
    accuracy_before: float
    accuracy_after: float

    @property
    def rise(self) -> float:
        """As a share of the loss before; negative where the model got better."""
        return self.loss_after / max(self.loss_before, 1e-9) - 1

    def to_json(self) -> dict[str, float]:
        return {
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after,
            "rise": self.rise,
        }


def read_general_rows(config: ForgettingConfig, tokenizer: ChatTokenizer, max_tokens: int) -> list[EncodedRow]:
    """The first ``max_rows`` rows of the file, as tokens.

    Raises:
        DataError: no such file, a line that is not such a row, or nothing to judge.
    """
    path = Path(config.data)
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The general rows cannot be read: {error}.", path=path) from None
    rows: list[EncodedRow] = []
    for number, line in enumerate(filter(str.strip, lines), start=1):
        row = _encode(line, tokenizer, path, number)
        tokens, supervised = row.tokens[:max_tokens], row.supervised[:max_tokens]
        if any(supervised[1:]):
            rows.append(EncodedRow(tokens, supervised))
        if len(rows) == config.max_rows:
            break
    if not rows:
        raise DataError("There is no general row to judge by.", path=path, remedy="Give lines with text or messages.")
    return rows


def _encode(line: str, tokenizer: ChatTokenizer, path: Path, number: int) -> EncodedRow:
    try:
        raw: dict[str, Any] = json.loads(line)
        if "text" in raw:
            ids = tokenizer.encode(str(raw["text"]))
            return EncodedRow(ids, [False, *[True] * (len(ids) - 1)][: len(ids)])
        messages = tuple(Message(m["role"], m["content"]) for m in raw["messages"])
        chat = tokenizer.encode_training(messages, str(raw["target"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This is no general row: {type(error).__name__} {error}.",
            path=path,
            row=number,
            remedy='Write {"text": "..."} or {"messages": [...], "target": "..."}.',
        ) from None
    return EncodedRow(list(chat.input_ids), list(chat.loss_mask))


def general_loss(model_folder: Path, config: ForgettingConfig, max_tokens: int) -> tuple[float, float]:
    """Mean cross-entropy of a token of the general rows, and the share of tokens foreseen, of a checkpoint.

    Raises:
        DataError: as :func:`read_general_rows`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    rows = read_general_rows(config, ChatTokenizer.load(model_folder), max_tokens)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    loss, right, tokens = 0.0, 0, 0
    with torch.no_grad():
        for row in rows:
            ids, judged = torch.tensor(row.tokens), torch.tensor(row.supervised[1:])
            logits = model(ids[None]).logits[0, :-1][judged].float()
            wanted = ids[1:][judged]
            loss += float(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
            right += int((logits.argmax(dim=-1) == wanted).sum())
            tokens += len(wanted)
    return loss / tokens, right / tokens


def check_forgetting(found: Forgetting, budget: float) -> None:
    """Raises :class:`GateError` where the rise is beyond ``budget``."""
    if found.rise > budget:
        raise GateError(
            f"The model forgot: its loss on the general rows rose by {found.rise:.1%}, from {found.loss_before:.3f} to "
            f"{found.loss_after:.3f}; train.forgetting.budget allows {budget:.1%}.",
            remedy="Lower train.learning_rate or train.epochs, train with method: lora, or raise the budget.",
        )
