"""A causal language model that tells, for every token of a text, what it thinks could have stood there.

Guarantees: probabilities are those of the whole vocabulary, softened by the temperature asked for; logits exist for at
most :data:`CHUNK_LOGITS` at once, and nowhere but at the positions asked for; nothing is fetched or sent.
In bf16 the layers multiply (several times faster where a machine has it, and 2e-4 nats from fp32, measured with a
model of 135 M parameters); logits and the sums over the vocabulary stay in fp32: a logit of 20 would be rounded by up
to 0.06.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slmops.chat import ChatTokenizer, tokenizer_digest
from slmops.models.quiet import quiet_transformers
from slmops.models.scaled_logits import scaled_logits

CHUNK_LOGITS = 1 << 24
"""64 MB in fp32."""
BATCH_TOKENS = 4096
TRIAL_TOKENS = 512


@dataclass(frozen=True)
class TopTokens:
    """One row a position: ``ids`` and ``logs`` ``[positions, k]``, likeliest first; ``tail``, ``next`` ``[positions]``.

    Natural logarithms, float32. ``tail``: of the mass of all other tokens; ``next``: of the token that really came.
    """

    ids: NDArray[np.int64]
    logs: NDArray[np.float32]
    tail: NDArray[np.float32]
    next: NDArray[np.float32]


class TokenTeacher:
    """Opened from a folder in the layout of transformers. ``precision`` auto: the faster one, by the first texts."""

    def __init__(self, folder: Path, *, precision: Literal["auto", "fp32", "bf16"] = "fp32") -> None:
        import torch
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        self.tokenizer = ChatTokenizer.load(folder)
        self.tokenizer_digest = tokenizer_digest(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = precision
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        self._model.eval().to(device)
        self.vocabulary: int = self._model.get_output_embeddings().weight.shape[0]

    def top(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], top_k: int, temperature: float
    ) -> list[TopTokens]:
        """For each of ``sequences`` (ids) the distributions of its tokens at the places ``wanted`` (1 and more)."""
        if self.precision == "auto" and sequences:
            self.precision = self._faster(sequences[0])
        found: list[TopTokens | None] = [None] * len(sequences)
        for rows in _batches([len(sequence) for sequence in sequences]):
            answers = self._batch([sequences[row] for row in rows], [wanted[row] for row in rows], top_k, temperature)
            for row, answer in zip(rows, answers, strict=True):
                found[row] = answer
        return [answer for answer in found if answer is not None]

    def close(self) -> None:
        """Free the weights."""
        self._model = None

    def _batch(
        self, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], top_k: int, temperature: float
    ) -> list[TopTokens]:
        import torch

        device = self._model.device
        longest = max(map(len, sequences))
        ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            mask[row, : len(sequence)] = 1
        places = torch.tensor([(row, at) for row, columns in enumerate(wanted) for at in columns])
        states = self._states(ids.to(device), mask.to(device), self.precision)
        chosen = states[places[:, 0].to(device), places[:, 1].to(device) - 1].float()
        coming = ids[places[:, 0], places[:, 1]].to(device)
        each = max(1, CHUNK_LOGITS // self.vocabulary)
        with torch.inference_mode():
            pieces = [
                self._reduce(chosen[at : at + each], coming[at : at + each], top_k, temperature)
                for at in range(0, len(chosen), each)
            ]
        whole = [np.concatenate([piece[part] for piece in pieces]) for part in range(4)]
        ends = np.cumsum([len(columns) for columns in wanted])[:-1]
        return [TopTokens(*parts) for parts in zip(*(np.split(part, ends) for part in whole), strict=True)]

    def _states(self, ids: Any, mask: Any, precision: str) -> Any:
        """The last hidden states, ``[rows, tokens, hidden]``."""
        import torch

        lower = torch.autocast(self._model.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        with torch.inference_mode(), lower:
            return self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def _faster(self, sequence: Sequence[int]) -> Literal["fp32", "bf16"]:
        import torch

        rows = max(1, TRIAL_TOKENS // len(sequence))
        ids = torch.tensor([list(sequence)] * rows, device=self._model.device)
        seconds = {}
        for precision in ("fp32", "bf16", "fp32", "bf16"):  # the first of each warms up
            started = time.perf_counter()
            self._states(ids, torch.ones_like(ids), precision).sum().item()
            seconds[precision] = time.perf_counter() - started
        return "bf16" if seconds["bf16"] < seconds["fp32"] else "fp32"

    def _reduce(self, states: Any, coming: Any, top_k: int, temperature: float) -> tuple[NDArray[Any], ...]:
        import torch

        logits = scaled_logits(self._model.get_output_embeddings()(states), self._model.config).float()
        if temperature != 1:
            logits /= temperature
        whole = logits.logsumexp(dim=-1, keepdim=True)
        following = logits.gather(-1, coming[:, None]) - whole
        best = logits.topk(top_k, dim=-1)
        rest = logits.scatter_(-1, best.indices, -torch.inf).logsumexp(dim=-1, keepdim=True) - whole
        parts = (best.indices, best.values - whole, rest[:, 0], following[:, 0])
        return tuple(part.cpu().numpy() for part in parts)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Rows of like length together, at most :data:`BATCH_TOKENS` padded tokens each."""
    batches: list[list[int]] = [[]]
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches[-1] and lengths[row] * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return [batch for batch in batches if batch]
