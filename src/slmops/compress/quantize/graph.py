"""A graph's matrices, and their codes in place of them.

Products with a constant become ``MatMulNBits``, rows read out of a constant ``GatherBlockQuantized``. A matrix that is
both (tied embeddings: the builder reads rows of the transposed output layer) is stored once. Scales are stored in half
precision and widened when the graph is loaded: onnxruntime folds the cast, and its kernels see fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from slmops.models.grid import Quantized

FUSED = "com.microsoft"
SMALLEST_NUMBERS = 1024
"""Matrices of fewer numbers stay as they are."""
INT8_ACTIVATIONS = 4
"""The kernels' accuracy level at which what is multiplied is rounded to 8 bits, block by block, as it comes."""


@dataclass(frozen=True)
class Matrix:
    """A constant of a graph that products or row reads use. ``rows`` and ``width``: as it is quantized, that is with
    the outputs of a product (the tokens of embeddings) as rows. ``transposed``: it is stored the other way round.
    ``products``: names of their nodes. ``input``: what is multiplied with it; "" where rows are only read."""

    name: str
    rows: int
    width: int
    transposed: bool
    products: tuple[str, ...]
    reads: tuple[str, ...]
    input: str

    def of(self, model: onnx.ModelProto) -> Tensor:
        """Its numbers ``[rows, width]``, fp32."""
        tensor = next(one for one in model.graph.initializer if one.name == self.name)
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        return (value.T if self.transposed else value).contiguous()


def matrices_of(model: onnx.ModelProto) -> list[Matrix]:
    """Every matrix that can be quantized, in the order of first use. Its data need not be loaded."""
    graph = model.graph
    constants = {
        tensor.name: tensor
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and np.prod(tensor.dims) >= SMALLEST_NUMBERS
    }
    turned = {node.output[0]: node.input[0] for node in graph.node if _turns(node) and node.input[0] in constants}
    found: dict[str, dict[str, list[str]]] = {}
    for node in graph.node:
        if node.domain:
            continue
        if node.op_type == "MatMul" and node.input[1] in constants:
            uses = found.setdefault(node.input[1], {"MatMul": [], "Gather": [], "inputs": []})
            uses["MatMul"].append(node.name)
            uses["inputs"].append(node.input[0])
        elif node.op_type == "Gather" and _axis(node) == 0:
            source = turned.get(node.input[0], node.input[0])
            if source in constants:
                found.setdefault(source, {"MatMul": [], "Gather": [], "inputs": []})["Gather"].append(node.name)
    matrices = []
    for name, uses in found.items():
        if len(set(uses["inputs"])) > 1 or (name not in turned.values() and uses["MatMul"] and uses["Gather"]):
            continue  # two meanings: left as it is
        transposed = bool(uses["MatMul"])
        rows, width = reversed(constants[name].dims) if transposed else constants[name].dims
        matrices.append(
            Matrix(
                name,
                int(rows),
                int(width),
                transposed,
                tuple(uses["MatMul"]),
                tuple(uses["Gather"]),
                uses["inputs"][0] if uses["inputs"] else "",
            )
        )
    return matrices


def with_codes(model: onnx.ModelProto, codes: Mapping[str, Quantized]) -> onnx.ModelProto:
    """A copy of ``model`` in which the matrices named in ``codes`` are replaced; other weights are shared with it."""
    matrices = {matrix.name: matrix for matrix in matrices_of(model) if matrix.name in codes}
    by_node = {node: matrix for matrix in matrices.values() for node in (*matrix.products, *matrix.reads)}
    nodes: list[onnx.NodeProto] = []
    added: list[onnx.TensorProto] = []
    for matrix in matrices.values():
        made, stored = _stored(matrix, codes[matrix.name])
        nodes += made
        added += stored
    for node in model.graph.node:
        matrix_of_node = by_node.get(node.name)
        if matrix_of_node is None:
            nodes.append(node)
        else:
            found = codes[matrix_of_node.name]
            make = _product if node.op_type == "MatMul" else _read
            nodes += make(node, matrix_of_node, found)
    return _assembled(model, nodes, added, {matrix.name for matrix in matrices.values()})


