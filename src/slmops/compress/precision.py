"""Graphs in fewer bits. Each function takes an fp32 graph and returns a new one; nothing is calibrated.

Chosen by measurement on the default student (1 thread, 15 tokens) and on the 135 M teacher:

* fp16: weights are stored in half the bytes and widened when the graph is loaded (embeddings: when they are read). CPUs
  here have no half-precision kernels worth using, and a graph converted as a whole would be cast to and fro.
* int8: weights in one byte with a scale for each output channel, activations quantized as they come
  (``DynamicQuantizeMatMul``); embeddings in one byte with a scale a row. Products whose input would be lost in that
  (:mod:`slmops.compress.outliers`) keep it: only their weights are quantized (``MatMulNBits``), which is more exact and
  half as fast.
* int4: weights in blocks of 32 with a scale each (``MatMulNBits``), embeddings too: they are most of a small model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from slmops.recipe import Precision

FUSED = "com.microsoft"
INT4_BLOCK = 32
WEIGHT_ONLY_BLOCK = 32
SMALL_ELEMENTS = 4096
"""Constants below so many elements (norms, scales, biases) stay in fp32: they are no size worth saving."""


def at_precision(
    model: onnx.ModelProto, precision: Precision, weight_only: frozenset[str] = frozenset()
) -> onnx.ModelProto:
    """A copy of the fp32 graph ``model`` at ``precision`` (``model`` itself for fp32). ``weight_only``: for int8."""
    match precision:
        case "fp32":
            return model
        case "fp16":
            return to_fp16(model)
        case "int8":
            return to_int8(model, weight_only)
        case "int4":
            return to_int4(model)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights stored in half precision, sums in fp32."""
    rewrite = _Rewrite(model)
    for name, weight in rewrite.weights():
        half = rewrite.add_constant(f"{name}.fp16", weight.astype(np.float16))
        readers = [node for node in rewrite.nodes if name in node.input]
        if not all(_reads_rows(node) for node in readers):
            rewrite.add("Cast", [half], name, to=TensorProto.FLOAT)  # folded when the graph is loaded
    for node in rewrite.nodes:
        half = f"{node.input[0]}.fp16" if node.input else ""
        if _reads_rows(node) and rewrite.has(half) and not rewrite.makes(node.input[0]):
            read = rewrite.add("Gather", [half, node.input[1]], f"{node.output[0]}.fp16", axis=0)
            rewrite.add("Cast", [read], node.output[0], to=TensorProto.FLOAT)
        else:
            rewrite.keep(node)
    return rewrite.finish()


def to_int8(model: onnx.ModelProto, weight_only: frozenset[str] = frozenset()) -> onnx.ModelProto:
    """Weights and activations in 8 bits, embeddings in 8 bits; sums in int32, everything else in fp32.

    ``weight_only``: names of MatMul nodes whose activations stay wide.
    """
    if weight_only:
        others = [node.name for node in model.graph.node if node.name not in weight_only]
        model = _in_blocks(model, bits=8, block=WEIGHT_ONLY_BLOCK, operators=("MatMul",), exclude=others)
    rewrite = _Rewrite(model)
    for node in model.graph.node:
        weight = rewrite.weight(node)
        if weight is None or node.op_type == "Gemm":  # the head: small, and its rounding is an answer's
            rewrite.keep(node)
            continue
        if node.op_type == "Gather":
            _gather_int8(rewrite, node, weight)
            continue
        name = node.input[1]
        values, scales = symmetric_int8(weight, axis=0)  # a scale for each output channel
        inputs = [
            node.input[0],
            rewrite.add_constant(f"{name}.int8", values),
            rewrite.add_constant(f"{name}.scale", scales),
        ]
        rewrite.add("DynamicQuantizeMatMul", inputs, node.output[0], domain=FUSED)
    return rewrite.finish()


