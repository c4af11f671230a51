"""Rows end to end, without padding, and what all rows of a batch begin with computed once.

A batch of chats begins alike: the template's first words and the system message. In a causal model the states there
depend on nothing behind them, so one copy serves all rows; its gradient is the sum over the rows, which is what
separate copies would have given. Only attention looks at rows apart: there, and nowhere else, they are padded side by
side.

Guarantees: the same logits and gradients as padded rows have, up to rounding (:func:`packing_works` compares the two on
a model before it is trained; dropout draws other numbers). Not covered: models whose attention transformers does not
let replace, attention with soft caps, bidirectional models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IMPLEMENTATION = "slmops_packed"
"""What this module's attention is called in transformers' table."""
TOLERANCE = 1e-3
"""Largest share of a logit's own size by which packed and padded may differ; rounding stays below 1e-5."""


def shared_prefix(rows: Sequence[Sequence[int]], first_learnt: Sequence[int]) -> int:
    """Tokens that all ``rows`` begin with; the one that predicts a row's first learnt token stays the row's own."""
    if len(rows) < 2:
        return 0
    limit = max(0, min(min(first_learnt) - 1, *map(len, rows)))
    low, high = min(map(list, rows)), max(map(list, rows))  # whatever the two extremes share, all share
    for index in range(limit):
        if low[index] != high[index]:
            return index
    return limit


def pack(rows: Sequence[Sequence[int]], supervised: Sequence[Sequence[bool]]) -> dict[str, Tensor]:
    """One batch without padding.

    ``input_ids``, ``position_ids``: int64 ``[1, tokens]``. ``predict``: int64 ``[learnt]``, where in ``tokens`` each
    learnt token is predicted, and ``targets``: which it is. ``gather``: int64 ``[rows, longest]``, the place of each
    row's own tokens (0 where a row is shorter); ``scatter``: int64 ``[tokens - prefix]``, the way back.
    ``prefix``: int64 ``[]``, tokens that stand first and belong to all.
    """
    first_learnt = [next((i for i, on in enumerate(mask) if on), len(mask)) for mask in supervised]
    prefix = shared_prefix(rows, first_learnt)
    own = [len(row) - prefix for row in rows]
    longest = max(own)
    tokens, positions = list(rows[0][:prefix]), list(range(prefix))
    gather = torch.zeros(len(rows), longest, dtype=torch.int64)
    scatter: list[int] = []
    predict: list[int] = []
    targets: list[int] = []
    for index, (row, mask) in enumerate(zip(rows, supervised, strict=True)):
        start = len(tokens)
        gather[index, : own[index]] = torch.arange(start, start + own[index])
        scatter.extend(range(index * longest, index * longest + own[index]))
        tokens.extend(row[prefix:])
        positions.extend(range(prefix, len(row)))
        for place in range(max(1, prefix), len(row)):
            if mask[place]:
                predict.append(start + place - prefix - 1)
                targets.append(row[place])
    return {
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "predict": torch.tensor(predict, dtype=torch.int64),
        "targets": torch.tensor(targets, dtype=torch.int64),
        "gather": gather,
        "scatter": torch.tensor(scatter, dtype=torch.int64),
        "prefix": torch.tensor(prefix),
    }


def use_packing(model: Any) -> None:
    """Let ``model`` attend as packed rows need it. From then on it takes packed batches alone."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, packed_attention)
    _inner(model).set_attn_implementation(IMPLEMENTATION)


def stop_packing(model: Any, implementation: str = "sdpa") -> None:
    _inner(model).set_attn_implementation(implementation)


def packed_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states ``[tokens, hidden]`` of a packed batch."""
    states = (
        _inner(model)
        .base_model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            use_cache=False,
            packed_gather=batch["gather"],
            packed_scatter=batch["scatter"],
            packed_prefix=int(batch["prefix"]),
        )
        .last_hidden_state
    )
    return cast(Tensor, states[0])


