"""A decoder turned into a classifier: backbone, mean over the tokens, one linear layer.

The mean over all tokens, rather than the last token, lets short texts use every position; measured on intent data it is
also what a narrow student learns best from. A backbone whose ``config.is_causal`` is False sees both sides of each
token, which transformers honours when it builds the mask.

On disk: the layout of transformers (``config.json``, ``model.safetensors``, ``tokenizer.json``) plus ``labels.json``.
The weights of the backbone keep their names below ``backbone.``; the linear layer is ``head.weight`` and ``head.bias``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slmops.errors import ModelError
from slmops.models.bottleneck import attach_saved_bottlenecks, without_bottlenecks
from slmops.models.quiet import quiet_transformers

LABELS_NAME = "labels.json"
WEIGHTS_NAME = "model.safetensors"


class PooledClassifier(nn.Module):
    """Logits over ``labels`` from token ids.

    Shapes: ``input_ids`` and ``attention_mask`` are int64 ``[batch, tokens]``; the result is float32
    ``[batch, labels]``.
    """

    def __init__(self, backbone: nn.Module, labels: tuple[str, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.labels = labels
        config = cast(Any, backbone.config)
        self.head = nn.Linear(config.hidden_size, len(labels))
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self.dropout = nn.Dropout(0.0)

    def with_labels(self, labels: tuple[str, ...]) -> PooledClassifier:
        """The same model over other labels: what it knows of those that it has is kept, new ones begin at nothing."""
        made = PooledClassifier(self.backbone, labels)
        known = {label: row for row, label in enumerate(self.labels)}
        with torch.no_grad():
            for row, label in enumerate(labels):
                if label in known:
                    made.head.weight[row] = self.head.weight[known[label]]
                    made.head.bias[row] = self.head.bias[known[label]]
        made.dropout.p = self.dropout.p
        return made

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        return self.classify(self.pooled(input_ids, attention_mask, inputs_embeds))

    def pooled(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """The mean hidden state over each row's tokens, float32 ``[batch, hidden]``."""
        states = self.backbone(
            input_ids=input_ids, inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return mean_over_tokens(states, attention_mask)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits ``[batch, labels]`` from :meth:`pooled` states."""
        return cast(Tensor, self.head(self.dropout(pooled)))

    @property
    def parameters_count(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())


def mean_over_tokens(states: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``[batch, tokens, hidden]`` to float32 ``[batch, hidden]``; tokens that ``attention_mask`` hides do not count."""
    states = states.float()
    if attention_mask is None:
        return states.mean(dim=1)
    weights = attention_mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def save_classifier(classifier: PooledClassifier, folder: Path) -> None:
    """Write weights, configuration and labels to ``folder`` (the tokenizer is the caller's)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = without_bottlenecks(classifier.state_dict())
    weights = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    config = cast(Any, classifier.backbone.config)
    config.architectures = ["PooledClassifier"]
    config.save_pretrained(folder)
    (folder / LABELS_NAME).write_text(json.dumps(classifier.labels, ensure_ascii=False, indent=1) + "\n", "utf-8")


def load_classifier(folder: Path) -> PooledClassifier:
    """Read what :func:`save_classifier` wrote.

    Raises:
        ModelError: a file is missing, or weights and configuration do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    quiet_transformers()
    try:
        labels = tuple(json.loads((folder / LABELS_NAME).read_text("utf-8")))
        weights = load_file(folder / WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise ModelError(
            f"{folder} is not a classifier: {Path(error.filename or '').name or error} is missing."
        ) from None
    except SafetensorError as error:
        raise ModelError(
            f"{folder / WEIGHTS_NAME} cannot be read: {error}.", remedy="Train or fetch it anew."
        ) from None
    config = AutoConfig.from_pretrained(folder)
    classifier = PooledClassifier(AutoModel.from_config(config), labels)
    try:
        classifier.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{folder}: weights and config.json do not belong together: {error}") from None
    attach_saved_bottlenecks(classifier.backbone, folder)
    return classifier.eval()


def classifier_from_language_model(folder: Path, labels: tuple[str, ...]) -> PooledClassifier:
    """The body of the language model at ``folder`` with a fresh head, in float32."""
    from transformers import AutoModel

    quiet_transformers()
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32)
    backbone.config.use_cache = False
    return PooledClassifier(backbone, labels)
