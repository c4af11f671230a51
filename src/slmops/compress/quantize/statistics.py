"""What goes into the matrices of a graph: ``XᵀX`` of each product's input, on rows of the task.

The graph runs as it is, in fp32, row by row without padding; inputs are read beside its outputs. Matrices ``[width,
width]`` are kept in memory for at most :data:`MOST_BYTES` at once: a graph with more of them is run several times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from slmops.compress.graph_files import GRAPH_NAME

MOST_BYTES = 2 << 30
TOKENS_AT_ONCE = 1024
"""So many tokens wait for each product: a matrix is read and written as rarely."""
GRAPH_BESIDE = "slmops-statistics.onnx"


@dataclass(frozen=True)
class TokenRow:
    """Ids of one row, and True where the next token is part of an answer; both ``[tokens]``."""

    ids: NDArray[np.int64]
    predicts: NDArray[np.bool_]


def feeds_of(graph: onnx.GraphProto, ids: NDArray[np.int64], head_size: int) -> dict[str, NDArray[Any]]:
    """What ``graph`` reads for one row, with an empty cache."""
    tokens = ids[None]
    feeds: dict[str, NDArray[Any]] = {}
    for value in graph.input:
        tensor = value.type.tensor_type
        match value.name:
            case "input_ids":
                feeds[value.name] = tokens
            case "attention_mask":
                feeds[value.name] = np.ones_like(tokens)
            case "position_ids":
                feeds[value.name] = np.arange(tokens.shape[1], dtype=np.int64)[None]
            case name if name.startswith("past_key_values"):
                heads = tensor.shape.dim[1].dim_value
                size = tensor.shape.dim[3].dim_value or head_size
                feeds[name] = np.zeros((1, heads, 0, size), dtype=helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return feeds


def grams(
    folder: Path, inputs: Mapping[str, int], rows: Sequence[TokenRow], head_size: int
) -> Iterator[dict[str, Tensor]]:
    """``XᵀX / tokens`` fp32 ``[width, width]`` of each of ``inputs`` (name -> width), as many at once as there is room
    for. ``folder`` holds the graph; nothing else in it is touched."""
    group: dict[str, int] = {}
    for name, width in inputs.items():
        if group and sum(4 * one**2 for one in group.values()) + 4 * width**2 > MOST_BYTES:
            yield _grams(folder, group, rows, head_size)
            group = {}
        group[name] = width
    if group:
        yield _grams(folder, group, rows, head_size)


def _grams(folder: Path, inputs: Mapping[str, int], rows: Sequence[TokenRow], head_size: int) -> dict[str, Tensor]:
    found = {name: torch.zeros(width, width) for name, width in inputs.items()}
    waiting: list[list[NDArray[np.float32]]] = []
    tokens, waiting_tokens = 0, 0
    with beside(folder, outputs=list(inputs)) as (session, graph):
        for number, row in enumerate(rows):
            waiting.append(session.run(list(inputs), feeds_of(graph, row.ids, head_size)))
            waiting_tokens += len(row.ids)
            if waiting_tokens >= TOKENS_AT_ONCE or number == len(rows) - 1:
                for name, values in zip(inputs, zip(*waiting, strict=True), strict=True):
                    flat = torch.cat([torch.from_numpy(value).flatten(0, -2) for value in values])
                    found[name].addmm_(flat.T, flat)
                tokens, waiting, waiting_tokens = tokens + waiting_tokens, [], 0
    return {name: gram / max(1, tokens) for name, gram in found.items()}


class beside:  # noqa: N801 - read as a statement: with beside(folder, ...) as session, graph
    """A session of the graph in ``folder``, with ``outputs`` besides its own and ``overridable`` constants as inputs
    that may be given. The constants stay in the file where they are."""

    def __init__(self, folder: Path, *, outputs: Sequence[str] = (), overridable: Sequence[str] = ()) -> None:
        self._path = folder / GRAPH_BESIDE
        self._model = onnx.load(folder / GRAPH_NAME, load_external_data=False)
        graph = self._model.graph
        known = {output.name for output in graph.output}
        graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs if name not in known
        )
        constants = {tensor.name: tensor for tensor in graph.initializer}
        graph.input.extend(
            helper.make_tensor_value_info(name, constants[name].data_type, list(constants[name].dims))
            for name in overridable
        )

    def __enter__(self) -> tuple[Any, onnx.GraphProto]:
        import onnxruntime

        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # every row has a length of its own
        onnx.save(self._model, self._path)
        try:
            session = onnxruntime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        finally:
            self._path.unlink(missing_ok=True)
        return session, self._model.graph

    def __exit__(self, *_: object) -> None:
        self._path.unlink(missing_ok=True)