def packing_works(model: Any, rows: Sequence[Sequence[int]]) -> bool:
    """Whether the model's states are the same packed and padded, tried on ``rows``; leaves the model packing if so."""
    inner = _inner(model)
    before = getattr(inner.config, "_attn_implementation", None)
    if before != "sdpa" or not hasattr(inner, "set_attn_implementation"):
        return False
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = [
                inner.base_model(input_ids=torch.tensor([list(row)], device=inner.device), use_cache=False)
                .last_hidden_state[0]
                .float()
                for row in rows
            ]
            use_packing(model)
            batch = pack(rows, [[False] * (len(row) - 1) + [True] for row in rows])
            batch = {name: tensor.to(inner.device) for name, tensor in batch.items()}
            states, prefix = packed_states(model, batch).float(), int(batch["prefix"])
            found = [states[batch["gather"][i, : len(row) - prefix]] for i, row in enumerate(rows)]
            same = all(_close(a, b[prefix:]) for a, b in zip(found, expected, strict=True))
    except (TypeError, ValueError, RuntimeError, KeyError):  # the architecture does not take what packing gives it
        same = False
    finally:
        model.train(training)
    if not same:
        stop_packing(model, before)
    return same


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    packed_gather: Tensor,
    packed_scatter: Tensor,
    packed_prefix: int,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed rows: ``query`` is ``[1, heads, tokens, size]``; the result ``[1, tokens, heads, size]``.

    Raises:
        ValueError: the model caps its attention's logits, which this does not.
    """
    if softcap is not None:
        raise ValueError("packed attention has no soft cap")
    groups = query.shape[1] // key.shape[1]
    queries, keys, values = (_side_by_side(part, packed_gather) for part in (query, key, value))
    longest = queries.shape[2]
    mask = None
    if packed_prefix:
        shape = (len(packed_gather), -1, -1, -1)
        keys = torch.cat([key[:, :, :packed_prefix].expand(*shape), keys], dim=2)
        values = torch.cat([value[:, :, :packed_prefix].expand(*shape), values], dim=2)
    if packed_prefix or (sliding_window is not None and sliding_window < longest):
        mask = _band(longest, packed_prefix, sliding_window, query.device)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    attended = F.scaled_dot_product_attention(
        queries, _repeat(keys, groups), _repeat(values, groups), attn_mask=mask, is_causal=mask is None, **options
    )
    own = attended.transpose(1, 2).flatten(0, 1).index_select(0, packed_scatter)  # [tokens - prefix, heads, size]
    if not packed_prefix:
        return own[None], None
    first = slice(0, packed_prefix)
    mask = None
    if sliding_window is not None and sliding_window < packed_prefix:
        mask = _band(packed_prefix, 0, sliding_window, query.device)
    head = F.scaled_dot_product_attention(
        query[:, :, first],
        _repeat(key[:, :, first], groups),
        _repeat(value[:, :, first], groups),
        attn_mask=mask,
        is_causal=mask is None,
        **options,
    )
    return torch.cat([head[0].transpose(0, 1), own])[None], None


def _side_by_side(tokens: Tensor, gather: Tensor) -> Tensor:
    """``[1, heads, tokens, size]`` to ``[rows, heads, longest, size]``."""
    picked = tokens[0].transpose(0, 1).index_select(0, gather.flatten())
    return picked.view(*gather.shape, *picked.shape[1:]).transpose(1, 2)


def _band(queries: int, prefix: int, window: int | None, device: torch.device) -> Tensor:
    """Who sees whom, bool ``[queries, prefix + queries]``. Slots behind a row's end see what nobody reads."""
    here = torch.arange(prefix, prefix + queries, device=device)[:, None]
    there = torch.arange(prefix + queries, device=device)[None]
    seen = there <= here
    return seen if window is None else seen & (there > here - window)


def _repeat(tensor: Tensor, groups: int) -> Tensor:
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max().clamp(min=1e-6))


def _inner(model: Any) -> Any:
    """The transformers model inside an adapter's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
