"""Bottleneck adapters: a small network behind each layer's attention and feed-forward part (Houlsby et al. 2019).

``h + up(activation(down(h)))``, applied to what a part hands back before it is added to the layer's stream; ``up``
starts at zero, so an untrained adapter changes nothing. Placed behind the feed-forward part alone it is Pfeiffer et al.
(2020).

On disk, beside a model that stays as it was: ``bottleneck/config.json`` and ``bottleneck/model.safetensors``. The torch
runtime and the classifiers' loader attach what they find there. Not covered: other engines. Because of the activation a
bottleneck cannot be merged into the weights; conversion refuses such a folder
(:func:`slmops.models.folder.refuse_bottlenecks`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from slmops.errors import ModelError
from slmops.models.folder import BOTTLENECK_FOLDER

ATTRIBUTE = "bottlenecks"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}
_ENDS = {"attention": ("o_proj", "out_proj", "dense", "c_proj"), "feed_forward": ("down_proj", "fc2", "c_proj")}
"""What the last matrix of each part is called."""


@dataclass(frozen=True)
class BottleneckShape:
    size: int
    activation: Literal["relu", "gelu", "silu"] = "gelu"
    after: Literal["both", "feed_forward"] = "both"


class Bottleneck(nn.Module):
    """``[..., width]`` to the same shape."""

    def __init__(self, width: int, shape: BottleneckShape) -> None:
        super().__init__()
        self.down = nn.Linear(width, shape.size)
        self.up = nn.Linear(shape.size, width)
        self.activation = _ACTIVATIONS[shape.activation]
        nn.init.normal_(self.down.weight, std=0.02)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, states: Tensor) -> Tensor:
        added: Tensor = self.up(self.activation(self.down(states)))
        return states + added


def attach_bottlenecks(model: nn.Module, shape: BottleneckShape) -> list[nn.Parameter]:
    """Put fresh bottlenecks into ``model`` (as ``model.bottlenecks``); their parameters.

    Raises:
        ModelError: no layer has the parts that are looked for.
    """
    parts = nn.ModuleDict()
    for name, width, module in _places(model, shape):
        bottleneck = Bottleneck(width, shape)
        parts[name] = bottleneck
        module.register_forward_hook(lambda _module, _inputs, output, part=bottleneck: part(output))
    if not parts:
        raise ModelError(
            f"No bottleneck fits into a {type(model).__name__}: its layers have no part that is known here.",
            remedy="Use train.method: lora.",
        )
    model.add_module(ATTRIBUTE, parts)
    return list(parts.parameters())


def save_bottlenecks(model: nn.Module, shape: BottleneckShape, folder: Path) -> None:
    """Write what :func:`attach_bottlenecks` put in to ``folder``/bottleneck."""
    from safetensors.torch import save_file

    place = folder / BOTTLENECK_FOLDER
    place.mkdir(parents=True, exist_ok=True)
    weights = getattr(model, ATTRIBUTE).state_dict()
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, place / "model.safetensors"
    )
    (place / "config.json").write_text(json.dumps({"method": "bottleneck", **asdict(shape)}, indent=1), "utf-8")


def attach_saved_bottlenecks(model: nn.Module, folder: Path) -> None:
    """Put into ``model`` what lies in ``folder``/bottleneck; nothing where there is no such folder.

    Raises:
        ModelError: it is damaged, or was trained on a model of another shape.
    """
    place = folder / BOTTLENECK_FOLDER
    if not place.is_dir():
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        raw = json.loads((place / "config.json").read_text("utf-8"))
        shape = BottleneckShape(raw["size"], raw["activation"], raw["after"])
        weights = load_file(place / "model.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"The adapter {place} cannot be read: {error}.", remedy="Train it anew.") from None
    attach_bottlenecks(model, shape)
    try:
        getattr(model, ATTRIBUTE).load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(
            f"The adapter {place} does not fit the model: {error}", remedy="Name the model that it was trained on."
        ) from None


def without_bottlenecks(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's own part of its ``state_dict``."""
    return {name: tensor for name, tensor in state.items() if f"{ATTRIBUTE}." not in name}


def _places(model: nn.Module, shape: BottleneckShape) -> Iterator[tuple[str, int, nn.Module]]:
    layers: Any = getattr(getattr(model, "base_model", model), "layers", None)
    for index, layer in enumerate(layers or ()):
        for kind, names in _ENDS.items():
            if kind == "attention" and shape.after == "feed_forward":
                continue
            part = getattr(layer, "self_attn" if kind == "attention" else "mlp", None)
            for name in names:
                last = getattr(part, name, None)
                if isinstance(last, nn.Linear):
                    yield f"layer_{index}_{kind}", last.out_features, last
                    break


def trained_only(model: nn.Module, trained: list[nn.Parameter]) -> None:
    """Freeze all but ``trained``."""
    wanted = {id(parameter) for parameter in trained}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)


__all__ = [
    "Bottleneck",
    "BottleneckShape",
    "attach_bottlenecks",
    "attach_saved_bottlenecks",
    "save_bottlenecks",
    "trained_only",
    "without_bottlenecks",
]
