"""8 bits for what is multiplied, too, with one scale a tensor: by onnxruntime's own quantizers.

``dynamic``: the scale is found while the model runs. ``static``: it is found before, on rows of the task, and stays.
Both are for processors whose kernels multiply bytes and nothing else; where one token's numbers dwarf all others, one
scale is a coarse one (see :mod:`slmops.compress.outliers`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx

from slmops.compress.graph_files import GRAPH_NAME, save_graph
from slmops.compress.quantize.statistics import TokenRow, feeds_of

MADE_NAME = "slmops-activations.onnx"
OPTIONS = {"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT}


def quantize_activations(
    folder: Path,
    kind: Literal["dynamic", "static"],
    rows: Sequence[TokenRow],
    head_size: int,
    left_out: Sequence[str] = (),
) -> None:
    """Rewrite the fp32 graph in ``folder``; products named in ``left_out`` stay wide."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    made = folder / MADE_NAME
    common: dict[str, Any] = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_exclude": list(left_out),
        "per_channel": True,
        "weight_type": QuantType.QInt8,
        "use_external_data_format": True,
        "extra_options": OPTIONS,
    }
    with _quiet():
        if kind == "dynamic":
            quantize_dynamic(folder / GRAPH_NAME, made, **common)
        else:
            reader = _Reader(folder, rows, head_size)
            quantize_static(
                folder / GRAPH_NAME,
                made,
                reader,
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                **common,
            )
    model = onnx.load(made)
    for path in folder.glob(f"{MADE_NAME}*"):
        path.unlink()
    save_graph(model, folder, external=True)


class _Reader:
    """Rows as the calibrator of onnxruntime asks for them."""

    def __init__(self, folder: Path, rows: Sequence[TokenRow], head_size: int) -> None:
        self._graph = onnx.load(folder / GRAPH_NAME, load_external_data=False).graph
        self._rows, self._head_size = list(rows), head_size
        self._left: Iterator[TokenRow] = iter(self._rows)

    def get_next(self) -> dict[str, Any] | None:
        row = next(self._left, None)
        return None if row is None else feeds_of(self._graph, row.ids, self._head_size)

    def rewind(self) -> None:
        self._left = iter(self._rows)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._left = iter(self._rows[start_index:end_index])

    def __len__(self) -> int:
        return len(self._rows)


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
