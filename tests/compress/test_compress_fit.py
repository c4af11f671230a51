"""The decisions of the search for the smallest student, against plain brute force."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from slmops.compress.fit import (
    ETA,
    Point,
    bytes_at_least,
    candidates,
    efforts,
    fewest_bits,
    fronts,
    layer_parameters,
    promoted,
    seats,
    values_of,
    with_effort,
)
from slmops.recipe import CompressConfig, Range


def points(count: int, seed: int) -> list[Point]:
    rng = random.Random(seed)
    return [
        Point(str(number), rng.randrange(8) / 8, (float(rng.randrange(6)), float(rng.randrange(6))))
        for number in range(count)
    ]


def test_every_combination_or_a_repeatable_draw() -> None:
    space = {"student.layers": (1, 2, 4), "train.epochs": Range(low=1, high=9, step=4), "student.vocabulary": ("trim",)}
    whole = candidates(space, 20, seed=0)
    assert [tuple(one.values()) for one in whole] == list(itertools.product((1, 2, 4), (1, 5, 9), ("trim",)))
    assert all(list(one) == list(space) for one in whole)
    some = candidates(space, 4, seed=3)
    assert some == candidates(space, 4, seed=3) != candidates(space, 4, seed=4)
    assert len(some) == 4
    assert all(one in whole for one in some)


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (Range(low=1, high=3), [1, 2, 3]),
        (Range(low=64, high=256, step=64), [64, 128, 192, 256]),
        (Range(low=0.5, high=1.5, step=0.5), [0.5, 1.0, 1.5]),
        (Range(low=1e-4, high=1e-2, log=True), [1e-4, 3.162e-4, 1e-3, 3.162e-3, 1e-2]),
    ],
)
def test_values_of_a_range(spec: Range, values: list[float]) -> None:
    assert values_of(spec) == pytest.approx(values)


def test_a_layer_counts_what_torch_counts() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=8
    )
    layer = LlamaDecoderLayer(config, 0)
    assert layer_parameters(48, 80, 60, 20) == sum(p.numel() for p in layer.parameters() if p.dim() == 2)
    assert bytes_at_least(3, 1000, 8) == 3000


@pytest.mark.parametrize(
    ("asked", "bits"),
    [
        ({"precisions": ["fp32", "int8"]}, 8),
        ({"precisions": ["fp16"]}, 16),
        ({"precisions": ["fp32"], "quantize": ["gptq"]}, 4),
        ({"precisions": ["fp16"], "formats": ["gguf:q8_0", "openvino:fp32"]}, 8),
        ({"precisions": ["fp16"], "formats": ["gguf"]}, 4),
        ({"precisions": ["fp16"], "formats": ["olive:passes.json"]}, 0),
    ],
)
def test_bits_of_the_smallest_variant(asked: dict[str, Any], bits: float) -> None:
    assert fewest_bits(CompressConfig(**asked)) == bits


def test_rungs() -> None:
    assert efforts(3) == pytest.approx([1 / 9, 1 / 3, 1])
    assert efforts(1) == [1]
    assert seats(9, 3) == [9, 3, 1]
    assert seats(10, 3) == [10, 4, 2]
    assert seats(1, 3) == [1, 1, 1]
    assert with_effort(20, 1 / ETA) == 6.667


@pytest.mark.parametrize("seed", range(20))
def test_fronts_are_what_nothing_beats(seed: int) -> None:
    left = points(25, seed)
    ranks = fronts(left)
    assert sorted(p.id for rank in ranks for p in rank) == sorted(p.id for p in left)
    for rank in ranks:
        reference = {
            a.id
            for a in left
            if not any(
                b.score >= a.score
                and all(x <= y for x, y in zip(b.costs, a.costs, strict=True))
                and (b.score > a.score or any(x < y for x, y in zip(b.costs, a.costs, strict=True)))
                for b in left
            )
        }
        assert {point.id for point in rank} == reference
        assert [point.score for point in rank] == sorted((point.score for point in rank), reverse=True)
        left = [point for point in left if point.id not in reference]


@pytest.mark.parametrize("seed", range(10))
def test_those_that_fit_go_on_first_and_fronts_keep_their_ends(seed: int) -> None:
    all_points = points(20, seed)
    fitting = [point.id for point in all_points[::2]]
    chosen = promoted(all_points, fitting, 6)
    assert len(chosen) == len(set(chosen)) == 6
    assert set(chosen) <= set(fitting)
    first = fronts([point for point in all_points if point.id in fitting])[0]
    if len(first) <= 6:
        assert {point.id for point in first} <= set(chosen)
    else:
        assert {first[0].id, first[-1].id} <= set(chosen)
    assert set(promoted(all_points, fitting, 14)) > set(fitting), "others follow where there is room"
    assert len(promoted(all_points, fitting, 99)) == 20


def test_equal_points_do_not_beat_each_other() -> None:
    twins = [Point("a", 0.5, (1.0,)), Point("b", 0.5, (1.0,))]
    assert fronts(twins) == [twins]
