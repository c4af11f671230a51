"""Where a grid lies on a matrix, from the matrix alone or weighed by what is multiplied with it.

* ``rtn``: the grid spans each block's range.
* ``k_quant``: many scales are tried and each is fitted to the codes that it leads to, by weighted least squares; after
  llama.cpp's k-quants. onnxruntime has a function of that name for blocks with a zero: it judges scales before the zero
  is rounded to a code and knows neither symmetric grids nor weights of a user; the tests compare the two.
* ``hqq``: half-quadratic quantization (Badri and Shaji 2023), by onnxruntime's own code. It leaves the scales as they
  are and moves the zeros between codes, which only the slower kernels take; rounded to a code nothing of it would be
  left.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from slmops.models.grid import Grid, Quantized, blocks_of, codes_of, half, nearest, range_scales, symmetric_scales

SHRINK = (-0.05, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
"""Shares by which the range that a grid spans is narrowed (or widened, below 0)."""
FITS = 2
"""How often the best scale is fitted to the codes that it leads to."""
CHUNK_NUMBERS = 1 << 17
"""So many numbers of a matrix are worked on at once."""


def k_quant(matrix: Tensor, grid: Grid, importance: Tensor | None = None) -> Quantized:
    """``matrix`` ``[rows, width]`` on the grid whose weighted squared error is the least of those tried.

    ``importance``: ``[width]``, how much an error in a column counts, for example the mean square of what is multiplied
    with it; None: large numbers count more, as in llama.cpp without a matrix of importances.
    """
    weights = None if importance is None else blocks_of(importance[None].float(), grid.block_size)
    parts = []
    for rows in torch.split(matrix, max(1, CHUNK_NUMBERS // matrix.shape[1])):
        blocks = blocks_of(rows.float(), grid.block_size)
        # Blocks of columns that nothing goes through (all weights 0) are judged by the numbers alone.
        own = blocks.square().mean(-1, keepdim=True).sqrt() + blocks.abs()
        parts.append(_best(blocks, own if weights is None else own * (weights + 1e-9 * weights.mean()), grid))
    scales, zeros = (torch.cat(column) for column in zip(*parts, strict=True))
    return nearest(matrix.float(), grid, scales, zeros)


def _best(blocks: Tensor, weights: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros of ``blocks`` ``[rows, blocks, block_size]``."""
    if grid.symmetric:
        spans, start_zeros = symmetric_scales(blocks, grid), None
    else:
        spans, start_zeros = range_scales(blocks, grid)
    found = _Found(blocks, weights, grid, spans)
    for share in SHRINK:
        scales = half(spans * (1 - share))
        found.judge(scales, found.zeros if start_zeros is None else _zeros(blocks, scales, grid))
    for _ in range(FITS):
        found.judge(found.fitted(), found.zeros)
    return found.scales, found.zeros


class _Found:
    """The best scales and zeros so far, block by block."""

    def __init__(self, blocks: Tensor, weights: Tensor, grid: Grid, scales: Tensor) -> None:
        self._blocks, self._weights, self._grid = blocks, weights, grid
        self._least = torch.full_like(scales, float("inf"))
        self.scales = scales
        self.zeros = torch.full_like(scales, grid.middle)

    def judge(self, scales: Tensor, zeros: Tensor) -> None:
        rounded = codes_of(self._blocks, scales, zeros, self._grid).sub_(zeros[..., None]).mul_(scales[..., None])
        error = rounded.sub_(self._blocks).square_().mul_(self._weights).sum(-1)
        better = error < self._least
        self._least = torch.where(better, error, self._least)
        self.scales = torch.where(better, scales, self.scales)
        self.zeros = torch.where(better, zeros, self.zeros)

    def fitted(self) -> Tensor:
        """Scales that the codes at hand fit best, by weighted least squares."""
        centred = codes_of(self._blocks, self.scales, self.zeros, self._grid).sub_(self.zeros[..., None])
        weighted = centred * self._weights
        squares = (weighted * centred).sum(-1)
        return half(torch.where(squares > 0, (weighted * self._blocks).sum(-1) / squares, self.scales))


def _zeros(blocks: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The code of zero that puts a narrowed range's middle where the block's middle is."""
    middle = (blocks.amin(-1).clamp(max=0) + blocks.amax(-1).clamp(min=0)) / 2
    return ((grid.levels - 1) / 2 - middle / scales).round().clamp(0, grid.levels - 1)


def hqq(matrix: Tensor, grid: Grid) -> Quantized:
    """``matrix`` on the grid of half-quadratic quantization: zeros between codes, never symmetric."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer as library

        config = library.HQQWeightOnlyQuantConfig(block_size=grid.block_size, bits=grid.bits)
        quantizer = library.HQQWeightOnlyQuantizer(config)
        padded = blocks_of(matrix.float(), grid.block_size).flatten(1)
        _, scales, zeros = quantizer.quantize_internal(
            padded, bits=grid.bits, group_size=grid.block_size, optimize=True, round_zero=False, axis=1
        )
    finally:
        logging.disable(disabled)
    scales, zeros = half(scales.float()), zeros.half().float()
    blocks = blocks_of(matrix.float(), grid.block_size)
    codes = (blocks / scales[..., None] + zeros[..., None]).round().clamp(0, grid.levels - 1)
    return Quantized(grid, codes.to(torch.uint8), scales, zeros, matrix.shape[1])


def importance_of(gram: Tensor) -> Tensor:
    """How much each input counts: the diagonal of ``XᵀX``, ``[width]``."""
    return gram.diagonal().clamp(min=0)
