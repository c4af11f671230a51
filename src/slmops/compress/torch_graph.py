"""An ONNX graph of any classifier, by torch's own exporter: the way for architectures without a graph of their own.

Slower to make and to run than :mod:`slmops.compress.llama_graph`. The attention mask is computed outside of
transformers and passed in four dimensions, so that the graph holds no code that looks at the mask's contents.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING, Any, cast

import onnx
import torch
from torch import Tensor, nn

from slmops.models.classifier import mean_over_tokens

if TYPE_CHECKING:
    from slmops.models.classifier import PooledClassifier


class _Exported(nn.Module):
    """The classifier with an additive mask ``[batch, 1, tokens, tokens]``."""

    def __init__(self, classifier: PooledClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.causal = bool(getattr(cast(Any, classifier.backbone).config, "is_causal", True))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        tokens = input_ids.shape[1]
        seen = attention_mask[:, None, None, :].bool()
        if self.causal:
            position = torch.arange(tokens, device=input_ids.device)
            seen = seen & (position[None, :] <= position[:, None])[None, None]
        else:
            seen = seen.expand(-1, -1, tokens, -1)
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        states = self.classifier.backbone(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        pooled = mean_over_tokens(states, attention_mask)
        return self.classifier.classify(pooled), pooled


def torch_graph(classifier: PooledClassifier) -> onnx.ModelProto:
    """The graph in fp32, batch and tokens free. Whatever the exporter raises is raised."""
    # Two tensors, not one twice: the exporter takes the same object for the same input.
    ids, mask = torch.zeros((2, 5), dtype=torch.int64), torch.ones((2, 5), dtype=torch.int64)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    quiet = contextlib.redirect_stdout(io.StringIO())
    with quiet, warnings.catch_warnings(), _muted("torch.onnx", "onnxscript"):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Exported(classifier.eval()),
            (ids, mask),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits", "states"],
            dynamic_shapes=(free, free),
            dynamo=True,
            verbose=False,
        )
    return cast(Any, program).model_proto


@contextlib.contextmanager
def _muted(*names: str) -> Any:
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
