"""Sizes against what is often said: int8 is 0.25 of fp32, int4 0.125.

SmolLM2-135M as trained here, in every precision and by several algorithms and block sizes: bytes of the files with
weights beside those of fp32, embeddings counted (and stored once where tied). ``bits`` are those of a weight, scales
included. The peer of each row is the share that is often said.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import onnx

from benchmarks.common import say, spread
from benchmarks.int4_quality import WEIGHTS, Forms
from benchmarks.trained import trained_weights
from slmops.compress.quantize.folder import quantize_folder
from slmops.recipe import QuantizeConfig

SAID = {"fp32": 1.0, "fp16": 0.5, "int8": 0.25, "int4": 0.125}
BUILT = ("fp32", "fp16", "int8", "builder int4", "gguf q8_0", "gguf q4_0", "gguf q4_k_m")
QUICK_BUILT = ("fp32", "fp16")
SETTINGS: dict[str, dict[str, Any]] = {
    "int4, blocks of 16": {"block_size": 16},
    "int4, blocks of 32": {},
    "int4, blocks of 32 with zeros": {"symmetric": False},
    "int4, blocks of 64": {"block_size": 64},
    "int8, blocks of 32": {"bits": 8},
    "int8, blocks of 64": {"bits": 8, "block_size": 64},
}


def run(options: argparse.Namespace) -> dict[str, Any]:
    trained = trained_weights(options)
    forms = Forms(trained, options.store, quick=options.quick)
    sizes = {name: bytes_in(forms.made(name)) for name in (QUICK_BUILT if options.quick else BUILT)}
    wide = forms.made("fp32")
    sizes |= {name: rounded_bytes(wide, settings) for name, settings in SETTINGS.items()}
    numbers = weights_of(wide)
    table = {}
    for name, size in sizes.items():
        said = next(share for word, share in SAID.items() if word in name.replace("gguf q", "int"))
        table[name] = {
            "bytes": size,
            "of fp32": size / sizes["fp32"],
            "said": said,
            "bits": 8 * size / numbers,
        }
        say(f"{name:32} {size / 1e6:8.2f} MB  {size / sizes['fp32']:.4f}  (said: {said:g})")
    ours = table["int4, blocks of 32"]
    return {
        "ours": ours["of fp32"],
        "peer": ours["said"],
        "ratio": ours["of fp32"] / ours["said"],
        "spread": spread([entry["of fp32"] / entry["said"] for entry in table.values() if entry["said"] < 0.5]),
        "target": "a table",
        "passed": True,
        "table": table,
        "parameters": numbers,
    }


def rounded_bytes(wide: Path, settings: dict[str, Any]) -> int:
    """Bytes in that grid: sizes do not depend on the algorithm, so the quickest one rounds."""
    place = wide.parent.parent / "sizes"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(wide, place)
    try:
        quantize_folder(place, QuantizeConfig(algorithm="rtn", **settings), [])
        return bytes_in(place)
    finally:
        shutil.rmtree(place)


def bytes_in(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in WEIGHTS if (folder / name).exists())


def weights_of(wide: Path) -> int:
    """Numbers in matrices; embeddings that are tied count once."""
    from slmops.compress.quantize.graph import matrices_of

    model = onnx.load(wide / "model.onnx", load_external_data=False)
    return sum(matrix.rows * matrix.width for matrix in matrices_of(model))
