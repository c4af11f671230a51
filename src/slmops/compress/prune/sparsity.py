"""Weights that become zero: by size, by size and input (Wanda), or with the others making up for them (SparseGPT).

Layers are done in order, each on the inputs that it gets from those already done. Embeddings and output layer stay.

What it is good for: the zeros compress (a file, a download), and hardware that skips them may be faster. The engines
that slmops exports for multiply by zeros like by other numbers; the benchmark ``pruning`` times it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slmops.compress.prune.calibration import CalibrationBatch
from slmops.compress.prune.stream import Stream, inputs_of
from slmops.compress.prune.subject import Subject
from slmops.errors import ModelError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import SparsityConfig

NOTE = (
    "The engines here compute zeros like other numbers: neither time nor memory falls, "
    "only what a compressed file takes."
)
BLOCK = 128
DAMPING = 0.01
"""Added to the diagonal of the inputs' squares, as a share of its mean."""
GROUP, ZEROS = 4, 2


def sparsify(
    subject: Subject,
    batches: Sequence[CalibrationBatch],
    config: SparsityConfig,
    *,
    progress: ProgressSink = ignore,
) -> float:
    """Put zeros into the matrices of all layers of ``subject``, in place; the share of them that is zero.

    Raises:
        ModelError: ``2:4`` where a matrix has a number of inputs that is no multiple of four.
    """
    if config.pattern == "2:4":
        _check_groups(subject)
    stream = Stream(subject, batches)
    states = stream.first
    zeros = total = 0
    for number in range(len(subject.layers)):
        named = dict(subject.matrices(number))
        squares = {} if config.method == "magnitude" else _squares(stream, states, number, named, config)
        for name, module in named.items():
            module.weight.data.copy_(_sparse(module.weight.detach(), squares.get(name), config))
            zeros += int((module.weight == 0).sum())
            total += module.weight.numel()
        states = stream.step(states, number)
        progress(Progress("prune weights", number + 1, len(subject.layers), "layers"))
    return zeros / total


def lowest(scores: Tensor, share: float, pattern: str) -> Tensor:
    """Which of ``scores`` ``[outputs, inputs]`` go: of each output, or of each four inputs of it, the lowest."""
    if pattern == "2:4":
        groups = scores.view(len(scores), -1, GROUP)
        order = groups.argsort(dim=-1, stable=True)
        gone = torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., :ZEROS], True)
        return gone.flatten(1)
    count = int(share * scores.shape[1])
    order = scores.argsort(dim=1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, order[:, :count], True)


def wanda(weight: Tensor, norms: Tensor, share: float, pattern: str) -> Tensor:
    """``weight`` ``[outputs, inputs]`` without those of least size times the norm of their input, output by output.

    Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv:2306.11695.
    """
    return weight.masked_fill(lowest(weight.abs() * norms, share, pattern), 0.0)


def sparsegpt(weight: Tensor, squares: Tensor, share: float, pattern: str, *, block: int = BLOCK) -> Tensor:
    """``weight`` ``[outputs, inputs]`` with zeros, the others changed so that the outputs stay near.

    ``squares``: the sum of the outer products of the inputs with themselves, ``[inputs, inputs]``. Column by column,
    the error of what was set to zero goes into the columns behind. Which go is decided a block of columns at a time
    (four columns at a time for ``2:4``).
    Frantar and Alistarh, "SparseGPT", arXiv:2301.00774.
    """
    weight, squares = weight.double().clone(), squares.double().clone()
    inputs = weight.shape[1]
    dead = squares.diagonal() == 0
    squares.diagonal()[dead] = 1
    weight[:, dead] = 0
    squares.diagonal().add_(DAMPING * squares.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(squares)), upper=True)
    for start in range(0, inputs, block):
        end = min(start + block, inputs)
        part, own = weight[:, start:end], inverse[start:end, start:end]
        errors = torch.zeros_like(part)
        gone = torch.zeros_like(part, dtype=torch.bool)
        if pattern == "free":
            scores = (part / own.diagonal()).square()
            gone = _lowest_of_all(scores, share)
        for column in range(end - start):
            if pattern == "2:4" and column % GROUP == 0:
                four = slice(column, column + GROUP)
                gone[:, four] = lowest((part[:, four] / own.diagonal()[four]).square(), 0.5, pattern)
            errors[:, column] = part[:, column].masked_fill(~gone[:, column], 0.0) / own[column, column]
            part[:, column:] -= errors[:, column, None] * own[column, column:]
            part[:, column].masked_fill_(gone[:, column], 0.0)
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return weight.float()


def _lowest_of_all(scores: Tensor, share: float) -> Tensor:
    count = int(share * scores.numel())
    order = scores.flatten().argsort(stable=True)
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, order[:count], True).view_as(scores)


def _sparse(weight: Tensor, squares: Tensor | None, config: SparsityConfig) -> Tensor:
    if squares is None:
        return wanda(weight, torch.ones(weight.shape[1]), config.share, config.pattern)
    if config.method == "wanda":
        return wanda(weight, squares.sqrt(), config.share, config.pattern)
    return sparsegpt(weight, squares, config.share, config.pattern)


def _squares(
    stream: Stream, states: list[Tensor], number: int, named: dict[str, nn.Linear], config: SparsityConfig
) -> dict[str, Tensor]:
    """Of the inputs of each matrix: summed squares ``[inputs]`` for Wanda, summed outer products for SparseGPT."""
    outer = config.method == "sparsegpt"
    sums: dict[str, Tensor] = {}
    seen: dict[str, list[Tensor]] = {name: [] for name in named}
    with _all_inputs(named, seen):
        stream.step(states, number)
    for name, inputs in seen.items():
        for values, batch in zip(inputs, stream.batches, strict=True):
            real = values[batch.attention_mask.bool()]
            found: Any = real.T @ real if outer else real.square().sum(dim=0)
            sums[name] = sums[name] + found if name in sums else found
    return sums


def _all_inputs(named: dict[str, nn.Linear], seen: dict[str, list[Tensor]]) -> Any:
    from contextlib import ExitStack

    stack = ExitStack()
    for name, module in named.items():
        stack.enter_context(inputs_of([module], seen[name]))
    return stack


def _check_groups(subject: Subject) -> None:
    for number in range(len(subject.layers)):
        for name, module in subject.matrices(number):
            if module.in_features % GROUP:
                raise ModelError(
                    f"compress.prune.sparsity.pattern is 2:4, and {name} of layer {number} has {module.in_features} "
                    "inputs, which is no multiple of 4.",
                    remedy="Set pattern: free.",
                )