def shrink_embeddings(model: onnx.ModelProto) -> onnx.ModelProto:
    """Embeddings of a language model's graph in 8 bits; the rest stays as it is.

    Where the graph has the same matrix once more as its output layer in 8 bits (``MatMulNBits``), both read that one.
    """
    rewrite = _Rewrite(model)
    for node in model.graph.node:
        weight = rewrite.weight(node) if node.op_type == "Gather" else None
        if weight is None:
            rewrite.keep(node)
        elif (output_layer := _output_layer(rewrite, weight)) is not None:
            _gather_from(rewrite, node, output_layer, weight.shape)
        else:
            _gather_int8(rewrite, node, weight)
    return rewrite.finish()


def to_int4(model: onnx.ModelProto, block: int = INT4_BLOCK) -> onnx.ModelProto:
    """Weights and embeddings in 4 bits, ``block`` of them to a scale; activations in 8 bits where that is faster."""
    exclude = _unquantizable_gathers(model)
    return _in_blocks(model, bits=4, block=block, operators=("MatMul", "Gather"), exclude=exclude)


def symmetric_int8(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """``weight ≈ values * scales`` with one scale for each slice along ``axis``.

    For a matrix ``[in, out]`` and axis 0 the scales are ``[out]``; for an embedding ``[rows, width]`` and axis 1 they
    are ``[rows, 1]``. A slice of zeros has the scale 1.
    """
    scales = np.abs(weight).max(axis=axis, keepdims=True).astype(np.float32) / np.float32(127)
    scales[scales == 0] = 1
    values = np.clip(np.rint(weight / scales), -127, 127).astype(np.int8)
    return values, scales[0] if axis == 0 else scales


def _in_blocks(
    model: onnx.ModelProto, *, bits: int, block: int, operators: tuple[str, ...], exclude: list[str]
) -> onnx.ModelProto:
    """Weights of ``operators`` in ``bits``, ``block`` of them to a scale, but for the nodes named in ``exclude``."""
    with _root_logger_untouched():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            _copy(model),
            bits=bits,
            block_size=block,
            is_symmetric=True,
            accuracy_level=4,
            op_types_to_quantize=operators,
            nodes_to_exclude=exclude,
        )
        quantizer.process()
    quantized: onnx.ModelProto = quantizer.model.model
    return quantized


def _gather_int8(rewrite: _Rewrite, node: onnx.NodeProto, weight: NDArray[np.float32]) -> None:
    """Read rows in 8 bits and widen them: a scale for each row, that is for each token."""
    name, output = node.input[0], node.output[0]
    values, scales = symmetric_int8(weight, axis=1)
    read = rewrite.add(
        "Gather", [rewrite.add_constant(f"{name}.int8", values), node.input[1]], f"{output}.int8", axis=0
    )
    wide = rewrite.add("Cast", [read], f"{output}.wide", to=TensorProto.FLOAT)
    scale = rewrite.add(
        "Gather", [rewrite.add_constant(f"{name}.scale", scales), node.input[1]], f"{output}.scale", axis=0
    )
    rewrite.add("Mul", [wide, scale], output)


def _output_layer(rewrite: _Rewrite, embeddings: NDArray[np.float32]) -> onnx.NodeProto | None:
    """The 8-bit matrix product whose weights are ``embeddings``, judged by a few rows."""
    rows, width = embeddings.shape
    for node in rewrite.nodes:
        about = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "MatMulNBits" or (about["bits"], about["N"], about["K"]) != (8, rows, width):
            continue
        block, inputs = about["block_size"], [name for name in node.input if name]
        if width % block or len(inputs) != 3:
            continue
        few = slice(0, min(rows, 256))
        values = rewrite.value(node.input[1])[few].astype(np.float32) - 128
        scales = rewrite.value(node.input[2]).reshape(rows, -1)[few, :, None]
        if np.allclose(values * scales, embeddings[few].reshape(values.shape), atol=float(scales.max())):
            return node
    return None


