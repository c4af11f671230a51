"""4 bits against fp16: bytes, task accuracy and perplexity, beside the builder's own 4 bits and llama.cpp's Q4_K_M.

The model is SmolLM2-135M as trained here (:mod:`benchmarks.trained`). Accuracy: the share of held-out messages whose
intent, end of the answer included, is the greedy answer. Perplexity: of held-out answers in a paragraph. All forms read
the same rows in their own engine, as they are served. ``ours`` is 4 bits by GPTQ in blocks of 32 (``compress.quantize:
gptq``); told beside are the other algorithms; a mixture under the size limit of 29.5 % of fp16 in which 8 bits are
where rounding was measured to cost most; and plain rounding after 0.4 epochs of training on the grid (``recover``).
Bytes are those of the files that hold weights, for GGUF with its vocabulary. Forms and scores are kept in the store: a
second run measures what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common import log, say
from benchmarks.trained import Row, Trained, off_grid, trained_weights
from slmops.artifacts import Draft, Message
from slmops.artifacts import Row as DataRow
from slmops.compress import generator
from slmops.compress.generator import export_generator
from slmops.compress.gguf_export import export_gguf
from slmops.compress.quantize.calibration import read_calibration, token_rows
from slmops.compress.quantize.folder import quantize_folder
from slmops.evaluate.significance import paired_bootstrap
from slmops.pipeline.context import Context
from slmops.pipeline.quantize import quantized
from slmops.pipeline.teach import prepare_data
from slmops.recipe import CalibrationConfig, QuantizeConfig
from slmops.runtime import open_generator
from slmops.store import Store

ANSWERS, INTENTS = 60, 1000
QUICK_ANSWERS, QUICK_INTENTS = 2, 6
MAX_TOKENS = 320
CALIBRATION_ROWS = 128
SMALLER, SMALLER_THAN_FP32 = 0.70, 0.85
POINTS = 0.5
SHARE_OF_RISE = 0.5
OFF_GRID = 0.4
"""Weights nearer to the grid that they were published on say nothing about rounding."""
LIMIT = 0.295
"""Of the bytes of fp16: what the mixture may take."""
WEIGHTS = ("model.onnx", "model.onnx.data", "model.gguf")
ABOUT: dict[str, Any] = {"task": "generation", "name": "trained", "system": None}
OURS: dict[str, dict[str, Any]] = {
    "int4 rtn": {"algorithm": "rtn"},
    "int4 k_quant": {"algorithm": "k_quant"},
    "int4 k_quant with zeros": {"algorithm": "k_quant", "symmetric": False},
    "int4 gptq": {"algorithm": "gptq"},
    "int4 gptq, blocks of 64": {"algorithm": "gptq", "block_size": 64},
    "int4 awq": {"algorithm": "awq"},
    "int4 hqq": {"algorithm": "hqq"},
    "int4 rtn, recovered": {"algorithm": "rtn", "recover": {"epochs": 0.4}},
}
MIXED, JUDGED = "int4 gptq, mixed", "int4 gptq"
OTHERS = (*(name for name in OURS if name != JUDGED), MIXED)
QUICK = ("fp16", "builder int4", "int4 k_quant")


def run(options: argparse.Namespace) -> dict[str, Any]:
    trained = trained_weights(options)
    forms = Forms(trained, options.store, quick=options.quick)
    names = QUICK if options.quick else ("fp16", "builder int4", JUDGED, "gguf q4_k_m", *OTHERS)
    found = {name: forms.scored(name) for name in names}
    wide, builder = found["fp16"], found["builder int4"]
    for entry in found.values():
        entry["smaller than fp16"] = 1 - entry["bytes"] / wide["bytes"]
        entry["rise"] = entry["perplexity"] / wide["perplexity"] - 1
    judged = "int4 k_quant" if options.quick else JUDGED
    ours = found[judged]
    share = ours["rise"] / max(builder["rise"], 1e-9)
    lost = paired_bootstrap(wide["right"], ours["right"])
    apart = off_grid(trained.folder)
    checks = [
        checked("off the published grid", apart, OFF_GRID, at_least=True),
        checked("smaller than fp16", ours["smaller than fp16"], SMALLER, at_least=True),
        checked("smaller than fp32", 1 - ours["bytes"] / (2 * wide["bytes"]), SMALLER_THAN_FP32, at_least=True),
        checked("points of accuracy lost", -100 * lost.difference, POINTS, at_least=False),
        checked(
            "share of the builder's rise", ours["rise"] / max(builder["rise"], 1e-9), SHARE_OF_RISE, at_least=False
        ),
    ]
    if "gguf q4_k_m" in found:
        peer = found["gguf q4_k_m"]
        checks += [
            checked("perplexity beside Q4_K_M", ours["perplexity"] / peer["perplexity"], 1.0, at_least=False),
            checked("bytes beside Q4_K_M", ours["bytes"] / peer["bytes"], 1.0, at_least=False),
        ]
    return {
        "ours": told(ours),
        "peer": {name: told(entry) for name, entry in found.items() if name in ("builder int4", "gguf q4_k_m")},
        "forms": {name: told(entry) for name, entry in found.items()},
        "ratio": share,
        "spread": spread_of_share(wide, builder, ours),
        "target": SHARE_OF_RISE,
        "passed": options.quick or all(check["passed"] for check in checks),
        "checks": checks,
        "points lost ci95": [-100 * end for end in reversed(lost.ci95)],
        "rows": {"answers": len(wide["nats"]), "intents": len(wide["right"])},
    }


def checked(name: str, value: float, target: float, *, at_least: bool) -> dict[str, Any]:
    return {"name": name, "value": value, "target": target, "passed": value >= target if at_least else value <= target}


def told(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in ("right", "nats", "tokens")}


def spread_of_share(wide: dict[str, Any], builder: dict[str, Any], ours: dict[str, Any]) -> list[float]:
    """The share of the builder's rise on each half of the answers (even and odd ones)."""
    shares = []
    for half in (slice(0, None, 2), slice(1, None, 2)):
        each = [perplexity(one["nats"][half], one["tokens"][half]) for one in (wide, builder, ours)]
        shares.append((each[2] / each[0] - 1) / max(each[1] / each[0] - 1, 1e-9))
    return sorted(shares)


