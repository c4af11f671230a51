"""Which matrices get more bits under a size limit.

What a matrix costs in few bits is measured: the graph runs with that one matrix rounded and all others as they are, and
its answers on rows of the task are compared with those of the whole graph (Kullback-Leibler divergence at the answers'
tokens; as in "HAWQ", Dong et al. 2019, and llama.cpp's mixtures, but by outputs instead of curvature or position).
Which get more bits is then a matter of numbers alone: :func:`share_out`. That costs add up is assumed, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from slmops.compress.quantize.graph import Matrix
from slmops.compress.quantize.statistics import TokenRow, beside, feeds_of
from slmops.errors import ConversionError


@dataclass(frozen=True)
class Choice:
    """A matrix in few bits and in more: bytes of each, and what few bits cost (nats a token)."""

    name: str
    few_bytes: int
    more_bytes: int
    harm: float


def share_out(choices: Sequence[Choice], limit_bytes: int) -> frozenset[str]:
    """Names of the matrices that get more bits: those that save most for each further byte, as long as all fit.

    Raises:
        ConversionError: few bits alone are above the limit.
    """
    left = limit_bytes - sum(choice.few_bytes for choice in choices)
    if left < 0:
        raise ConversionError(
            f"compress.quantize wants {limit_bytes / 1e6:.1f} MB, and all in few bits takes "
            f"{(limit_bytes - left) / 1e6:.1f} MB.",
            remedy="Raise size_mb, take larger blocks (block_size), or prune first (compress.prune).",
        )
    chosen = set()
    for choice in sorted(choices, key=lambda one: -one.harm / max(1, one.more_bytes - one.few_bytes)):
        further = choice.more_bytes - choice.few_bytes
        if choice.harm > 0 and further <= left:
            chosen.add(choice.name)
            left -= further
    return frozenset(chosen)


def harms(
    folder: Path,
    matrices: Sequence[Matrix],
    rounded: Callable[[Matrix], Tensor],
    rows: Sequence[TokenRow],
    head_size: int,
    progress: Callable[[int], None],
) -> Mapping[str, float]:
    """What each of ``matrices`` costs when it alone is ``rounded`` (``[rows, width]``), in nats a token. The graph in
    ``folder`` must be in fp32; ``progress`` hears how many are done."""
    found = {}
    with beside(folder, overridable=[matrix.name for matrix in matrices]) as (session, graph):
        feeds = [feeds_of(graph, row.ids, head_size) for row in rows]
        whole = [_log_probabilities(session, one, row) for one, row in zip(feeds, rows, strict=True)]
        for number, matrix in enumerate(matrices):
            wide = rounded(matrix)
            value = (wide.T if matrix.transposed else wide).contiguous().numpy()
            changed = [
                _log_probabilities(session, {**one, matrix.name: value}, row)
                for one, row in zip(feeds, rows, strict=True)
            ]
            found[matrix.name] = float(
                np.mean(np.concatenate([_divergence(*both) for both in zip(whole, changed, strict=True)]))
            )
            progress(number + 1)
    return found


def _log_probabilities(session: object, feeds: Mapping[str, object], row: TokenRow) -> NDArray[np.float32]:
    (logits,) = session.run(["logits"], dict(feeds))  # type: ignore[attr-defined]
    values: NDArray[np.float32] = logits[0][row.predicts]
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))  # type: ignore[no-any-return]


def _divergence(whole: NDArray[np.float32], changed: NDArray[np.float32]) -> NDArray[np.float32]:
    divergence: NDArray[np.float32] = (np.exp(whole) * (whole - changed)).sum(axis=-1)
    return divergence
