"""A smaller model out of a larger one of the same family: which rows, columns and layers of its weights stay.

Pure: weights and configuration in, weights and configuration out; whatever is built from them is an ordinary model of
its family. Guarantees: cutting nothing gives the same weights; a cut through tokens leaves the kept tokens' logits as
they are; tied embeddings stay tied; grouped queries stay grouped evenly.
Not covered: which parts are worth keeping (:mod:`slmops.compress.prune`), families that are not in :data:`FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slmops.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "gemma2", "gemma3_text", "granite")
"""``model_type`` of what can be cut. Phi-4 mini is a phi3, SmolLM2 a llama."""
CENTRED = frozenset({"gemma2", "gemma3_text"})
"""Families whose norms multiply by one plus their weight, and whose embeddings grow with the hidden size."""
LISTED_BY_LAYER = ("layer_types", "no_rope_layers")
"""Entries of a model's configuration that say something of each layer, in order."""
NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "norm",
)
"""Norms over the hidden size; in :data:`CENTRED` families ``post_…`` ones are behind a part, not before."""

_AXES: Mapping[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("tokens", "hidden"),
    "lm_head.weight": ("tokens", "hidden"),
    "head.weight": ("labels", "hidden"),
    "q_proj.weight": ("queries", "hidden"),
    "k_proj.weight": ("keys", "hidden"),
    "v_proj.weight": ("keys", "hidden"),
    "qkv_proj.weight": ("queries+keys+keys", "hidden"),
    "o_proj.weight": ("hidden", "queries"),
    "gate_proj.weight": ("channels", "hidden"),
    "up_proj.weight": ("channels", "hidden"),
    "gate_up_proj.weight": ("channels+channels", "hidden"),
    "down_proj.weight": ("hidden", "channels"),
    "q_norm.weight": ("head",),
    "k_norm.weight": ("head",),
    **{f"{name}.weight": ("hidden",) for name in NORMS},
}
"""What each axis of a weight counts; a bias has the first axis of its weight."""
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """The numbers that a cut changes. ``heads`` (queries) is a multiple of ``groups`` (keys and values)."""

    layers: int
    hidden: int
    heads: int
    groups: int
    head_size: int
    channels: int
    tokens: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """Of a ``config.json``.

        Raises:
            ModelError: the family is not known here, or the heads do not share keys and values evenly.
        """
        kind = config.get("model_type")
        if kind not in FAMILIES:
            raise ModelError(
                f"A model of the type {kind} cannot be pruned: where its parts are is not known here.",
                remedy=f"Known are {', '.join(FAMILIES)}. Leave compress.prune out for this one.",
            )
        heads = int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        if heads % groups:
            raise ModelError(
                f"The model has {heads} heads for queries and {groups} for keys and values, which is not a multiple.",
                remedy="Its config.json is damaged: fetch the model anew.",
            )
        hidden = int(config["hidden_size"])
        head_size = config.get("head_dim")
        if head_size is None and hidden % heads:
            raise ModelError(
                f"The model's {heads} heads do not divide its hidden size {hidden}, and it names no head_dim.",
                remedy="Its config.json is damaged: fetch the model anew.",
            )
        return cls(
            int(config["num_hidden_layers"]),
            hidden,
            heads,
            groups,
            int(head_size or hidden // heads),
            int(config["intermediate_size"]),
            int(config["vocab_size"]),
        )

    def layer_parameters(self) -> int:
        """Of one layer's matrices."""
        attention = self.head_size * (2 * self.heads + 2 * self.groups)
        return self.hidden * (attention + 3 * self.channels)

    def parameters(self, *, tied: bool) -> int:
        """Of all matrices: the layers', the embeddings', and the output layer's where it is not the embeddings."""
        return self.layers * self.layer_parameters() + self.tokens * self.hidden * (1 if tied else 2)


@dataclass(frozen=True)
class Cut:
    """What stays, by number in the order in which it stays; None: all of it.

    ``heads`` and ``channels``: of each layer that stays. ``heads`` are those of queries; in each layer every group
    that stays has equally many of them, next to one another.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    channels: tuple[tuple[int, ...], ...] | None = None
    hidden: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None

    def sizes(self, before: Sizes) -> Sizes:
        """The sizes after the cut."""
        heads, groups = before.heads, before.groups
        if self.heads is not None:
            each = before.heads // before.groups
            heads, groups = len(self.heads[0]), len({head // each for head in self.heads[0]})
        return replace(
            before,
            layers=before.layers if self.layers is None else len(self.layers),
            hidden=before.hidden if self.hidden is None else len(self.hidden),
            heads=heads,
            groups=groups,
            channels=before.channels if self.channels is None else len(self.channels[0]),
            tokens=before.tokens if self.tokens is None else len(self.tokens),
        )


def cut_weights(weights: Mapping[str, Tensor], sizes: Sizes, cut: Cut) -> dict[str, Tensor]:
    """``weights`` (a state dict, tied ones under both names or one) of a model of ``sizes``, cut.

    Raises:
        ModelError: a weight whose place in the model is not known.
    """
    import torch

    layers = range(sizes.layers) if cut.layers is None else cut.layers
    place = {old: new for new, old in enumerate(layers)}
    kept: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found = _LAYER.search(name)
        number = None if found is None else place.get(int(found[1]))
        if found is not None and number is None:
            continue
        result = tensor
        for axis, what in enumerate(_axes_of(name, tensor)):
            indices = _indices(what, sizes, cut, number)
            if indices is not None:
                result = result.index_select(axis, torch.tensor(indices, device=tensor.device))
        kept[_LAYER.sub(f"layers.{number}.", name, count=1)] = tensor.clone() if result is tensor else result
    return kept


def cut_config(config: Mapping[str, Any], cut: Cut) -> dict[str, Any]:
    """The ``config.json`` of the model after the cut."""
    before = Sizes.of(config)
    after = cut.sizes(before)
    new = dict(config)
    new |= {
        "num_hidden_layers": after.layers,
        "hidden_size": after.hidden,
        "num_attention_heads": after.heads,
        "num_key_value_heads": after.groups,
        "head_dim": after.head_size,
        "intermediate_size": after.channels,
        "vocab_size": after.tokens,
    }
    if cut.layers is not None:
        for name in LISTED_BY_LAYER:
            if listed := config.get(name):
                new[name] = [listed[index] for index in cut.layers]
        if "max_window_layers" in config:
            # From which layer on the window slides; layer_types says it better and is what counts.
            new["max_window_layers"] = sum(index < config["max_window_layers"] for index in cut.layers)
    if cut.tokens is not None:
        new |= {name: value for name, value in renumbered(new, cut.tokens).items() if name in config}
    return new


def renumber_special_ids(config: Any, kept_ids: Sequence[int]) -> None:
    """``bos_token_id`` and its like in a configuration of transformers, after the vocabulary was trimmed."""
    names = {name: getattr(config, name, None) for name in _SPECIAL_IDS}
    for name, value in renumbered(names, kept_ids).items():
        setattr(config, name, value)


def evenly_spread(count: int, available: int) -> list[int]:
    """``count`` of ``range(available)``, evenly, with both ends where there is room for them."""
    if count == 1:
        return [0]
    return [round(index * (available - 1) / (count - 1)) for index in range(count)]


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def renumbered(named: Mapping[str, Any], kept_ids: Sequence[int]) -> dict[str, Any]:
    """Those of ``bos_token_id`` and its like that ``named`` has, by their new ids."""
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    found: dict[str, Any] = {}
    for name in _SPECIAL_IDS:
        old = named.get(name)
        if isinstance(old, list):
            found[name] = [new_ids[i] for i in old if i in new_ids]
        elif old is not None:
            found[name] = new_ids.get(old)
    return found


def _axes_of(name: str, tensor: Tensor) -> tuple[str, ...]:
    *_, module, kind = name.rsplit(".", 2)
    axes = _AXES.get(f"{module}.weight")
    if axes is not None and kind == "bias":
        axes = axes[:1]
    if axes is None or len(axes) != tensor.ndim:
        raise ModelError(
            f"The model has a weight {name} of shape {list(tensor.shape)}, whose place is not known here.",
            remedy="Leave compress.prune out for this model.",
        )
    return axes


def _indices(what: str, sizes: Sizes, cut: Cut, layer: int | None) -> list[int] | None:
    """Of one axis: what stays of it; None for all. ``layer``: its new number."""
    if "+" in what:
        return _joined(what.split("+"), sizes, cut, layer)
    match what:
        case "hidden":
            return None if cut.hidden is None else list(cut.hidden)
        case "tokens":
            return None if cut.tokens is None else list(cut.tokens)
        case "channels":
            return None if cut.channels is None or layer is None else list(cut.channels[layer])
        case "queries" | "keys":
            if cut.heads is None or layer is None:
                return None
            heads: Sequence[int] = cut.heads[layer]
            if what == "keys":
                heads = sorted({head * sizes.groups // sizes.heads for head in heads})
            return [head * sizes.head_size + offset for head in heads for offset in range(sizes.head_size)]
        case _:
            return None


def _joined(parts: Sequence[str], sizes: Sizes, cut: Cut, layer: int | None) -> list[int] | None:
    """Of matrices that are stored as one, below one another."""
    lengths = {
        "queries": sizes.heads * sizes.head_size,
        "keys": sizes.groups * sizes.head_size,
        "channels": sizes.channels,
    }
    found, offset, any_cut = [], 0, False
    for part in parts:
        indices = _indices(part, sizes, cut, layer)
        any_cut |= indices is not None
        found += [offset + index for index in (range(lengths[part]) if indices is None else indices)]
        offset += lengths[part]
    return found if any_cut else None
