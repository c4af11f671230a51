"""The model under the knife: loaded and checked, taken through its layers one by one, cut, and written again.

Guarantees: what is loaded has finite weights and a known family, or nothing is begun; what is written is a folder of
the same layout, which transformers and the exports of this package read.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from slmops.compress.folder import read_json
from slmops.compress.prune.calibration import CalibrationBatch
from slmops.errors import ModelError
from slmops.models.cut import Cut, Sizes, cut_config, cut_weights, renumbered
from slmops.models.folder import refuse_bottlenecks
from slmops.models.quiet import quiet_transformers
from slmops.models.scaled_logits import scaled_logits

WRITTEN_ANEW = ("config.json", "generation_config.json", "model.safetensors.index.json")
NOT_COPIED = ("history.json", "manifest.json")


@dataclass(frozen=True)
class Subject:
    """A language model (``labels`` None) or a classifier (a :class:`PooledClassifier`), in float32 and not training."""

    model: Any
    config: dict[str, Any]
    labels: tuple[str, ...] | None

    @classmethod
    def load(cls, folder: Path) -> Subject:
        """Read a checkpoint.

        Raises:
            ModelError: the family is unknown, its heads are not grouped evenly, a weight is not finite, or the folder
                is no whole model.
        """
        from transformers import AutoModelForCausalLM

        from slmops.models.classifier import load_classifier

        refuse_bottlenecks(folder)
        config = read_json(folder / "config.json")
        if config.get("quantization_config"):
            raise ModelError(
                f"{folder} is quantized already, and only full weights can be pruned.",
                remedy="Name the model that it was made from.",
            )
        sizes = Sizes.of(config)
        quiet_transformers()
        if (folder / "labels.json").is_file():
            classifier = load_classifier(folder)
            subject = cls(classifier, config, classifier.labels)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            subject = cls(model.eval(), config, None)
        subject.check(sizes)
        return subject

    def check(self, sizes: Sizes) -> None:
        """Raises :class:`ModelError` unless all weights are finite and there are as many layers as the configuration
        says."""
        for name, weight in self.model.named_parameters():
            if not torch.isfinite(weight).all():
                raise ModelError(
                    f"The weight {name} has {int((~torch.isfinite(weight)).sum())} numbers that are not finite.",
                    remedy="Train or fetch the model again: nothing can be measured on this one.",
                )
        if len(self.layers) != sizes.layers:
            raise ModelError(
                f"config.json says {sizes.layers} layers, and there are {len(self.layers)}.",
                remedy="Fetch the model anew.",
            )

    @property
    def sizes(self) -> Sizes:
        return Sizes.of(self.config)

    @property
    def body(self) -> Any:
        """Embeddings, layers and the last norm."""
        return self.model.model if self.labels is None else self.model.backbone

    @property
    def layers(self) -> Sequence[nn.Module]:
        return cast(Sequence[nn.Module], self.body.layers)

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embeddings."""
        if self.labels is not None:
            return True  # a classifier has no output layer over tokens
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    @property
    def parameters(self) -> int:
        """All of them, shared ones once."""
        return sum(weight.numel() for weight in self.model.parameters())

    def part(self, layer: int, name: str) -> nn.Linear | None:
        """A matrix of a layer by the end of its name; None where the family has none of that name."""
        for full, module in self.layers[layer].named_modules():
            if full.rsplit(".", 1)[-1] == name and isinstance(module, nn.Linear):
                return module
        return None

    def matrices(self, layer: int) -> Iterator[tuple[str, nn.Linear]]:
        """All products of a layer, by name."""
        for name, module in self.layers[layer].named_modules():
            if isinstance(module, nn.Linear):
                yield name, module

    def norms(self) -> Iterator[tuple[str, nn.Module]]:
        """All norms over the hidden size, by their name in the body."""
        for name, module in self.body.named_modules():
            if name.endswith(("layernorm",)) or name == "norm":
                yield name, module

    def log_probabilities(self, states: Tensor, batch: CalibrationBatch) -> Tensor:
        """What the model says, from the states behind its last layer: ``[positions that count, tokens]``, or
        ``[rows, labels]``."""
        states = self.body.norm(states)
        if self.labels is not None:
            from slmops.models.classifier import mean_over_tokens

            logits = self.model.classify(mean_over_tokens(states, batch.attention_mask))
        else:
            logits = scaled_logits(self.model.get_output_embeddings()(states[batch.predicts]), self.model.config)
        return cast(Tensor, logits.float().log_softmax(dim=-1))

    def cut(self, cut: Cut) -> Subject:
        """A new model of what ``cut`` leaves; this one stays as it is."""
        config = cut_config(self.config, cut)
        weights = cut_weights(self.model.state_dict(), self.sizes, cut)
        return Subject(_built(config, weights, self.labels), config, self.labels)

    def save(self, folder: Path, *, source: Path, kept_ids: Sequence[int] | None = None) -> None:
        """Write weights and configuration to ``folder``. ``source``: the checkpoint that it was; ``kept_ids``: its ids
        of the tokens that stayed."""
        if self.labels is not None:
            from slmops.models.classifier import save_classifier

            save_classifier(self.model, folder)
            return
        self.model.save_pretrained(folder)
        generation = source / "generation_config.json"
        if generation.is_file():
            raw = read_json(generation)
            if kept_ids is not None:
                raw |= renumbered(raw, kept_ids)
            (folder / "generation_config.json").write_text(json.dumps(raw, indent=1) + "\n", "utf-8")


def copy_beside(source: Path, folder: Path) -> None:
    """What lies beside the weights: tokenizer, template, licence."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (*WRITTEN_ANEW, *NOT_COPIED):
            shutil.copyfile(path, folder / path.name)


def _built(config: dict[str, Any], weights: dict[str, Tensor], labels: tuple[str, ...] | None) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from slmops.models.classifier import PooledClassifier

    quiet_transformers()
    kind = AutoConfig.for_model(**config)
    if "is_causal" in config:
        kind.is_causal = config["is_causal"]
    with no_init_weights():
        if labels is None:
            model = AutoModelForCausalLM.from_config(kind, dtype=torch.float32)
        else:
            model = PooledClassifier(AutoModel.from_config(kind, dtype=torch.float32), labels)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if labels is None:
        model.tie_weights()
    tied = {"lm_head.weight"} if labels is None and kind.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ModelError(
            f"The cut model lacks {sorted(set(missing) - tied)[:3]} and has {sorted(unexpected)[:3]} besides.",
            remedy="Leave compress.prune out for this model, and report it.",
        )
    return model.eval()
