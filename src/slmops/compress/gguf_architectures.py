"""What a checkpoint's ``config.json`` and tensors are called in a GGUF file, one architecture at a time.

Guarantees: every tensor of the checkpoint has a place in the file or the export is refused; a kind of rotary scaling or
a layout of layers that llama.cpp would compute otherwise than transformers is refused too, never guessed.
Not covered: mixtures of experts, vision parts, sliding windows of Mistral.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slmops.errors import ConversionError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Array = NDArray[Any]
REMEDY = "Use the format onnx or openvino for this model."


@dataclass(frozen=True)
class Architecture:
    """
    ``name``         in GGUF
    ``interleaved``  llama.cpp turns neighbouring pairs of a head, so the rows of q and k change places
    ``shifted_norm`` the norms' weights are stored as their distance from 1
    """

    name: str
    interleaved: bool = False
    shifted_norm: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", interleaved=True),
    "mistral": Architecture("llama", interleaved=True),
    "smollm3": Architecture("smollm3", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3"),
    "gemma3_text": Architecture("gemma3", shifted_norm=True),
}
"""By ``model_type``. SmolLM and SmolLM2 are Llamas; Phi-4 mini is a Phi-3."""
GEMMA3_PERIOD = 6
SMOLLM3_PERIOD = 4


def find_architecture(config: Mapping[str, Any], folder: object) -> Architecture:
    """Raises :class:`ConversionError` for a model that is not known here, or that llama.cpp would run otherwise."""
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        raise ConversionError(
            f"{folder} is a model of the type {kind!r}, which cannot be written as GGUF here "
            f"(known: {', '.join(ARCHITECTURES)}).",
            remedy=REMEDY,
        )
    problem = _problem(kind, config)
    if problem:
        raise ConversionError(f"{folder}: {problem}", remedy=REMEDY)
    return ARCHITECTURES[kind]


def _problem(kind: str, config: Mapping[str, Any]) -> str | None:
    layers = int(config["num_hidden_layers"])
    if kind == "mistral" and config.get("sliding_window"):
        return "its attention has a sliding window, which llama.cpp does not know of a Mistral."
    if config.get("mlp_bias") or (kind in {"llama", "mistral", "smollm3"} and config.get("attention_bias")):
        return "its layers have biases, which llama.cpp does not read in this architecture."
    if kind == "smollm3":
        expected = [int((layer + 1) % SMOLLM3_PERIOD != 0) for layer in range(layers)]
        if list(config.get("no_rope_layers") or expected) != expected:
            return f"llama.cpp leaves rotary positions out in every {SMOLLM3_PERIOD}th layer, this model in others."
    if kind == "gemma3_text":
        kinds = config.get("layer_types")
        expected_kinds = [
            "full_attention" if (layer + 1) % GEMMA3_PERIOD == 0 else "sliding_attention" for layer in range(layers)
        ]
        if kinds is not None and list(kinds) != expected_kinds:
            return f"llama.cpp lets every {GEMMA3_PERIOD}th layer of a Gemma 3 see all tokens, this model lets others."
        if float(config.get("query_pre_attn_scalar") or head_dim(config)) != head_dim(config):
            return "its queries are scaled by something else than the size of a head."
    rope = _rope(config)
    if rope["rope_type"] not in {"default", "linear", "llama3", "longrope", "su"}:
        return f"its rotary scaling {rope['rope_type']!r} is not known."
    return None


def context_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens llama.cpp and transformers compute alike. llama.cpp lets a Phi-3 see beyond its sliding window,
    and chooses between the factors for short and long texts by the context that was opened, not by the text."""
    tokens = int(config["max_position_embeddings"])
    if config["model_type"] == "phi3":
        tokens = min(tokens, int(config.get("sliding_window") or tokens))
        if _rope(config)["rope_type"] in {"longrope", "su"}:
            tokens = min(tokens, int(config.get("original_max_position_embeddings") or tokens))
    return tokens


def head_dim(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of the layers that see all tokens, whichever transformers wrote them."""
    raw = config.get("rope_parameters") or {}
    if "full_attention" in raw:
        raw = raw["full_attention"]
    scaling = config.get("rope_scaling") or {}
    found = {"rope_theta": config.get("rope_theta", 10_000.0), **scaling, **raw}
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return found


def write_configuration(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """The model's keys. ``writer``: opened for the architecture."""
    from gguf import RopeScalingType

    kind = config["model_type"]
    head = head_dim(config)
    rope = _rope(config)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(context_tokens(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or config["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * float(rope["partial_rotary_factor"])))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "phi3":
        original = int(config.get("original_max_position_embeddings") or config["max_position_embeddings"])
        writer.add_rope_scaling_orig_ctx_len(original)
        if rope["rope_type"] in {"longrope", "su"}:
            scale = int(config["max_position_embeddings"]) / original
            factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or factor))
    if kind == "gemma3_text":
        local = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
        writer.add_rope_freq_base_swa(float(local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0))
    if config.get("sliding_window") and kind == "gemma3_text":
        writer.add_sliding_window(int(config["sliding_window"]))
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(float(config["final_logit_softcapping"]))


def extra_tensors(config: Mapping[str, Any]) -> dict[str, Array]:
    """Rotary factors that GGUF keeps as tensors: of Llama 3 (``[head / 2]``) and of Phi's long contexts."""
    rope = _rope(config)
    if rope["rope_type"] in {"longrope", "su"}:
        return {
            f"rope_factors_{length}.weight": np.asarray(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    if rope["rope_type"] != "llama3":
        return {}
    size = head_dim(config)
    wave = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, size, 2, dtype=np.float64) / size)
    low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
    original = float(rope["original_max_position_embeddings"])
    smooth = np.clip((original / wave - low) / (high - low), 0.0, 1.0)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)}


def placed(
    architecture: Architecture, config: Mapping[str, Any]
) -> Callable[[str], tuple[str, Callable[[Array], Array]] | None]:
    """A function from a tensor's name in the checkpoint to its name in GGUF and what is done to its values; None for
    one that is left out (an output layer that is the embeddings)."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(arch, int(config["num_hidden_layers"]))
    heads = int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads") or heads)

    def place(name: str) -> tuple[str, Callable[[Array], Array]] | None:
        if name == "lm_head.weight" and config.get("tie_word_embeddings", False):
            return None
        if name.endswith(".rotary_emb.inv_freq"):
            return None
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConversionError(
                f"The weight {name} has no place in a GGUF file of a {architecture.name}.", remedy=REMEDY
            )
        part = name.rsplit(".", 2)[-2]
        if architecture.interleaved and part in {"q_proj", "k_proj"}:
            return str(found), lambda values: interleave(values, heads if part == "q_proj" else kv_heads)
        if architecture.shifted_norm and name.endswith("norm.weight"):
            return str(found), lambda values: values + 1
        return str(found), lambda values: values

    return place


def interleave(values: Array, heads: int) -> Array:
    """Rows of each head from (first half, second half) to pairs. ``[heads * size, ...]`` in and out."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )
