"""LoRA adapters as inputs of a graph, and as files that onnxruntime puts into those inputs.

Each matrix that an adapter changes gets a second way around it, ``x A B``, added to its own product. ``A`` and ``B``
are inputs with a default of zeros of rank 1: without an adapter the graph is its base. Their rank is left open, so that
adapters of several ranks fit one graph. The scale ``alpha / rank`` is multiplied into ``B``.

LoRA: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
Not covered: magnitudes apart (DoRA), adapters of embeddings or biases, ranks by pattern.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import ConversionError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
VERSION = 1
_MODULE = re.compile(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)$")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Matrices that some models keep in one and the builder takes apart again."""


@dataclass(frozen=True)
class Factors:
    """``down``: ``[in, rank]``; ``up``: ``[rank, out]``, scaled. Both float32."""

    down: NDArray[np.float32]
    up: NDArray[np.float32]


def read_adapter(folder: Path) -> dict[str, Factors]:
    """The adapter at ``folder`` (peft's layout), by module (``layers.0.self_attn.q_proj``).

    Raises:
        ModelError: no adapter, or one that is damaged or not finite.
        ConversionError: a kind of adapter that cannot stand beside its base.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not an adapter: it has no {ADAPTER_CONFIG}.",
            remedy="Name a folder that training has written.",
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{folder / ADAPTER_CONFIG} is damaged: {error}.") from None
    if problem := _problem(config):
        raise ConversionError(
            f"The adapter {folder} cannot be kept apart from its base: {problem}.",
            remedy="Merge it: slmops adapters merge.",
        )
    scale = float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="numpy") as file:
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError) as error:
        raise ModelError(f"The weights of the adapter {folder} cannot be read: {error}.") from None
    found = {}
    for name in sorted(tensors):
        if not name.endswith("lora_A.weight"):
            continue
        down, up = tensors[name], tensors.get(name.replace("lora_A", "lora_B"))
        if up is None or not (np.isfinite(down).all() and np.isfinite(up).all()):
            raise ModelError(
                f"{name} of the adapter {folder} " + ("has no lora_B." if up is None else "is not finite."),
                remedy="Train the adapter again.",
            )
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.").removeprefix("model.")
        whole = Factors(np.ascontiguousarray(down.T), np.ascontiguousarray(up.T) * np.float32(scale))
        found[module] = whole
    return found


def _problem(config: Mapping[str, Any]) -> str | None:
    if str(config.get("peft_type")).upper() != "LORA":
        return f"it is of the type {config.get('peft_type')}"
    if config.get("use_dora"):
        return "it holds magnitudes (DoRA)"
    if config.get("bias", "none") != "none":
        return "it changes biases"
    for key in ("modules_to_save", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            return f"it has {key}"
    return None


def node_name(module: str) -> str | None:
    """Where the builder puts a module's product, up to the precision at its end; None for what it does not keep."""
    if module == "lm_head":
        return "/lm_head/MatMul"
    match = _MODULE.fullmatch(module)
    if match is None:
        return None
    layer, part, name = match.groups()
    return f"/model/layers.{layer}/{'attn' if part == 'self_attn' else 'mlp'}/{name}/MatMul"


def divided(module: str, factors: Factors, widths: Mapping[str, int]) -> dict[str, Factors]:
    """A module that the graph has in pieces, piece by piece. ``widths``: of the products in the graph, by node.

    Raises:
        ModelError: the pieces are not as wide as the whole.
    """
    head, _, last = module.rpartition(".")
    pieces = [f"{head}.{name}" for name in FUSED.get(last, ())]
    if not pieces or node_name(module) in widths:
        return {module: factors}
    sizes = [widths.get(node_name(piece) or "", 0) for piece in pieces]
    if sum(sizes) != factors.up.shape[1]:
        raise ModelError(
            f"The adapter changes {module} of {factors.up.shape[1]} rows, where the base has {sum(sizes)}.",
            remedy="Name the model that it was trained on.",
        )
    columns = np.split(factors.up, np.cumsum(sizes)[:-1], axis=1)
    return {piece: Factors(factors.down, np.ascontiguousarray(one)) for piece, one in zip(pieces, columns, strict=True)}


def products(graph: Any) -> dict[str, tuple[Any, tuple[int, int]]]:
    """Products with constant weights in the builder's graph: name without precision to node and ``(in, out)``."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        about = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "MatMul" and shapes.get(node.input[1], ()) and len(shapes[node.input[1]]) == 2:
            found[node.name] = (node, shapes[node.input[1]])
        elif node.op_type == "MatMulNBits":
            found[re.sub(r"_Q\d+$", "", node.name)] = (node, (about["K"], about["N"]))
    return found


def fit_to(model: Any, adapter: Mapping[str, Factors], name: str) -> dict[str, Factors]:
    """The adapter by the graph's own pieces.

    Raises:
        ModelError: a matrix that the graph does not have, or that has another shape.
    """
    there = products(model.graph)
    widths = {key: shape[1] for key, (_, shape) in there.items()}
    fitted: dict[str, Factors] = {}
    for module, factors in adapter.items():
        fitted |= divided(module, factors, widths)
    for module, factors in fitted.items():
        place = there.get(node_name(module) or "")
        wanted = (factors.down.shape[0], factors.up.shape[1])
        if place is None or tuple(place[1]) != wanted:
            has = "which is not there" if place is None else f"which is {place[1][0]} x {place[1][1]}"
            raise ModelError(
                f"The adapter {name} does not fit its base: it changes {module} of {wanted[0]} x {wanted[1]}, {has}.",
                remedy="Name the model that it was trained on.",
            )
    return fitted


def open_ways(model: Any, modules: Iterable[str]) -> None:
    """Give every one of ``modules`` a way around it, in place."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    there = products(graph)
    nodes = list(graph.node)
    for module in sorted(modules):
        node, (inside, outside) = there[node_name(module) or ""]
        output, down, up = node.output[0], *parameter_names(module)
        for name, value, shape in (
            (down, np.zeros((inside, 1), np.float32), [inside, "lora_rank"]),
            (up, np.zeros((1, outside), np.float32), ["lora_rank", outside]),
        ):
            graph.initializer.append(numpy_helper.from_array(value, name))
            graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        node.output[0] = f"{output}.base"
        way = [
            helper.make_node("MatMul", [node.input[0], down], [f"{output}.down"], name=f"{node.name}/lora_A"),
            helper.make_node("MatMul", [f"{output}.down", up], [f"{output}.up"], name=f"{node.name}/lora_B"),
            helper.make_node("Add", [f"{output}.base", f"{output}.up"], [output], name=f"{node.name}/lora"),
        ]
        place = next(number for number, other in enumerate(nodes) if other is node)
        nodes[place + 1 : place + 1] = way
    made = [type(node)() for node in nodes]
    for copy, node in zip(made, nodes, strict=True):
        copy.CopyFrom(node)
    del graph.node[:]
    graph.node.extend(made)


def parameter_names(module: str) -> tuple[str, str]:
    """The graph's inputs for a module's factors."""
    return f"model.{module}.lora_A", f"model.{module}.lora_B"


def write_adapter(adapter: Mapping[str, Factors], path: Path) -> None:
    """The factors as a file of onnxruntime's (``.onnx_adapter``)."""
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    values = {}
    for module, factors in adapter.items():
        for name, value in zip(parameter_names(module), (factors.down, factors.up), strict=True):
            values[name] = onnxruntime.OrtValue.ortvalue_from_numpy(value)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(VERSION)
    made.set_model_version(VERSION)
    made.set_parameters(values)
    made.export_adapter(str(path))
