"""In which type each tensor of a GGUF file is stored, and the values in that type.

The mixtures (``q4_k_m`` and its kin) give more bits to the tensors where llama.cpp's own tool gives more: the output
layer, the values' projection and the way down of the feed-forward part in the first, the last and every third layer
between. Where a row cannot be cut into blocks of 256, the next larger type of blocks of 32 takes its place.
The numbers are made by llama.cpp's own kernels, from the library inside xllamacpp (its C interface
``ggml_quantize_chunk``); without it the plain types are made by the package gguf in numpy, and k-quants are refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from slmops.errors import MissingExtraError, UsageError
from slmops.recipe import GgufQuantization

GGUF_QUANTIZATIONS: tuple[GgufQuantization, ...] = get_args(GgufQuantization)
FILE_TYPES: Mapping[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_m": 12,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_m": 17,
    "q6_k": 18,
    "bf16": 32,
}
"""llama.cpp's numbers of these mixtures, for ``general.file_type``."""
SUPER_BLOCK = 256
BLOCK = 32
FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
PLAIN = frozenset({"F32", "F16", "BF16"})
IN_NUMPY = PLAIN | {"Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"}

_BASE = {"q5_k_m": "Q5_K", "q4_k_m": "Q4_K", "q4_k_s": "Q4_K", "q3_k_m": "Q3_K"}
_OUTPUT = frozenset({"output.weight"})


def check_quantization(quantization: str) -> None:
    """Raises :class:`UsageError` for a name that is not known."""
    if quantization not in GGUF_QUANTIZATIONS:
        raise UsageError(
            f"{quantization!r} is no quantization of a GGUF file.",
            remedy=f"Choose one of {', '.join(GGUF_QUANTIZATIONS)}.",
        )


def tensor_type(
    name: str, shape: Sequence[int], quantization: GgufQuantization, *, layers: int, tied: bool, grouped: int = 1
) -> str:
    """The type of one tensor. Pure.

    ``name``: in GGUF. ``shape``: of numpy, the row's length last. ``tied``: the embeddings are the output layer too.
    ``grouped``: heads of queries for each head of keys.
    """
    if len(shape) < 2 or not name.endswith(".weight") or name.startswith("rope_"):
        return "F32"
    plain = quantization.upper()
    if plain in PLAIN:
        return plain
    wanted = _wanted(name, quantization, layers=layers, tied=tied, grouped=grouped)
    row = shape[-1]
    if wanted in FALLBACK and row % SUPER_BLOCK:
        wanted = FALLBACK[wanted]
    return wanted if row % BLOCK == 0 else "F16"


def _wanted(name: str, quantization: str, *, layers: int, tied: bool, grouped: int) -> str:
    base = _BASE.get(quantization, quantization.upper())
    if name in _OUTPUT or (tied and name == "token_embd.weight"):
        return base if base == "Q8_0" else "Q6_K"
    parts = name.split(".")
    if parts[0] != "blk":
        return base
    layer, part = int(parts[1]), parts[2]
    more = use_more_bits(layer, layers)
    match quantization, part:
        case "q5_k_m" | "q4_k_m", "attn_v" | "ffn_down":
            return "Q6_K" if more else base
        case "q5_k_m", "attn_qkv":
            return "Q6_K"
        case "q4_k_m", "attn_qkv":
            return "Q5_K"
        case "q4_k_s", "attn_v":
            return "Q5_K" if layer < 4 else base
        case "q4_k_s", "ffn_down":
            return "Q5_K" if layer < layers // 8 else base
        case "q3_k_m", "attn_v":
            return "Q5_K" if layer < 2 else "Q4_K"
        case "q3_k_m", "ffn_down":
            return "Q5_K" if layer < layers // 16 else "Q4_K" if more else base
        case "q3_k_m", "attn_output" | "attn_qkv":
            return "Q4_K"
        case "q2_k", "attn_v":
            return "Q4_K" if grouped >= 4 else "Q3_K"
        case "q2_k", "ffn_down" | "attn_output" | "attn_qkv":
            return "Q3_K"
    return base


def use_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def check_kernels(types: Sequence[str]) -> None:
    """Raises :class:`MissingExtraError` where a type needs xllamacpp and it is not installed."""
    missing = sorted(set(types) - IN_NUMPY)
    if missing and _library() is None:
        raise MissingExtraError(f"Writing {', '.join(missing)} into a GGUF file", "llamacpp")


def quantize(
    values: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None = None
) -> NDArray[np.uint8]:
    """``values`` (float32, ``[..., row]``) as bytes of that type, ``[..., bytes of a row]``.

    ``importance``: how much each of a row's columns matters, ``[row]`` (mean squares of the activations), where the
    type heeds it.
    """
    import gguf

    numbered = gguf.GGMLQuantizationType[kind]
    library = None if kind in PLAIN else _library()
    if library is None:
        made: NDArray[Any] = gguf.quants.quantize(values, numbered)
        return np.ascontiguousarray(made).view(np.uint8)
    flat = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    block, size = gguf.GGML_QUANT_SIZES[numbered]
    out = np.empty((len(flat), flat.shape[1] // block * size), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    written = library.ggml_quantize_chunk(
        int(numbered),
        flat.ctypes.data,
        out.ctypes.data,
        0,
        len(flat),
        flat.shape[1],
        None if weights is None else weights.ctypes.data,
    )
    if written != out.nbytes:
        raise RuntimeError(f"{kind}: {written} bytes were written where {out.nbytes} were expected")
    return out.reshape(*values.shape[:-1], out.shape[1])


@cache
def _library() -> Any:
    """llama.cpp's kernels, or None."""
    try:
        from xllamacpp import xllamacpp
    except ImportError:
        return None
    library = ctypes.CDLL(xllamacpp.__file__)
    function = getattr(library, "ggml_quantize_chunk", None)
    if function is None:  # a build that shows no C interface
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    function.restype = ctypes.c_size_t
    return library
