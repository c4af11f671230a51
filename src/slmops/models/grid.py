"""Few-bit grids: what a matrix can be when every block of a row has one scale.

A matrix ``[rows, width]`` is cut along its rows' width into blocks of ``block_size`` numbers (the last one is filled up
with zeros); a block's numbers are ``(code - zero) * scale``, with codes from 0 to ``2**bits - 1``. Symmetric grids have
the zero in the middle, the others one that each block chooses among the codes. Scales are kept in half precision, so
every scale here is a number that half precision has. This is what onnxruntime's ``MatMulNBits`` and
``GatherBlockQuantized`` read.

Guarantees: a matrix that lies on a symmetric grid is found on it again by :func:`symmetric_scales` and :func:`nearest`,
code by code, as long as each block uses its outermost code (:func:`on_grid` makes such matrices). Training on a grid
(``slmops.train``) and export (``slmops.compress``) rely on that. Nothing here reads activations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 2.0**-24
"""Of half precision. A block whose scale would be smaller is zero."""


@dataclass(frozen=True)
class Grid:
    """``bits``: 4 or 8. ``block_size``: numbers to a scale, 16 at least and a power of two."""

    bits: int = 4
    block_size: int = 32
    symmetric: bool = True

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The code of zero on a symmetric grid."""
        return self.levels // 2

    def bytes_of(self, rows: int, width: int) -> int:
        """Of codes, scales in half precision and zeros."""
        blocks = -(-width // self.block_size)
        zeros = 0 if self.symmetric else rows * -(-blocks * self.bits // 8)
        return rows * blocks * (self.block_size * self.bits // 8 + 2) + zeros


@dataclass(frozen=True)
class Quantized:
    """A matrix on a grid. ``codes`` uint8 ``[rows, blocks, block_size]``; ``scales`` fp32 and ``zeros`` uint8 (or fp32:
    between two codes, in half precision) ``[rows, blocks]``. ``width``: of the matrix, without what the last block was
    filled up with."""

    grid: Grid
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    width: int

    @property
    def between(self) -> bool:
        """Whether zeros lie between codes. Only the slower of onnxruntime's kernels take that."""
        return self.zeros.is_floating_point()

    @property
    def size_bytes(self) -> int:
        if self.between:
            return replace(self.grid, symmetric=True).bytes_of(self.codes.shape[0], self.width) + 2 * self.zeros.numel()
        return self.grid.bytes_of(self.codes.shape[0], self.width)

    def wide(self) -> Tensor:
        """The matrix in fp32, ``[rows, width]``."""
        centred = self.codes.float() - self.zeros.float()[..., None]
        return (centred * self.scales[..., None]).flatten(1)[:, : self.width]


def blocks_of(matrix: Tensor, block_size: int) -> Tensor:
    """``[rows, width]`` as ``[rows, blocks, block_size]``, zeros after the end of a row."""
    missing = -matrix.shape[1] % block_size
    padded = nn.functional.pad(matrix, (0, missing))
    return padded.reshape(len(matrix), -1, block_size)


def symmetric_scales(blocks: Tensor, grid: Grid) -> Tensor:
    """The scale at which each block's outermost number is the lowest code; it may be negative. ``[rows, blocks]``."""
    outermost = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    return half(outermost / -grid.middle)


def range_scales(blocks: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and zeros at which each block's lowest number and highest number (and 0) are the outermost codes."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    scales = half((high - low) / (grid.levels - 1))
    return scales, (-low / scales).round().clamp(0, grid.levels - 1)


def half(scales: Tensor) -> Tensor:
    """Rounded to half precision; 1 where nothing would be left."""
    rounded = scales.half().float()
    return torch.where(rounded.abs() < SMALLEST_SCALE, torch.ones_like(rounded), rounded)


def codes_of(blocks: Tensor, scales: Tensor, zeros: Tensor, grid: Grid) -> Tensor:
    """The nearest codes, as fp32."""
    return (blocks / scales[..., None]).round().add(zeros[..., None]).clamp(0, grid.levels - 1)


def nearest(matrix: Tensor, grid: Grid, scales: Tensor | None = None, zeros: Tensor | None = None) -> Quantized:
    """``matrix`` rounded to the nearest codes; scales (and zeros) are those of the blocks' ranges where not given."""
    blocks = blocks_of(matrix, grid.block_size)
    if scales is None:
        if grid.symmetric:
            scales = symmetric_scales(blocks, grid)
        else:
            scales, zeros = range_scales(blocks, grid)
    if zeros is None:
        zeros = torch.full_like(scales, grid.middle)
    codes = codes_of(blocks, scales, zeros, grid)
    return Quantized(grid, codes.to(torch.uint8), scales, zeros.to(torch.uint8), matrix.shape[1])


def on_grid(matrix: Tensor, grid: Grid) -> Tensor:
    """``matrix`` rounded to the nearest codes, in fp32."""
    return nearest(matrix, grid).wide()


class OnGrid(nn.Module):
    """A parametrization (``torch.nn.utils.parametrize``): the weight that is used is on the grid, and gradients pass to
    the one that is kept as if it were not (straight through; Bengio et al. 2013, arXiv:1308.3432)."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            moved = on_grid(weight.float(), self.grid).to(weight.dtype) - weight
        return weight + moved
