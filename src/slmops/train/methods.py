"""Full, LoRA, QLoRA, bottleneck: what of a model is trained, and what is written when it was.

A :class:`Tuned` holds the model that trains. However it was trained, the whole model can be written afterwards as plain
weights (LoRA and QLoRA merged, bottlenecks beside), and the adapter for itself.

LoRA: Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024, all by peft. QLoRA: :mod:`.quantized_base`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from slmops.errors import ModelError
from slmops.models.bottleneck import BottleneckShape, attach_bottlenecks, save_bottlenecks, trained_only
from slmops.models.quiet import load_bitsandbytes, quiet_transformers
from slmops.recipe import LoraConfig, TrainConfig
from slmops.train.quantized_base import load_nf4, round_to_nf4

Method = Literal["full", "lora", "qlora", "bottleneck"]


@dataclass
class Tuned:
    """``model``: trains, and answers like the finished one. ``auto_class``: what of transformers reads its base."""

    model: Any
    method: Method
    folder: Path
    auto_class: Any
    shape: BottleneckShape | None = None

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save_adapter(self, folder: Path, base_name: str) -> None:
        """Write the adapter alone, for use with the base again; nothing for ``full``. It holds no path."""
        match self.method:
            case "full":
                return
            case "bottleneck":
                if self.shape is not None:
                    save_bottlenecks(self.model, self.shape, folder)
            case _:
                config = self.model.peft_config["default"]
                config.base_model_name_or_path = base_name
                config.inference_mode = True
                self.model.save_pretrained(folder, save_embedding_layers=False)  # "auto" asks a hub for the base
                (folder / "README.md").unlink(missing_ok=True)

    def whole(self, adapter: Path) -> Any:
        """The model with plain fp32 weights; ``adapter``: where :meth:`save_adapter` wrote."""
        if self.method in {"full", "bottleneck"}:
            return self.model
        base = self.auto_class.from_pretrained(self.folder, dtype=torch.float32)
        if self.method == "qlora":
            round_to_nf4(base)
        from peft import PeftModel

        return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def open_tuned(folder: Path, train: TrainConfig, method: Method, auto_class: Any, *, task_type: str) -> Tuned:
    """Read the model at ``folder`` and make ready to train it by ``method``. ``task_type``: peft's word for the use.

    Raises:
        ModelError: a rank larger than a matrix, targets that the model has not, or no place for a bottleneck.
        MissingExtraError: ``qlora`` without bitsandbytes.
    """
    quiet_transformers()
    if method == "qlora":
        model = load_nf4(folder, auto_class)
    else:
        model = auto_class.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    if train.checkpoint_activations:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    match method:
        case "full":
            return Tuned(model, method, folder, auto_class)
        case "bottleneck":
            shape = BottleneckShape(train.bottleneck.size, train.bottleneck.activation, train.bottleneck.after)
            trained_only(model, attach_bottlenecks(model, shape))
            return Tuned(model, method, folder, auto_class, shape)
        case _:
            return Tuned(add_lora(model, train.lora, task_type), method, folder, auto_class)


def add_lora(model: Any, settings: LoraConfig, task_type: str) -> Any:
    """``model`` wrapped by peft, everything but the adapters frozen."""
    load_bitsandbytes()
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    targets = lora_targets(model, settings.targets)
    check_rank(settings.rank, [(name, (part.out_features, part.in_features)) for name, part in targets])
    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha if settings.alpha is not None else 2 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=sorted({name.rpartition(".")[2] for name, _ in targets}),
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type=task_type,
    )
    return get_peft_model(model, config)


def check_lora(folder: Path, settings: LoraConfig) -> None:
    """Whether adapters fit the language model at ``folder``, by its configuration; no weights are read.

    Raises:
        ModelError: as :func:`open_tuned`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet_transformers()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    targets = lora_targets(model, settings.targets)
    check_rank(settings.rank, [(name, (part.out_features, part.in_features)) for name, part in targets])


def lora_targets(model: Any, wanted: Literal["all-linear"] | Sequence[str]) -> list[tuple[str, nn.Linear]]:
    """The matrices that get adapters: all of the layers, or those whose last name is in ``wanted``.

    Raises:
        ModelError: the model has no matrix of a wanted name; names those that it has.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    matrices = [
        (name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not output
    ]
    if wanted == "all-linear":
        return matrices
    known = {name.rpartition(".")[2] for name, _ in matrices}
    for name in wanted:
        if name not in known:
            raise ModelError(
                f"train.lora.targets names {name}, which is no matrix of a {type(model).__name__}.",
                remedy=f"It has {', '.join(sorted(known))}.",
            )
    return [(name, part) for name, part in matrices if name.rpartition(".")[2] in wanted]


def check_rank(rank: int, shapes: Sequence[tuple[str, tuple[int, int]]]) -> None:
    """Raises :class:`ModelError` where a pair of factors would be larger than the rank that a matrix can have."""
    for name, (rows, columns) in shapes:
        most = min(rows, columns)
        if rank > most:
            raise ModelError(
                f"train.lora.rank is {rank}, but {name} is {rows} x {columns}: its rank is at most {most}.",
                remedy=f"Choose a rank of {most} or less (16 is usual), or other train.lora.targets.",
            )


def learning_rate_of(train: TrainConfig, method: Method, *, full: float) -> float:
    """The recipe's, or what suits the method."""
    usual: dict[Method, float] = {"full": full, "lora": 5e-4, "qlora": 5e-4, "bottleneck": 1e-3}
    return train.learning_rate or usual[method]