def _gather_from(rewrite: _Rewrite, node: onnx.NodeProto, layer: onnx.NodeProto, shape: tuple[int, ...]) -> None:
    """Read rows of the output layer's packed weights."""
    block = next(attribute.i for attribute in layer.attribute if attribute.name == "block_size")
    target = rewrite.add_constant(f"{layer.input[1]}.shape", np.array(shape, dtype=np.int64))
    flat = rewrite.add("Reshape", [layer.input[1], target], f"{layer.input[1]}.rows")
    inputs = [flat, node.input[1], layer.input[2]]
    about = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    rewrite.add("GatherBlockQuantized", inputs, node.output[0], domain=FUSED, **about)


def _slot(node: onnx.NodeProto) -> int:
    """Which input of the node is its weight."""
    return 0 if node.op_type == "Gather" else 1


class _Rewrite:
    """A copy of a model in which nodes with weights are replaced. Weights that no node reads any more are left out."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []
        self._added: dict[str, onnx.TensorProto] = {}

    @property
    def nodes(self) -> Sequence[onnx.NodeProto]:
        """Nodes of the model as it was."""
        return self._model.graph.node  # type: ignore[no-any-return]

    def value(self, name: str) -> NDArray[Any]:
        value: NDArray[Any] = numpy_helper.to_array(self._initializers[name])
        return value

    def weight(self, node: onnx.NodeProto) -> NDArray[np.float32] | None:
        """The matrix that ``node`` multiplies with or reads from, if it is a constant of some size."""
        if node.op_type not in ("MatMul", "Gather", "Gemm") or node.domain:
            return None
        tensor = self._initializers.get(node.input[_slot(node)])
        if tensor is None or not _is_large_matrix(tensor) or (node.op_type == "Gather" and not _reads_rows(node)):
            return None
        weight: NDArray[np.float32] = numpy_helper.to_array(tensor)
        return weight

    def add_constant(self, name: str, value: NDArray[Any]) -> str:
        if name not in self._added:
            self._added[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def add(self, operator: str, inputs: list[str], output: str, domain: str = "", **attributes: Any) -> str:
        # Names of nodes and of values are apart, but nodes of a foreign graph may be named as its values are.
        name = f"{output}.{operator}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))
        return output

    def has(self, name: str) -> bool:
        """Whether a constant of that name was added."""
        return name in self._added

    def makes(self, name: str) -> bool:
        """Whether a node that was added writes ``name``."""
        return any(name in node.output for node in self._nodes)

    def keep(self, node: onnx.NodeProto) -> None:
        self._nodes.append(node)

    def weights(self) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Matrices of some size that only products, row reads and transpositions read."""
        for name, tensor in self._initializers.items():
            readers = {node.op_type for node in self.nodes if name in node.input and not node.domain}
            if readers and readers <= _WEIGHT_READERS and _is_large_matrix(tensor):
                yield name, numpy_helper.to_array(tensor)

    def finish(self) -> onnx.ModelProto:
        read = {name for node in self._nodes for name in node.input}
        made = {name for node in self._nodes for name in node.output}
        kept = [tensor for name, tensor in self._initializers.items() if name in read and name not in made]
        source = self._model
        graph = helper.make_graph(
            self._nodes,
            source.graph.name,
            list(source.graph.input),
            list(source.graph.output),
            [*kept, *self._added.values()],
        )
        opsets = [opset for opset in source.opset_import if opset.domain != FUSED] + [helper.make_opsetid(FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=source.ir_version)


_WEIGHT_READERS = frozenset({"MatMul", "Gemm", "Gather", "Transpose"})


def _is_large_matrix(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and np.prod(tensor.dims) >= SMALL_ELEMENTS


def _reads_rows(node: onnx.NodeProto) -> bool:
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    return node.op_type == "Gather" and axis == 0


def _unquantizable_gathers(model: onnx.ModelProto) -> list[str]:
    """Gathers out of anything but a matrix of floats: shapes, positions."""
    matrices = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    return [node.name for node in model.graph.node if node.op_type == "Gather" and node.input[0] not in matrices]


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


@contextmanager
def _root_logger_untouched() -> Iterator[None]:
    """The quantizer configures the root logger when it is imported, and reports every node: neither is ours to show."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        logging.disable(disabled)