def perplexity(nats: list[float], tokens: list[int]) -> float:
    return math.exp(sum(nats) / sum(tokens))


class Forms:
    """The model's forms in a folder of the store, and what they score."""

    def __init__(self, trained: Trained, store: Path, *, quick: bool) -> None:
        self.trained, self.store = trained, store
        self.folder = store / ("int4-quick" if quick else "int4") / trained.folder.name
        self.answers = trained.answers[: QUICK_ANSWERS if quick else ANSWERS]
        self.intents = trained.intents[: QUICK_INTENTS if quick else INTENTS]

    def scored(self, name: str) -> dict[str, Any]:
        model = self.made(name)
        kept = model.parent / f"scores-{len(self.answers)}-{len(self.intents)}.json"
        if not kept.exists():
            kept.write_text(json.dumps(scores(model, self.answers, self.intents)), "utf-8")
        entry: dict[str, Any] = json.loads(kept.read_text("utf-8"))
        entry |= {
            "bytes": sum((model / file).stat().st_size for file in WEIGHTS if (model / file).exists()),
            "perplexity": perplexity(entry["nats"], entry["tokens"]),
            "accuracy": sum(entry["right"]) / len(entry["right"]),
        }
        say(f"{name}: {told(entry)}")
        return entry

    def made(self, name: str) -> Path:
        """The model folder of a form."""
        place = self.folder / name.replace(" ", "-").replace(",", "")
        if not (place / "done").exists():
            say(f"making {name}")
            shutil.rmtree(place, ignore_errors=True)
            (place / "work").mkdir(parents=True)
            self._make(name, Draft(place, place / "work"))
            (place / "done").touch()
        return place / "model"

    def _make(self, name: str, draft: Draft) -> None:
        match name:
            case "fp32" | "int8":
                export_generator(self.trained.folder, draft, precision=name, max_tokens=MAX_TOKENS, **ABOUT)
            case "fp16":
                shutil.copytree(self.made("fp32"), draft.path / "model")
                generator._rewrite(draft.path / "model", "fp16")
            case "builder int4":
                export_by_builder(self.trained.folder, draft)
            case gguf if gguf.startswith("gguf "):
                export_gguf(self.trained.folder, draft, quantization=gguf.split()[1], max_tokens=2048, **ABOUT)  # type: ignore[arg-type]
            case _:
                self._quantize(self.settings(name), draft)

    def settings(self, name: str) -> QuantizeConfig:
        if name == MIXED:
            return QuantizeConfig(algorithm="gptq", size_mb=self._limit_mb())
        return QuantizeConfig(**OURS[name])

    def _limit_mb(self) -> float:
        """Tokenizer and the like count for ``size_mb``, and not for this benchmark."""
        model = self.made("fp16")
        sizes = {path.name: path.stat().st_size for path in model.iterdir()}
        weights = sum(size for file, size in sizes.items() if file in WEIGHTS)
        return (LIMIT * weights + sum(sizes.values()) - weights) / 1e6

    def _quantize(self, settings: QuantizeConfig, draft: Draft) -> None:
        if settings.recover is not None:
            shutil.copytree(self._recovered(settings), draft.path / "model")
            return
        wide = self.made("fp32")
        shutil.copytree(wide, draft.path / "model")
        rows = []
        if settings.calibrated:
            raw = [json.loads(line) for line in self.trained.train_file.read_text("utf-8").splitlines()]
            learnt = [DataRow(str(i), ask(one["question"]), one["answer"]) for i, one in enumerate(raw)]
            chosen = read_calibration(CalibrationConfig(rows=CALIBRATION_ROWS), learnt, seed=0)
            rows = token_rows(wide, chosen, lambda row: row.messages, MAX_TOKENS)
        quantize_folder(draft.path / "model", settings, rows)

    def _recovered(self, settings: QuantizeConfig) -> Path:
        """Trained on the grid and exported as a recipe does it."""
        with Store.open(self.store) as store:
            context = Context(self.trained.recipe, store, offline=False, progress=log())
            rows = prepare_data(context)
            return quantized(context, "student", self.trained.checkpoint, rows, settings).model_path


