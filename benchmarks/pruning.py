"""Layers and widths removed by measuring, beside every k-th layer removed, with the same training after.

The model is a language model adapted to banking77, its vocabulary trimmed to the task (for all sides alike), and shares
are of what is then left. A quarter, half and three quarters of the parameters go: by depth, by width, by whatever of
both moves the model least, and (the peer) by keeping evenly spread layers. All learn again for the same epochs from the
same teacher and are judged on the same test rows. ``both`` was named before as the one that is judged.

``zeros``: half of the layers' weights set to zero by size, Wanda and SparseGPT, without training; and whether a graph
with two zeros in every four weights runs faster in onnxruntime than the same graph without (timed by turns).
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import check, classified_right, log, mean, rows_to_compress, say, spread
from slmops.artifacts import Checkpoint, Dataset, Draft, Row
from slmops.compress import export_classifier
from slmops.evaluate.significance import paired_bootstrap
from slmops.pipeline.context import Context
from slmops.pipeline.prune import make_pruned
from slmops.pipeline.teach import ask_for_answers, make_teacher, prepare_data
from slmops.recipe import Recipe, parse_recipe
from slmops.store import Store

SHARES, QUICK_SHARES = (0.25, 0.5, 0.75), (0.5,)
SIDES: Mapping[str, Mapping[str, Any]] = {
    "depth": {"by": "depth"},
    "width": {"by": "width"},
    "both": {"by": "both"},
    "every k-th": {"by": "depth", "depth_by": "evenly"},
}
QUICK_SIDES = ("depth", "every k-th")
PEER, JUDGED = "every k-th", "both"
EPOCHS, QUICK_EPOCHS = 1.0, 0.1
QUICK_ROWS = 200
METHODS = ("magnitude", "wanda", "sparsegpt")
TIMED_ROWS, ROUNDS = 64, 6


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    right: dict[str, list[float]] = {}
    told: dict[str, dict[str, Any]] = {}
    with Store.open(options.store) as store:
        side = _Side(rows_to_compress(options, QUICK_ROWS), store, quick=quick)
        right["whole"] = classified_right(side.teacher.path, side.test)
        say(f"whole: {mean(right['whole']):.4f}")
        sides = QUICK_SIDES if quick else tuple(SIDES)
        for share in QUICK_SHARES if quick else SHARES:
            for name in sides:
                key = f"{name} {share:g}"
                found, entry = side.pruned({"parameters": share, **SIDES[name]}, recover=True)
                right[key] = classified_right(found.path, side.test)
                told[key] = {**entry, "accuracy": mean(right[key]), "kept": mean(right[key]) / mean(right["whole"])}
                say(f"{key}: {told[key]['accuracy']:.4f}, {100 * entry['removed']:.1f} % removed")
        zeros = {} if quick else _zeros(side, options.store)
    judged = "depth" if quick else JUDGED
    shares = QUICK_SHARES if quick else SHARES
    gains = {share: paired_bootstrap(right[f"{PEER} {share:g}"], right[f"{judged} {share:g}"]) for share in shares}
    checks = [
        {
            **check(f"points above every k-th at {share:.0%}", [100 * gain.difference], 0.0),
            "ci95": [100 * end for end in gain.ci95],
        }
        for share, gain in gains.items()
    ]
    ratios = [told[f"{judged} {share:g}"]["kept"] / max(1e-9, told[f"{PEER} {share:g}"]["kept"]) for share in shares]
    return {
        "ours": {key: entry for key, entry in told.items() if not key.startswith(PEER)},
        "peer": {key: entry for key, entry in told.items() if key.startswith(PEER)},
        "whole": mean(right["whole"]),
        "rows": len(side.test),
        "ratio": mean(ratios),
        "spread": spread(ratios),
        "target": "at every share, layers and widths that were measured keep more than every k-th layer",
        "passed": quick or all(one["passed"] for one in checks),
        "checks": checks,
        "zeros": zeros,
    }


class _Side:
    """The adapted model, the rows, and what is pruned from it; everything is kept in the store."""

    def __init__(self, rows: dict[str, Any], store: Store, *, quick: bool) -> None:
        self.rows, self.store, self.quick = rows, store, quick
        context = self._context({"vocabulary": "trim", "recover": None})
        self.data: Dataset = prepare_data(context)
        teacher = make_teacher(context, self.data)
        assert teacher is not None
        self.teacher: Checkpoint = teacher
        self.answers = ask_for_answers(context, self.data, teacher)
        self.test: list[Row] = context.test_rows(self.data)

    def pruned(self, prune: Mapping[str, Any], *, recover: bool) -> tuple[Checkpoint, dict[str, Any]]:
        """The checkpoint after pruning (and learning again), and what was removed."""
        epochs = QUICK_EPOCHS if self.quick else EPOCHS
        context = self._context({"vocabulary": "trim", "recover": {"epochs": epochs} if recover else None, **prune})
        found = make_pruned(context, self.data, self.answers, self.teacher)
        metrics = found.manifest.metrics
        trimmed = metrics["parameters_before"] - (metrics["tokens_before"] - metrics["tokens"]) * 576
        entry = {name: metrics[name] for name in ("layers", "heads", "channels", "hidden", "divergence", "parameters")}
        return found, {**entry, "removed": 1 - metrics["parameters"] / trimmed, "layers_gone": metrics["layers_gone"]}

    def _context(self, prune: Mapping[str, Any]) -> Context:
        return Context(self._recipe(prune), self.store, offline=False, progress=log())

    def _recipe(self, prune: Mapping[str, Any]) -> Recipe:
        raw: dict[str, Any] = {
            "name": "pruning",
            "task": "classification",
            "data": self.rows,
            "compress": {"prune": {"of": "teacher", **prune}},
        }
        if self.quick:
            raw["teacher"] = {"adapt_epochs": 0.1, "frozen_share": 0.95}
            raw["compress"]["prune"]["rows"] = 4
        return parse_recipe(raw)


def _zeros(side: _Side, folder: Path) -> dict[str, Any]:
    """Accuracy with half of the weights zero, and time and compressed size beside the same model without."""
    whole, _ = side.pruned({}, recover=False)
    found: dict[str, Any] = {"none": mean(classified_right(whole.path, side.test))}
    last = whole
    for pattern in ("free", "2:4"):
        for method in METHODS:
            sparsity = {"method": method, "pattern": pattern}
            last, _ = side.pruned({"sparsity": sparsity}, recover=False)
            found[f"{method} {pattern}"] = mean(classified_right(last.path, side.test))
            say(f"{method} {pattern}: {found[f'{method} {pattern}']:.4f}")
    graphs = [_exported(one, folder / "pruning" / name) for name, one in (("whole", whole), ("zeros", last))]
    ratios = _timed(graphs, [row.text for row in side.test[:TIMED_ROWS]])
    found["time_ratio"] = {"value": mean(ratios), "spread": spread(ratios), "of": "zeros / without"}
    found["compressed_bytes_ratio"] = _compressed(last.path) / _compressed(whole.path)
    return found


def _exported(checkpoint: Checkpoint, folder: Path) -> Path:
    draft = Draft(folder, folder.with_name(f"{folder.name}.work"))
    for path in (draft.path, draft.work):
        path.mkdir(parents=True, exist_ok=True)
    export_classifier(checkpoint.path, draft, precision="fp32", task="classification", name="x", max_tokens=64)
    return folder / "model"


def _timed(models: Sequence[Path], texts: Sequence[str]) -> list[float]:
    """Seconds of the last model / those of the first, by turns in one process; the order changes every round."""
    from slmops.runtime import open_classifier

    opened = [open_classifier(model, threads=1) for model in models]
    for classifier in opened:
        classifier.probabilities(texts[:4])
    ratios = []
    for number in range(ROUNDS):
        seconds = {}
        for index in (0, 1) if number % 2 else (1, 0):
            started = time.perf_counter()
            for text in texts:
                opened[index].probabilities([text])
            seconds[index] = time.perf_counter() - started
        ratios.append(seconds[1] / seconds[0])
    for classifier in opened:
        classifier.close()
    return ratios


def _compressed(folder: Path) -> int:
    """Bytes of the weights as a download that is compressed."""
    packer, total = zlib.compressobj(1), 0
    with (folder / "model.safetensors").open("rb") as file:
        while chunk := file.read(1 << 24):
            total += len(packer.compress(chunk))
    return total + len(packer.flush())
