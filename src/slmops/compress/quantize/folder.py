"""A folder with an fp32 graph becomes one in few bits, as :class:`slmops.recipe.QuantizeConfig` says.

Guarantees: weights that are not finite, blocks that do not divide a matrix and a size that cannot be met are refused by
name; a matrix that is embeddings and output layer at once is stored once.
Not covered: how much it costs. That is measured by the stage evaluate.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slmops.compress.sound import not_finite
from slmops.errors import ConversionError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import CALIBRATED, QuantizeConfig

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

    from slmops.compress.quantize.graph import Matrix
    from slmops.compress.quantize.statistics import TokenRow
    from slmops.models.grid import Grid, Quantized

GRAPH_NAME, DATA_NAME = "model.onnx", "model.onnx.data"
DIVISORS = (128, 64, 32, 16)
DEFAULT_BLOCKS = (32, 16)
MORE_BITS = 8
NODES_BYTES = 1024
"""At most, what the graph itself grows by for a matrix."""
SENSITIVITY_ROWS = 8
"""Rows on which the harm of each matrix is measured: the graph runs once a matrix."""


def quantize_folder(
    folder: Path, settings: QuantizeConfig, rows: Sequence[TokenRow], *, progress: ProgressSink = ignore
) -> dict[str, Any]:
    """Rewrite the fp32 graph in ``folder``; what was decided, for the manifest.

    Raises:
        ConversionError: a weight is not finite, blocks do not divide a matrix, or ``size_mb`` cannot be met.
    """
    import onnx

    from slmops.compress.graph_files import save_graph
    from slmops.compress.quantize.graph import matrices_of, with_codes

    model = onnx.load(folder / GRAPH_NAME)
    matrices = matrices_of(model)
    check_matrices(model, matrices, settings.block_size)
    work = _Work(folder, model, matrices, settings, rows, _head_size(folder), progress)
    if settings.activations != "blocks":
        return work.quantize_activations()
    codes = work.codes()
    told: dict[str, Any] = {"powers": work.powers} if work.powers else {}
    if settings.size_mb is not None:
        more = work.more_bits(codes, int(settings.size_mb * 1e6))
        told["in_8_bits"] = sorted(more)
        told["harm"] = {name: float(f"{harm:.4g}") for name, harm in work.harm.items()}
        codes = {**codes, **more}
    external = True if (folder / DATA_NAME).exists() else None
    save_graph(with_codes(model, codes), folder, external=external)
    return told


def in_four_bits(model: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` in 4 bits without calibration: to the nearest, as the builder does it, with scales in half precision;
    blocks of 32, or of 16 where rows of embeddings are read whose width 32 does not divide (where neither does, these
    stay wide)."""
    from slmops.compress.quantize.graph import matrices_of, with_codes
    from slmops.models.grid import Grid, nearest

    codes = {}
    for matrix in matrices_of(model):
        block_size = next((size for size in DEFAULT_BLOCKS if not matrix.reads or matrix.width % size == 0), None)
        if block_size is not None:
            codes[matrix.name] = nearest(matrix.of(model), Grid(4, block_size))
    return with_codes(model, codes)


def check_matrices(model: onnx.ModelProto, matrices: Sequence[Matrix], block_size: int) -> None:
    """Raises :class:`ConversionError` for a weight that is not finite, or that blocks of this size do not divide."""
    for matrix in matrices:
        if matrix.width % block_size:
            fitting = [size for size in DIVISORS if all(one.width % size == 0 for one in matrices)]
            raise ConversionError(
                f"Blocks of {block_size} do not divide the {matrix.width} columns of {matrix.name}.",
                remedy=f"Set block_size to {' or '.join(map(str, fitting))}."
                if fitting
                else "Leave compress.quantize out: precisions int8 and int4 fill the last block up.",
            )
        if not matrix.of(model).isfinite().all():
            raise not_finite(matrix.name, "the graph")


