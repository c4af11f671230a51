"""Texts to padded tensors, for classifiers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from slmops.chat.files import open_tokenizer

PAD_ID = 0
"""Padding is masked, so any id will do."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder; lengths are this module's business, so it neither cuts nor pads.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    return open_tokenizer(folder / "tokenizer.json")


def with_end_token(tokenizer: Tokenizer, end_token: str) -> Tokenizer:
    """A copy that closes every text with ``end_token``: in a causal model that position has read the whole text.

    It becomes part of ``tokenizer.json``, so training and every runtime encode alike. A tokenizer that closes its texts
    already stays as it is.
    """
    spec = json.loads(tokenizer.to_str())
    end = {"id": end_token, "ids": [tokenizer.token_to_id(end_token)], "tokens": [end_token]}
    closing: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }
    before = spec["post_processor"]
    parts = [] if before is None else before.get("processors", [before])
    # Two templates in a row do not work: the second takes what the first put in front for a text of its own.
    template = next((part for part in parts if part["type"] in _CLOSING_TYPES), None)
    if template is None:
        parts = [*parts, template := closing]
    if template["type"] == "TemplateProcessing":
        last = template["single"][-1].get("SpecialToken", {})
        if last.get("id") != end_token:
            template["single"].append({"SpecialToken": {"id": end_token, "type_id": 0}})
            template["special_tokens"][end_token] = end
    spec["post_processor"] = parts[0] if len(parts) == 1 else {"type": "Sequence", "processors": parts}
    return Tokenizer.from_str(json.dumps(spec))


_CLOSING_TYPES = {"TemplateProcessing", "BertProcessing", "RobertaProcessing"}


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, cut to ``max_tokens`` before it is closed, as the runtimes do it; a text without tokens
    becomes one padding token.
    """
    tokenizer.enable_truncation(max_tokens)
    try:
        return [encoding.ids or [PAD_ID] for encoding in tokenizer.encode_batch(list(texts))]
    finally:
        tokenizer.no_truncation()


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``."""
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), PAD_ID, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask
