"""Graphs to disk, and a graph run once for a look at its numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

GRAPH_NAME = "model.onnx"
DATA_NAME = "model.onnx.data"
EXTERNAL_BYTES = 64 << 20
"""Graphs above so many bytes keep their weights in a file of their own, which the runtime maps instead of parsing."""

TRIAL_LENGTHS = (1, 7, 24)


def save_graph(model: onnx.ModelProto, folder: Path, *, external: bool | None = None) -> None:
    """Write ``model.onnx``, and ``model.onnx.data`` for a large one (or as ``external`` says); ``model`` stays."""
    if external is None:
        external = model.ByteSize() > EXTERNAL_BYTES
    for name in (GRAPH_NAME, DATA_NAME):
        (folder / name).unlink(missing_ok=True)
    if external:  # save() moves the weights out of what it is given
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        model = copy
    onnx.save(
        model,
        folder / GRAPH_NAME,
        save_as_external_data=external,
        all_tensors_to_one_file=True,
        location=DATA_NAME if external else None,
        size_threshold=1024,
    )


def trial_rows(vocabulary: int, max_tokens: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Random ids and their mask, rows of several lengths padded together; the same ones every time."""
    lengths = np.array(sorted({min(length, max_tokens) for length in TRIAL_LENGTHS}))
    ids = np.random.default_rng(0).integers(0, vocabulary, (len(lengths), lengths[-1]))
    return ids, (np.arange(lengths[-1]) < lengths[:, None]).astype(np.int64)


def run_graph(model: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
    """Values of ``outputs`` for ``feeds``, computed by onnxruntime on one thread."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as temporary:
        save_graph(model, Path(temporary))
        session = onnxruntime.InferenceSession(
            str(Path(temporary) / GRAPH_NAME), options, providers=["CPUExecutionProvider"]
        )
        values: list[NDArray[Any]] = session.run(list(outputs), dict(feeds))
        return values
