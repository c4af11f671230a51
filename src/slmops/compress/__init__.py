"""Stage 3: a checkpoint becomes a variant, a folder ``model/`` that an engine of a device loads, at one precision.

::

    classifier   closed label sets: an ONNX graph          llama_graph   written node by node, the fast way
    generator    open tasks: a folder for onnxruntime-genai torch_graph  torch's exporter, for the rest
    as_trained   the checkpoint as it is, for torch        precision     fp16, int8, int4 of a graph
    folder       slmops.json, the tokenizer, and proof that the result answers

torch, onnx and the engines are imported when something is exported, not before.
"""

from slmops.compress.as_trained import torch_variant
from slmops.compress.classifier import export_classifier
from slmops.compress.formats import check_formats, export_format
from slmops.compress.generator import SHOWS_STATES, export_generator

__all__ = [
    "SHOWS_STATES",
    "check_formats",
    "export_classifier",
    "export_format",
    "export_generator",
    "torch_variant",
]
"""What the pipeline calls."""
