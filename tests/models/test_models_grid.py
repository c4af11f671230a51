"""Grids: the arithmetic of few bits against onnxruntime's own, and a grid found again on what lies on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slmops.models.grid import Grid, OnGrid, blocks_of, nearest, on_grid

GRIDS = [Grid(bits, block, symmetric) for bits in (4, 8) for block in (16, 32, 128) for symmetric in (True, False)]


def matrix(rows: int = 24, width: int = 128, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("grid", GRIDS)
def test_hardly_a_number_moves_further_than_half_a_step(grid: Grid) -> None:
    found = nearest(matrix(), grid)
    moved = blocks_of(found.wide() - matrix(), grid.block_size).abs()
    steps = found.scales.abs()[..., None]
    # The outermost numbers may lie beyond the last code: zeros are codes, and scales have half precision.
    assert bool((moved <= steps * 1.1 + 1e-6).all())
    assert float((moved <= steps * 0.55).float().mean()) > 0.98


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_rounding_is_onnxruntimes(bits: int) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=True, bits=bits)
    weight = matrix()
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(weight.T.numpy()))
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(24, 4, 32)
    ours = nearest(weight, Grid(bits))
    assert np.allclose(ours.scales.numpy(), scales, rtol=2e-3)  # ours has half precision
    assert (np.abs(ours.codes.numpy().astype(int) - codes.astype(int)) <= 1).all()
    assert (ours.codes.numpy() == codes).mean() > 0.95


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.symmetric])
def test_what_lies_on_a_symmetric_grid_is_found_on_it_again(grid: Grid) -> None:
    first = nearest(matrix(), grid)
    again = nearest(first.wide(), grid)
    assert torch.equal(first.scales, again.scales)
    assert torch.equal(first.codes, again.codes)


def test_a_width_that_blocks_do_not_divide_is_filled_up() -> None:
    weight = matrix(width=40)
    found = nearest(weight, Grid())
    assert found.codes.shape == (24, 2, 32)
    assert found.wide().shape == weight.shape
    assert float((found.wide() - weight).abs().max()) < 0.05


def test_zeros_stay_zeros() -> None:
    assert not nearest(torch.zeros(3, 64), Grid()).wide().any()
    assert not nearest(torch.full((3, 64), 1e-9), Grid(symmetric=False)).wide().abs().max() > 1e-7


def test_bytes_are_those_of_codes_scales_and_zeros() -> None:
    assert Grid(4, 32).bytes_of(10, 64) == 10 * 2 * (16 + 2)
    assert Grid(4, 32, symmetric=False).bytes_of(10, 96) == 10 * 3 * (16 + 2) + 10 * 2
    assert Grid(8, 16).bytes_of(1, 16) == 18


def test_gradients_pass_straight_through() -> None:
    weight = matrix().requires_grad_()
    used = OnGrid(Grid())(weight)
    assert torch.allclose(used, on_grid(weight.detach(), Grid()), atol=1e-6)
    (used * 3).sum().backward()
    assert torch.equal(weight.grad, torch.full_like(weight, 3))
