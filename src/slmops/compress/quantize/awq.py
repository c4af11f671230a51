"""AWQ (Lin et al. 2023, arXiv:2306.00978): channels through which much goes are made larger before rounding, and what
is before them smaller by as much, so that the model stays what it was and rounding costs less.

A channel's factor is the root mean square of its input to a power between 0 and 1; the power is searched, by the change
of the products with the calibration rows (the paper's measure). Factors go where they cost nothing: into the weights
of the norm before the products, or, where the input is a product of two values (a gated feed-forward), into the rows of
the matrix that makes one of them. The output of attention has no such place and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from slmops.compress.quantize.gptq import output_error
from slmops.compress.quantize.graph import Matrix
from slmops.compress.quantize.rounding import importance_of
from slmops.models.grid import Grid, Quantized

POWERS = tuple(step / 10 for step in range(10))
NORMS = frozenset({"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"})
Round = Callable[[Tensor, Grid, Tensor], Quantized]


@dataclass(frozen=True)
class Place:
    """Where an input's factors are taken back: ``constant``, along its first axis (a norm's weights) or its last one (a
    matrix ``[inputs, outputs]`` as products have it)."""

    input: str
    constant: str


def places_of(model: onnx.ModelProto, matrices: Sequence[Matrix]) -> list[Place]:
    """Inputs of products whose factors can be taken back: nothing but ``matrices`` reads the input, and nothing but the
    input depends on what takes them back."""
    graph = model.graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    makers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        makers.update(dict.fromkeys(node.output, node))
    constants = {tensor.name for tensor in graph.initializer}
    by_product = {product: matrix for matrix in matrices for product in matrix.products}
    ends = {output.name for output in graph.output}
    found = []
    for name in dict.fromkeys(matrix.input for matrix in matrices if matrix.input):
        maker = makers.get(name)
        read = readers.get(name, [])
        if maker is None or name in ends or not all(node.name in by_product for node in read):
            continue
        if any(by_product[node.name].reads for node in read):
            continue  # tied embeddings: their rows are read elsewhere
        if maker.op_type in NORMS:
            weight = maker.input[2] if maker.op_type.startswith("Skip") else maker.input[1]
            if weight in constants and len(readers[weight]) == 1:
                found.append(Place(name, weight))
        elif maker.op_type == "Mul":
            for part in maker.input:
                before = by_product.get(makers[part].name) if part in makers else None
                if before is not None and len(readers[part]) == 1 and len(before.products) == 1:
                    found.append(Place(name, before.name))
                    break
    return found


def factors(matrices: Sequence[Tensor], gram: Tensor, grid: Grid, rounding: Round) -> tuple[Tensor, float]:
    """The factors ``[width]`` of an input that ``matrices`` (each ``[rows, width]``) multiply, and the power that they
    come from; ones and 0 where nothing is better than to leave it."""
    size = importance_of(gram).sqrt().clamp(min=1e-6)
    best, best_power, least = torch.ones_like(size), 0.0, float("inf")
    for power in POWERS:
        tried = size**power
        tried = (tried / (tried.max() * tried.min()).sqrt()).clamp(1e-4, 1e4)
        importance = importance_of(gram) / tried.square()
        error = sum(
            output_error(matrix, rounding(matrix * tried, grid, importance).wide() / tried, gram) for matrix in matrices
        )
        if error < least:
            best, best_power, least = tried, power, error
    return best, best_power


def scaled(
    model: onnx.ModelProto,
    matrices: Sequence[Matrix],
    found: Mapping[str, Tensor],
    places: Sequence[Place],
) -> onnx.ModelProto:
    """Change ``model`` in place: the columns of what reads an input times its factors (``found``: input -> factors),
    and what is before it divided by them."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for place in places:
        factor = found[place.input].numpy()
        for matrix in matrices:
            if matrix.input == place.input:
                _times(constants[matrix.name], factor[:, None])
        _times(constants[place.constant], 1 / factor)
    return model


def _times(tensor: onnx.TensorProto, factor: np.ndarray) -> None:
    value = numpy_helper.to_array(tensor) * factor
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value.astype(np.float32)), tensor.name))
