"""Where a model comes from, and what it needs before it is loaded.

Three kinds of source, one answer: a folder in the layout of transformers with a digest (:func:`fetch_model`).
Importing this package is cheap: torch, transformers and huggingface_hub are imported by the calls that need them.
"""

from slmops.models.facts import ModelFacts, model_facts
from slmops.models.fetch import fetch_model
from slmops.models.hub import fetch_hub_dataset
from slmops.models.memory import MemoryEstimate, available_memory_bytes, check_memory, estimate_memory
from slmops.models.sources import LocalModel, ModelSource, parse_source

__all__ = [
    "LocalModel",
    "MemoryEstimate",
    "ModelFacts",
    "ModelSource",
    "available_memory_bytes",
    "check_memory",
    "estimate_memory",
    "fetch_hub_dataset",
    "fetch_model",
    "model_facts",
    "parse_source",
]