def _stored(matrix: Matrix, found: Quantized) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    name, grid = matrix.name, found.grid
    packed = packed_codes(found.codes.numpy(), grid.bits)
    scales = found.scales.numpy().astype(np.float16)
    stored = [
        numpy_helper.from_array(packed, f"{name}.codes"),
        numpy_helper.from_array(scales, f"{name}.scales.half"),
    ]
    nodes = [_widened(f"{name}.scales")]
    if found.between:
        halves = found.zeros.numpy().astype(np.float16)
        stored.append(numpy_helper.from_array(halves, f"{name}.zeros.half"))
        nodes.append(_widened(f"{name}.zeros"))
    elif not grid.symmetric:
        zeros = packed_rows(found.zeros.numpy(), grid.bits, grid.middle)
        stored.append(numpy_helper.from_array(zeros, f"{name}.zeros"))
    if matrix.reads:
        flat = np.array([matrix.rows, packed.shape[1] * packed.shape[2]], dtype=np.int64)
        stored.append(numpy_helper.from_array(flat, f"{name}.codes.shape"))
        nodes.append(
            helper.make_node(
                "Reshape",
                [f"{name}.codes", f"{name}.codes.shape"],
                [f"{name}.codes.flat"],
                name=f"{name}.codes.Reshape",
            )
        )
    return nodes, stored


def _widened(name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [f"{name}.half"], [name], name=f"{name}.Cast", to=TensorProto.FLOAT)


def _product(node: onnx.NodeProto, matrix: Matrix, found: Quantized) -> list[onnx.NodeProto]:
    inputs = [node.input[0], f"{matrix.name}.codes", f"{matrix.name}.scales"]
    if not found.grid.symmetric:
        inputs.append(f"{matrix.name}.zeros")
    about = {"K": matrix.width, "N": matrix.rows, "bits": found.grid.bits, "block_size": found.grid.block_size}
    return [
        helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=f"{node.name}_Q{found.grid.bits}",
            domain=FUSED,
            accuracy_level=INT8_ACTIVATIONS,
            **about,
        )
    ]


def _read(node: onnx.NodeProto, matrix: Matrix, found: Quantized) -> list[onnx.NodeProto]:
    inputs = [f"{matrix.name}.codes.flat", node.input[1], f"{matrix.name}.scales"]
    if not found.grid.symmetric:
        inputs.append(f"{matrix.name}.zeros")
    about = {"bits": found.grid.bits, "block_size": found.grid.block_size, "gather_axis": 0, "quantize_axis": 1}
    return [
        helper.make_node(
            "GatherBlockQuantized",
            inputs,
            list(node.output),
            name=f"{node.name}_Q{found.grid.bits}",
            domain=FUSED,
            **about,
        )
    ]


def _assembled(
    model: onnx.ModelProto, nodes: list[onnx.NodeProto], added: list[onnx.TensorProto], replaced: set[str]
) -> onnx.ModelProto:
    """``model`` with other nodes; what only a replaced matrix needed (its transposition) goes with it."""
    read = {name for node in nodes for name in node.input} | {output.name for output in model.graph.output}
    nodes = [node for node in nodes if not (_turns(node) and node.input[0] in replaced and node.output[0] not in read)]
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in replaced]
    graph = helper.make_graph(
        nodes, model.graph.name, list(model.graph.input), list(model.graph.output), [*kept, *added]
    )
    graph.value_info.extend(value for value in model.graph.value_info if value.name not in replaced)
    opsets = [one for one in model.opset_import if one.domain != FUSED] + [helper.make_opsetid(FUSED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)


def packed_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """``[rows, blocks, block_size]`` as bytes ``[rows, blocks, block_size * bits / 8]``; of two codes of 4 bits the
    first is the lower half."""
    if bits == 8:
        return codes
    return np.bitwise_or(codes[..., ::2], np.left_shift(codes[..., 1::2], np.uint8(4)))


def packed_rows(zeros: NDArray[np.uint8], bits: int, middle: int) -> NDArray[np.uint8]:
    """Zeros ``[rows, blocks]`` as bytes, each row filled up to whole ones."""
    if bits == 8:
        return zeros
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)), constant_values=middle)
    return np.bitwise_or(zeros[:, ::2], np.left_shift(zeros[:, 1::2], np.uint8(4)))


def _turns(node: onnx.NodeProto) -> bool:
    return node.op_type == "Transpose" and not node.domain


def _axis(node: onnx.NodeProto) -> Any:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
