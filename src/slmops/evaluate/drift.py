"""In which layer two forms of one model part: hidden states, layer by layer, on real texts.

What is compared is the residual stream behind each layer. torch shows it through hooks. A graph shows it where its
norms take in what a layer adds (``SkipSimplifiedLayerNormalization``, as onnxruntime-genai's builder and
:mod:`slmops.compress` write it): the sums become outputs of a copy of the graph, whose weights stay where they are.

Guarantees: states of the same tokens at the same layer; nothing is written beside the models. An error at a layer holds
what came before it as well, so the layer is named where the error starts, not where it is largest.
Not covered: engines that show no states, graphs of another shape (the reason is told), layers that were removed without
``layer_of``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import MODEL_DESCRIPTION
from slmops.errors import ModelError
from slmops.runtime.description import ModelDescription

States = list[NDArray[np.float32]]
"""A row's states: ``[tokens, hidden]`` behind each layer, in order."""

START_SHARE = 0.1
"""The drift starts at the first layer with this share of the largest error."""
NO_DRIFT = 1e-3
"""Relative errors below are rounding."""
SKIP_NORMS = frozenset({"SkipSimplifiedLayerNormalization", "SkipLayerNormalization"})
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}


@dataclass(frozen=True)
class LayerDrift:
    """``errors``: relative error behind each layer, mean over tokens. ``start``: the layer where it starts, from 0;
    None where there is none, or where ``why_not`` says why nothing could be compared."""

    errors: tuple[float, ...]
    start: int | None
    why_not: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"errors": list(self.errors), "start": self.start, "why_not": self.why_not}

    @property
    def sentence(self) -> str:
        if self.why_not:
            return f"Where it starts cannot be told: {self.why_not}."
        if self.start is None:
            return "Hidden states are the same in all layers: it is the output layer, or what is around the model."
        before = f", {self.errors[self.start - 1]:.2g} behind the layer before" if self.start else ""
        return f"It starts at layer {self.start} (relative error {self.errors[self.start]:.2g}{before})."


def layer_drift(
    before: Path, after: Path, id_rows: Sequence[Sequence[int]], *, layer_of: Mapping[int, int] | None = None
) -> LayerDrift:
    """Compare two model folders on rows of token ids.

    ``layer_of``  layer of ``after`` -> the layer of ``before`` that it was made from; None: the same number
    """
    try:
        first, second = layer_states(before, id_rows), layer_states(after, id_rows)
    except ModelError as error:
        return LayerDrift((), None, error.message.rstrip("."))
    counts = len(first[0]), len(second[0])
    if counts[0] != counts[1] and layer_of is None:
        return LayerDrift((), None, f"{counts[0]} layers became {counts[1]}")
    pairs = {layer: layer for layer in range(counts[1])} if layer_of is None else dict(layer_of)
    widths = first[0][0].shape[1], second[0][0].shape[1]
    if widths[0] != widths[1]:
        return LayerDrift((), None, f"a hidden size of {widths[0]} became {widths[1]}")
    errors = [
        float(
            np.mean(
                np.concatenate([relative_errors(a[pairs[layer]], b[layer]) for a, b in zip(first, second, strict=True)])
            )
        )
        for layer in sorted(pairs)
    ]
    return LayerDrift(tuple(errors), drift_start(errors))