@dataclass
class _Work:
    """One folder at work. ``powers``: of AWQ, by input. ``harm``: by matrix, where it was measured."""

    folder: Path
    model: onnx.ModelProto
    matrices: Sequence[Matrix]
    settings: QuantizeConfig
    rows: Sequence[TokenRow]
    head_size: int
    progress: ProgressSink
    powers: dict[str, float] = field(default_factory=dict)
    harm: Mapping[str, float] = field(default_factory=dict)

    def grid(self, bits: int | None = None) -> Grid:
        from slmops.models.grid import Grid

        return Grid(bits or self.settings.bits, self.settings.block_size, self.settings.symmetric)

    def codes(self) -> dict[str, Quantized]:
        """Every matrix on the grid."""
        if self.settings.algorithm not in CALIBRATED:
            return {one.name: self._rounded(one) for one in self._counted(self.matrices)}
        return self._scaled_codes() if self.settings.algorithm == "awq" else self._gptq_codes()

    def _rounded(self, matrix: Matrix) -> Quantized:
        from slmops.compress.quantize.rounding import hqq, k_quant
        from slmops.models.grid import nearest

        # Reading rows knows no zeros between codes.
        algorithm = "k_quant" if matrix.reads and self.settings.algorithm == "hqq" else self.settings.algorithm
        weight = matrix.of(self.model)
        match algorithm:
            case "rtn":
                return nearest(weight, self.grid())
            case "hqq":
                return hqq(weight, self.grid())
            case _:
                return k_quant(weight, self.grid())

    def _gptq_codes(self) -> dict[str, Quantized]:
        from slmops.compress.quantize.gptq import gptq
        from slmops.compress.quantize.rounding import k_quant

        found = {}
        done = 0
        for grams in self._grams():
            for matrix in (one for one in self.matrices if one.input in grams):
                found[matrix.name] = gptq(matrix.of(self.model), grams[matrix.input], self.grid())
                done += 1
                self._tell(done)
        for matrix in self.matrices:
            if not matrix.input:
                found[matrix.name] = k_quant(matrix.of(self.model), self.grid())
        return found

    def _scaled_codes(self) -> dict[str, Quantized]:
        """AWQ: the model is changed in place and written, then rounded."""
        from slmops.compress.graph_files import save_graph
        from slmops.compress.quantize.awq import factors, places_of, scaled
        from slmops.compress.quantize.rounding import importance_of, k_quant

        places = {place.input: place for place in places_of(self.model, self.matrices)}
        found: dict[str, Tensor] = {}
        importance: dict[str, Tensor] = {}
        for grams in self._grams():
            for name, gram in grams.items():
                importance[name] = importance_of(gram)
                if name in places:
                    read = [one.of(self.model) for one in self.matrices if one.input == name]
                    found[name], self.powers[name] = factors(read, gram, self.grid(), k_quant)
                    importance[name] = importance[name] / found[name].square()
                self._tell(len(importance))
        scaled(self.model, self.matrices, found, list(places.values()))
        save_graph(self.model, self.folder, external=True)
        return {
            one.name: k_quant(one.of(self.model), self.grid(), importance.get(one.input))
            for one in self._counted(self.matrices)
        }

    def more_bits(self, codes: Mapping[str, Quantized], limit_bytes: int) -> dict[str, Quantized]:
        """Those that get 8 bits, so that all files together stay below ``limit_bytes``."""
        from slmops.compress.quantize.rounding import k_quant
        from slmops.compress.quantize.sensitivity import Choice, harms, share_out

        grid = self.grid(MORE_BITS)
        few = {name: found.size_bytes for name, found in codes.items()}
        more = {one.name: grid.bytes_of(one.rows, one.width) for one in self.matrices}
        left = limit_bytes - self._bytes_besides()
        share_out([Choice(name, few[name], more[name], 0.0) for name in codes], left)  # refused before the work
        self.harm = harms(
            self.folder,
            self.matrices,
            lambda one: codes[one.name].wide(),
            self.rows[:SENSITIVITY_ROWS],
            self.head_size,
            lambda done: self.progress(
                Progress("weigh matrices", done, len(self.matrices), "matrices", f"{done} of {len(self.matrices)}")
            ),
        )
        chosen = share_out([Choice(name, few[name], more[name], self.harm[name]) for name in codes], left)
        return {one.name: k_quant(one.of(self.model), grid) for one in self.matrices if one.name in chosen}

    def quantize_activations(self) -> dict[str, Any]:
        """Embeddings and the output layer in blocks of 8 bits; all other products in 8 bits with their inputs."""
        from slmops.compress.graph_files import save_graph
        from slmops.compress.quantize.activations import quantize_activations
        from slmops.compress.quantize.graph import with_codes
        from slmops.compress.quantize.rounding import k_quant

        ends = {output.name for output in self.model.graph.output}
        last = {node.name for node in self.model.graph.node if ends & set(node.output)}
        apart = [one for one in self.matrices if one.reads or last & set(one.products)]
        model = with_codes(self.model, {one.name: k_quant(one.of(self.model), self.grid()) for one in apart})
        save_graph(model, self.folder, external=True)
        assert self.settings.activations != "blocks"
        quantize_activations(self.folder, self.settings.activations, self.rows, self.head_size)
        return {"in_blocks": [one.name for one in apart]}

    def _bytes_besides(self) -> int:
        """Of everything in the folder but the matrices."""
        names = {one.name for one in self.matrices}
        constants = sum(tensor.ByteSize() for tensor in self.model.graph.initializer if tensor.name not in names)
        files = [path for path in self.folder.iterdir() if path.is_file() and path.name != DATA_NAME]
        besides: int = constants + sum(path.stat().st_size for path in files) + NODES_BYTES * len(self.matrices)
        return besides

    def _grams(self) -> Iterable[dict[str, Tensor]]:
        from slmops.compress.quantize.statistics import grams

        inputs = {one.input: one.width for one in self.matrices if one.input}
        return grams(self.folder, inputs, self.rows, self.head_size)

    def _counted(self, matrices: Sequence[Matrix]) -> Iterable[Matrix]:
        for number, matrix in enumerate(matrices):
            yield matrix
            self._tell(number + 1)

    def _tell(self, done: int) -> None:
        self.progress(Progress(f"quantize {self.settings.variant}", done, len(self.matrices), "matrices"))


def _head_size(folder: Path) -> int:
    """Of the cache, where the graph itself does not say it."""
    path = folder / "genai_config.json"
    if not path.exists():
        return 0
    decoder: dict[str, Any] = json.loads(path.read_text("utf-8"))["model"]["decoder"]
    size: int = decoder.get("head_size") or 0
    return size
