"""One way to run a model: classify, generate, score. Engines are imported only when one is opened."""

from slmops.runtime.base import (
    Classifier,
    Delta,
    FinishReason,
    Generation,
    GenerationRequest,
    Generator,
    Probabilities,
    TextScore,
)

__all__ = [
    "Classifier",
    "Delta",
    "FinishReason",
    "Generation",
    "GenerationRequest",
    "Generator",
    "Probabilities",
    "TextScore",
]