def export_by_builder(checkpoint: Path, draft: Draft) -> None:
    """onnxruntime-genai's builder with its defaults for 4 bits (embeddings too, blocks of 32), and nothing of ours."""
    kept = generator.BUILT_AS["int4"], generator.OPTIONS["int4"], generator._rewrite
    generator.BUILT_AS["int4"] = "int4"
    generator.OPTIONS["int4"] = (*generator.QUANTIZED_OPTIONS, "op_types_to_quantize=MatMul/Gather")
    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    generator._rewrite = nothing
    try:
        export_generator(checkpoint, draft, precision="int4", max_tokens=MAX_TOKENS, **ABOUT)
    finally:
        generator.BUILT_AS["int4"], generator.OPTIONS["int4"], generator._rewrite = kept


def ask(question: str) -> tuple[Message, ...]:
    return (Message("user", question),)


def scores(model: Path, answers: list[Row], intents: list[Row]) -> dict[str, Any]:
    """Nats and tokens of each answer; 1 for each intent that is the greedy answer, else 0."""
    opened: Any = open_generator(model)
    try:
        scored = [opened.score([(ask(row.question), row.answer)])[0] for row in answers]
        right = [float(is_greedy(opened, row)) for row in intents]
    finally:
        opened.close()
    return {"nats": [-one.logprob for one in scored], "tokens": [one.tokens for one in scored], "right": right}


def is_greedy(opened: Any, row: Row) -> bool:
    """Whether decoding greedily gives the answer: every token of it, and its end, is the likeliest one."""
    from slmops.runtime import GenerationRequest

    if hasattr(opened, "_target_rows"):
        logits, ids = opened._target_rows(ask(row.question), row.answer)
        return bool((logits.argmax(-1) == ids).all())
    return bool(opened.generate([GenerationRequest(ask(row.question), max_tokens=16)])[0].text.strip() == row.answer)
