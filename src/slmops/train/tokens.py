"""Texts to padded tensors, for classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import Sequence as Sequential
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from slmops.errors import ModelError

PAD_ID = 0
"""Padding is masked, so any id will do."""


def load_tokenizer(folder: Path) -> Tokenizer:
    """The fast tokenizer of a model folder.

    Raises:
        ModelError: there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no tokenizer.json.", remedy="Save the model with its fast tokenizer.")
    return Tokenizer.from_file(str(path))


def with_end_token(tokenizer: Tokenizer, end_token: str) -> Tokenizer:
    """A copy that closes every text with ``end_token``: in a causal model that position has read the whole text.

    It becomes part of ``tokenizer.json``, so training and every runtime encode alike.
    """
    closing: Tokenizer = Tokenizer.from_str(tokenizer.to_str())
    end_id = closing.token_to_id(end_token)
    template = TemplateProcessing(single=f"$A {end_token}", special_tokens=[(end_token, end_id)])
    before = closing.post_processor
    closing.post_processor = template if before is None else Sequential([before, template])
    return closing


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each text, cut to ``max_tokens``; a text without tokens becomes one padding token."""
    return [encoding.ids[:max_tokens] or [PAD_ID] for encoding in tokenizer.encode_batch(list(texts))]


def pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask``, int64 ``[rows, longest]``."""
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), PAD_ID, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = torch.tensor(sequence)
        attention_mask[row, : len(sequence)] = 1
    return input_ids, attention_mask
