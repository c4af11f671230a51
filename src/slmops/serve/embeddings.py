"""``POST /v1/embeddings``: what a model makes of a text, as one vector of length 1."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


def embeddings_body(
    states: NDArray[np.float32], tokens: int, model: str, form: Literal["float", "base64"]
) -> dict[str, Any]:
    """``states``: ``[texts, width]``. ``form``: numbers, or their float32 in little-endian order as base64."""
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": _written(row, form)}
            for index, row in enumerate(unit_length(states))
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def unit_length(states: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row over its length; a row of zeros stays one."""
    lengths = np.linalg.norm(states.astype(np.float64), axis=1, keepdims=True)
    scaled: NDArray[np.float32] = (states / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
    return scaled


def _written(row: NDArray[np.float32], form: str) -> list[float] | str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if form == "base64" else [float(x) for x in row]
