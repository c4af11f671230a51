"""Algorithms of few bits, each against a plain slow reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from slmops.compress.quantize.awq import factors
from slmops.compress.quantize.gptq import gptq, output_error
from slmops.compress.quantize.rounding import hqq, importance_of, k_quant
from slmops.compress.quantize.sensitivity import Choice, share_out
from slmops.errors import ConversionError
from slmops.models.grid import Grid, nearest

GRIDS = [Grid(4, 32), Grid(4, 32, symmetric=False), Grid(8, 32), Grid(4, 16)]


def matrix(rows: int = 24, width: int = 128) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) * 0.05


def inputs(tokens: int = 400, width: int = 128) -> torch.Tensor:
    """Correlated, and a few channels much larger than the rest, as in language models."""
    generator = torch.Generator().manual_seed(4)
    mixed = (
        torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator) / width**0.5
    )
    mixed[:, ::17] *= 12
    return mixed


GRAM = inputs().T @ inputs() / 400


def lost(weight: torch.Tensor, rounded: torch.Tensor, weights: torch.Tensor | float = 1.0) -> float:
    return float(((rounded - weight).square() * weights).sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_searched_scales_lose_less_than_the_range(grid: Grid) -> None:
    weight, importance = matrix(), importance_of(GRAM)
    assert lost(weight, k_quant(weight, grid).wide()) < lost(weight, nearest(weight, grid).wide())
    heard = k_quant(weight, grid, importance).wide()
    assert lost(weight, heard, importance) < lost(weight, k_quant(weight, grid).wide(), importance)


def test_k_quant_is_near_the_best_of_a_slow_search() -> None:
    """Every scale of a fine comb, block by block."""
    weight, grid = matrix(4, 32), Grid()
    own = weight.square().mean(-1, keepdim=True).sqrt() + weight.abs()
    ours = ((k_quant(weight, grid).wide() - weight).square() * own).sum(-1)
    best = torch.full((4,), float("inf"))
    for size, sign in itertools.product(np.linspace(0.5, 1.2, 400), (1, -1)):
        scales = weight.abs().amax(-1, keepdim=True) / 8 * float(size) * sign
        best = torch.minimum(best, ((nearest(weight, grid, scales).wide() - weight).square() * own).sum(-1))
    assert float((ours / best).mean()) < 1.15


def test_k_quant_loses_no_more_than_onnxruntimes() -> None:
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    weight = matrix()
    codes, scale, zero = quant_tensor_k_quant_cpu(weight.numpy().copy(), 4, 32)
    library = torch.from_numpy(((codes - zero) * scale).reshape(24, 128)).float()
    assert lost(weight, k_quant(weight, Grid(symmetric=False)).wide()) < 1.05 * lost(weight, library)


def test_hqq_has_a_zero_that_is_a_code_and_loses_less_than_the_range() -> None:
    weight, grid = matrix(), Grid(symmetric=False)
    weight[:, ::31] *= 5  # what half-quadratic rounding is for: outliers in a block
    found = hqq(weight, grid)
    assert int(found.zeros.max()) <= 15
    moved, plain = (found.wide() - weight).abs(), (nearest(weight, grid).wide() - weight).abs()
    assert float(moved.sqrt().sum()) < float(plain.sqrt().sum())


@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_is_the_surgeon_column_by_column(grid: Grid) -> None:
    """Optimal brain quantization in double precision: the inverse is made anew after each column."""
    weight = matrix(6, 64)
    gram = GRAM[:64, :64]
    ours = gptq(weight, gram, grid)
    start = k_quant(weight, grid, importance_of(gram))
    damped = gram.double() + 0.01 * gram.diagonal().double().mean() * torch.eye(64, dtype=torch.float64)
    left = gram.diagonal().argsort(descending=True).tolist()
    slow, rounded = weight.double().clone(), torch.empty(6, 64, dtype=torch.float64)
    while left:
        inverse = torch.linalg.inv(damped[left][:, left])
        column = left[0]
        scale = start.scales[:, column // grid.block_size].double()
        zero = start.zeros[:, column // grid.block_size].double()
        code = ((slow[:, column] / scale).round() + zero).clamp(0, grid.levels - 1)
        rounded[:, column] = (code - zero) * scale
        error = (slow[:, column] - rounded[:, column]) / inverse[0, 0]
        slow[:, left] -= error[:, None] * inverse[0][None]
        left = left[1:]
    same = (ours.wide().double() - rounded).abs() < 1e-4 * rounded.abs().max()
    assert float(same.double().mean()) > 0.97  # a tie may fall the other way in single precision
    assert output_error(weight, ours.wide(), gram) == pytest.approx(
        output_error(weight, rounded.float(), gram), rel=0.02
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_gptq_changes_the_products_less_than_rounding(grid: Grid) -> None:
    weight = matrix()
    ours = output_error(weight, gptq(weight, GRAM, grid).wide(), GRAM)
    assert ours < 0.7 * output_error(weight, nearest(weight, grid).wide(), GRAM)


def test_inputs_that_nothing_goes_through_do_no_harm() -> None:
    gram = GRAM.clone()
    gram[:32] = 0
    gram[:, :32] = 0
    found = gptq(matrix(), gram, Grid()).wide()
    assert bool(found.isfinite().all())
    assert float((found - matrix())[:, :32].abs().max()) < 0.05
    assert bool(gptq(matrix(), torch.zeros(128, 128), Grid()).wide().isfinite().all())


def test_awq_factors_change_the_products_less() -> None:
    weight, grid = matrix(), Grid()
    found, power = factors([weight], GRAM, grid, k_quant)
    assert 0 < power < 1
    scaled = k_quant(weight * found, grid, importance_of(GRAM) / found.square()).wide() / found
    assert output_error(weight, scaled, GRAM) < output_error(
        weight, k_quant(weight, grid, importance_of(GRAM)).wide(), GRAM
    )
    even, power = factors([weight], torch.eye(128), grid, k_quant)
    assert (power, float(even.std())) == (0.0, 0.0)  # nothing stands out: left as it is


def test_more_bits_go_where_a_byte_saves_most() -> None:
    choices = [Choice("a", 10, 20, 1.0), Choice("b", 10, 20, 3.0), Choice("c", 40, 80, 8.0), Choice("d", 10, 20, -0.1)]
    assert share_out(choices, 70) == frozenset()
    assert share_out(choices, 80) == {"b"}
    assert share_out(choices, 95) == {"b", "a"}
    assert share_out(choices, 1000) == {"a", "b", "c"}


def test_no_choice_is_above_the_limit_and_a_limit_too_low_is_refused() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        few = random.integers(1, 100, 8)
        choices = [Choice(str(i), int(b), int(2 * b), float(random.random())) for i, b in enumerate(few)]
        limit = int(few.sum() * random.uniform(1, 2.2))
        chosen = share_out(choices, limit)
        assert sum(c.more_bytes if c.name in chosen else c.few_bytes for c in choices) <= limit
    with pytest.raises(ConversionError, match=r"wants 0\.0 MB, and all in few bits takes 0\.1 MB.*size_mb"):
        share_out([Choice("a", 90_000, 180_000, 1.0)], 10_000)
