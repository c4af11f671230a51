"""The child process that writes OpenVINO's intermediate representation: ``python -m slmops.compress.openvino_child
REQUEST.json``, where the request is ``{"checkpoint", "output", "precision", "tokenizer"}``.

transformers' own model is traced once, with its masks computed outside of it and its cache as inputs and outputs, which
then become states inside the graph. Inputs are named as OpenVINO GenAI expects them, so its pipeline runs the folder
too. Tracing prints and keeps memory; none of it reaches the process that asked. Exit code 0 says only that the end was
reached: the caller looks at what was written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")
GROUP = 32
"""Numbers that share a scale at 4 bits: divides the width of every small model."""


def main(arguments: list[str]) -> None:
    request = json.loads(Path(arguments[0]).read_text("utf-8"))
    from slmops.runtime.openvino import GRAPH_NAME, import_openvino

    openvino = import_openvino()
    folder, output = Path(request["checkpoint"]), Path(request["output"])
    output.mkdir(parents=True, exist_ok=True)
    graph = traced(folder)
    graph = narrowed(graph, request["precision"])
    openvino.save_model(graph, output / GRAPH_NAME, compress_to_fp16=request["precision"] == "fp16")
    if request["tokenizer"]:
        write_tokenizer(folder, output)


class Past:
    """The cache of a traced model: what was there is concatenated with what comes, and remembered."""

    def __init__(self, states: list[Tensor]) -> None:
        self.states = states

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for place, new in ((2 * layer, keys), (2 * layer + 1, values)):
            self.states[place] = torch.cat([self.states[place], new], dim=2)
        return self.states[2 * layer], self.states[2 * layer + 1]

    def get_seq_length(self, *_: Any) -> int:
        return int(self.states[0].shape[2])


class Traced(nn.Module):
    """``input_ids [batch, tokens]``, ``attention_mask [batch, past + tokens]``, ``position_ids [batch, tokens]``,
    ``beam_idx [batch]`` and the cache to logits ``[batch, tokens, vocabulary]`` and the cache."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.window: int = getattr(config, "sliding_window", None) or 0
        self.mixed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.narrow = not self.mixed and bool(self.window) and getattr(config, "use_sliding_window", True)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        past = Past([state.index_select(0, beam_idx) for state in states])
        tokens, total = input_ids.shape[1], attention_mask.shape[1]
        rows = torch.arange(total)[total - tokens :, None]
        columns = torch.arange(total)[None, :]
        seen = attention_mask[:, None, None, :].bool()
        full = self._additive(seen & (columns <= rows)[None, None])
        mask: Any = full
        if self.mixed or self.narrow:
            near = self._additive(seen & ((columns <= rows) & (columns > rows - self.window))[None, None])
            mask = {"full_attention": full, "sliding_attention": near} if self.mixed else near
        answer = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=past, use_cache=True
        )
        return (answer.logits, *past.states)

    @staticmethod
    def _additive(seen: Tensor) -> Tensor:
        return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def traced(folder: Path) -> Any:
    """The model at ``folder`` as a graph that keeps its cache."""
    from openvino import PartialShape, Type, convert_model  # type: ignore[import-not-found, unused-ignore]
    from openvino._offline_transformations import (  # type: ignore[import-not-found, unused-ignore]
        apply_make_stateful_transformation,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers
    past, tokens, batch = 3, 2, 2
    example = (
        torch.ones((batch, tokens), dtype=torch.int64),
        torch.ones((batch, past + tokens), dtype=torch.int64),
        torch.arange(past, past + tokens)[None].repeat(batch, 1),
        torch.arange(batch, dtype=torch.int32),
        *(torch.randn(batch, heads, past, size) for _ in range(2 * layers)),
    )
    with torch.no_grad():
        graph = convert_model(
            cast(Any, torch.jit).trace(Traced(model), example, check_trace=False, strict=False), example_input=example
        )
    names = [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    for port, name in zip(graph.inputs, (*INPUTS, *names), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        shape = [-1, heads, -1, size] if name in names else [-1] if name == "beam_idx" else [-1, -1]
        port.get_node().set_partial_shape(PartialShape(shape))
        if name not in names:
            port.get_node().set_element_type(Type.i32 if name == "beam_idx" else Type.i64)
    outs = ["logits", *(name.replace("past_key_values", "present") for name in names)]
    for port, name in zip(graph.outputs, outs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(graph, dict(zip(names, outs[1:], strict=True)))
    start_empty(graph, heads, size)
    graph.set_rt_info("slmops", "framework")
    return graph


def start_empty(graph: Any, heads: int, size: int) -> None:
    """A state that nobody has written has no tokens, and as many rows as the ids."""
    import numpy as np
    from openvino import opset13 as ops  # type: ignore[attr-defined, unused-ignore]

    ids = next(port for port in graph.inputs if "input_ids" in port.get_names())
    shape = ops.shape_of(ids, output_type="i64")
    rows = ops.gather(shape, ops.constant(np.array([0], np.int64)), ops.constant(np.int64(0)))
    for node in graph.get_ops():
        if node.get_type_name() != "ReadValue":
            continue
        rest = [ops.constant(np.array([number], np.int64)) for number in (heads, 0, size)]
        whole = ops.concat([rows, *rest], axis=0)
        node.set_arguments([ops.broadcast(ops.constant(np.float32(0)), whole).output(0)])
    graph.validate_nodes_and_infer_types()


def narrowed(graph: Any, precision: str) -> Any:
    """Weights in 8 bits with a scale a row, or in 4 bits with a scale for :data:`GROUP` of them; embeddings too."""
    if precision in ("fp32", "fp16"):
        return graph
    import nncf  # type: ignore[import-not-found, unused-ignore]

    if precision == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.compress_weights(
        graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0, all_layers=True
    )


def write_tokenizer(folder: Path, output: Path) -> None:
    """Tokenizer and detokenizer as graphs, for OpenVINO GenAI, which brings none of its own."""
    import openvino
    from openvino_tokenizers import convert_tokenizer  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for name, graph in zip(
        ("openvino_tokenizer", "openvino_detokenizer"),
        convert_tokenizer(tokenizer, with_detokenizer=True),
        strict=True,
    ):
        openvino.save_model(graph, output / f"{name}.xml")


if __name__ == "__main__":
    main(sys.argv[1:])