def relative_errors(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    """``|after - before| / |before|`` of each token; both ``[tokens, hidden]``."""
    exact = before.astype(np.float64)
    size = np.linalg.norm(exact, axis=1)
    found: NDArray[np.float64] = np.linalg.norm(after.astype(np.float64) - exact, axis=1) / np.maximum(size, 1e-12)
    return found


def drift_start(errors: Sequence[float]) -> int | None:
    """The first layer whose error is no rounding and a good part of the largest; None where there is none."""
    finite = [error if np.isfinite(error) else float("inf") for error in errors]
    largest = max((error for error in finite if error != float("inf")), default=0.0)
    least = max(NO_DRIFT, START_SHARE * largest)
    return next((layer for layer, error in enumerate(finite) if error >= least), None)


def layer_states(folder: Path, id_rows: Sequence[Sequence[int]]) -> list[States]:
    """The residual stream behind each layer, for each row of ids.

    Raises:
        ModelError: the engine shows none, or the graph has another shape.
    """
    engine = _engine(folder)
    match engine:
        case "torch":
            return _torch_states(folder, id_rows)
        case "onnx" | "onnx-genai":
            return _graph_states(folder, id_rows)
        case _:
            raise ModelError(f"{engine} shows no hidden states")


def _engine(folder: Path) -> str:
    plain = not (folder / MODEL_DESCRIPTION).exists() and (folder / "config.json").is_file()
    return "torch" if plain else ModelDescription.read(folder).runtime


def _torch_states(folder: Path, id_rows: Sequence[Sequence[int]]) -> list[States]:
    import torch
    from torch import nn

    if (folder / "labels.json").is_file():
        from slmops.models.classifier import load_classifier

        model: Any = load_classifier(folder).backbone
    else:
        from slmops.runtime.torch_generator import TorchGenerator

        model = TorchGenerator.load(folder).model
    lists = [
        part for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and name.endswith("layers")
    ]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers")
    seen: list[NDArray[np.float32]] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        seen.append(states[0].float().numpy())

    hooks = [layer.register_forward_hook(keep) for layer in lists[0]]
    rows: list[States] = []
    try:
        for ids in id_rows:
            seen = []
            batch = torch.tensor([list(ids)])
            with torch.inference_mode():
                model(input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False)
            rows.append(seen)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _graph_states(folder: Path, id_rows: Sequence[Sequence[int]]) -> list[States]:
    import onnx
    import onnxruntime

    path = folder / "model.onnx"
    if not path.is_file():
        raise ModelError(f"{folder.name} has no model.onnx")
    model = onnx.load(path, load_external_data=False)
    sums = residual_sums(model)
    element = onnx.TensorProto.FLOAT
    del model.graph.output[:]
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, element, None) for name in sums)
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory(prefix="slmops-drift-") as place:
        for data in folder.glob("*.data"):  # the weights stay where they are
            _link_or_copy(data, Path(place) / data.name)
        onnx.save(model, Path(place) / path.name)
        try:
            session = onnxruntime.InferenceSession(
                str(Path(place) / path.name), options, providers=["CPUExecutionProvider"]
            )
            return [[states[0] for states in session.run(sums, _feeds(session, list(ids), folder))] for ids in id_rows]
        except ModelError:
            raise
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise ModelError(f"the graph cannot show its states: {error}") from error


def residual_sums(model: Any) -> list[str]:
    """Names of the residual stream behind each layer; norms that keep it to themselves are made to show it.

    Raises:
        ModelError: the graph has no such norms, or not two a layer.
    """
    names: list[str] = []
    for node in model.graph.node:
        if node.op_type not in SKIP_NORMS:
            continue
        while len(node.output) < 4:
            node.output.append("")
        if not node.output[3]:
            node.output[3] = f"{node.name or node.output[0]}.sum"
        names.append(node.output[3])
    if not names or len(names) % 2:
        raise ModelError(f"the graph has {len(names)} norms that take in a layer's change, not two a layer")
    return names[1::2]


def _feeds(session: Any, ids: list[int], folder: Path) -> dict[str, NDArray[Any]]:
    length = len(ids)
    given = {
        "input_ids": np.array([ids]),
        "attention_mask": np.ones((1, length)),
        "position_ids": np.arange(length)[None],
    }
    feeds: dict[str, NDArray[Any]] = {}
    for item in session.get_inputs():
        kind = _TYPES.get(item.type, np.int32)
        if item.name in given:
            feeds[item.name] = given[item.name].astype(kind)
        elif item.name.startswith("past_key_values"):
            heads, size = item.shape[1], item.shape[3]
            feeds[item.name] = np.zeros((1, heads, 0, size if isinstance(size, int) else _head_size(folder)), kind)
        else:
            raise ModelError(f"the graph has an input {item.name}, which is not known here")
    return feeds


def _head_size(folder: Path) -> int:
    import json

    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    return int(config["model"]["decoder"]["head_size"])


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        destination.hardlink_to(source)
    except OSError:  # another file system, or one without hard links; the runtime follows no other links
        import shutil

        shutil.copyfile(source, destination)
