"""How far one step moved a model: the form before it and the form after it, on the task's own rows.

Compared are: the tokens that both runtimes make of real texts; the distributions over the next token (closed label
sets: over the labels), as Kullback-Leibler divergence and as agreement on the likeliest; the greedy answers; the task's
score by a paired test (:func:`slmops.evaluate.gates.parity_gate`).

Guarantees: positions are those of the rows' own answers, the same for both forms; KL is of after from before, in nats,
computed in float64; equal inputs give equal figures. What an engine does not show is None with its reason, never 0.
Not covered: sampled answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message, Row
from slmops.errors import GateError
from slmops.evaluate.drift import LayerDrift, layer_drift
from slmops.evaluate.gates import Gate, at_least, at_most
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import DriftConfig, DriftLimits
from slmops.runtime import (
    Classifier,
    Generator,
    LogitGenerator,
    OwnTokenizer,
    open_classifier,
    open_generator,
)

Step = Literal["converted", "merged", "pruned", "quantized"]
STEPS: tuple[Step, ...] = ("converted", "merged", "pruned", "quantized")
Encode = Callable[[str], Sequence[int]]

PROBES = (
    "",
    " ",
    "  two  spaces\tand a tab\n\nand lines ",
    "naïve café – Größe, 東京で会いましょう, привет, नमस्ते",
    "🙂👩‍👩‍👧 and a lone \u200b joiner",
    "x = {'a': [1, 2.50, -3e-7]}  # 1,000,000 €",
)
"""Texts that tokenizers like to disagree on; compared beside the rows."""
LAYER_ROWS = 8
LAYER_TOKENS = 64  # states of longer texts say no more
SEEN_DRIFT = 1e-3  # nats: below, nobody looks for a layer
EXCERPT = 60


@dataclass(frozen=True)
class TokenParity:
    """``first``: the first text on which they differ, ``{"text", "position", "before", "after"}``."""

    texts: int
    equal: int
    first: Mapping[str, Any] | None = None

    @property
    def share(self) -> float:
        return self.equal / self.texts if self.texts else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class LogitParity:
    """``positions`` predicted tokens (closed label sets: rows). KL in nats. ``worst_row``: id of the row with the
    largest mean KL."""

    positions: int
    kl_mean: float
    kl_p95: float
    kl_max: float
    top1_agreement: float
    worst_row: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class AnswerParity:
    """``first``: the first row answered differently, ``{"row", "position", "before", "after"}``."""

    rows: int
    equal: int
    first: Mapping[str, Any] | None = None

    @property
    def share(self) -> float:
        return self.equal / self.rows if self.rows else 1.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True)
class Parity:
    """One step.

    ``tokens``         slmops' tokenizer of both folders: what is served
    ``engine_tokens``  the engine's own against slmops', both after the step: what other programs make of the files
    ``layers``         where the drift starts; None where none was seen or looked for
    ``why_no_logits``  the reason where ``logits`` is None
    """

    before: str
    after: str
    step: Step
    tokens: TokenParity
    logits: LogitParity | None
    answers: AnswerParity | None = None
    engine_tokens: TokenParity | None = None
    layers: LayerDrift | None = None
    why_no_logits: str = ""

    def with_answers(self, before: Sequence[str], after: Sequence[str], ids: Sequence[str]) -> Parity:
        return replace(self, answers=compare_answers(before, after, ids))

    @property
    def name(self) -> str:
        return f"{self.before} → {self.after}"

    def to_json(self) -> dict[str, Any]:
        return {
            "before": self.before,
            "after": self.after,
            "step": self.step,
            "tokens": self.tokens.to_json(),
            "engine_tokens": self.engine_tokens.to_json() if self.engine_tokens else None,
            "logits": self.logits.to_json() if self.logits else None,
            "why_no_logits": self.why_no_logits,
            "answers": self.answers.to_json() if self.answers else None,
            "layers": self.layers.to_json() if self.layers else None,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Parity:
        def tokens(part: Mapping[str, Any] | None) -> TokenParity | None:
            return TokenParity(part["texts"], part["equal"], part["first"]) if part else None

        shared, answers, layers = tokens(raw["tokens"]), raw["answers"], raw["layers"]
        assert shared is not None
        return cls(
            before=raw["before"],
            after=raw["after"],
            step=raw["step"],
            tokens=shared,
            logits=LogitParity(**raw["logits"]) if raw["logits"] else None,
            answers=AnswerParity(answers["rows"], answers["equal"], answers["first"]) if answers else None,
            engine_tokens=tokens(raw["engine_tokens"]),
            layers=LayerDrift(tuple(layers["errors"]), layers["start"], layers["why_not"]) if layers else None,
            why_no_logits=raw["why_no_logits"],
        )


# --- comparing --------------------------------------------------------------------------------------------------


def compare_tokens(before: Encode, after: Encode, texts: Iterable[str]) -> TokenParity:
    """Ids of both for every text."""
    count = equal = 0
    first: dict[str, Any] | None = None
    for text in texts:
        a, b = list(before(text)), list(after(text))
        count += 1
        if a == b:
            equal += 1
        elif first is None:
            at = _parting(a, b)
            first = {"text": text[:EXCERPT], "position": at, "before": a[at : at + 4], "after": b[at : at + 4]}
    return TokenParity(count, equal, first)


def compare_answers(before: Sequence[str], after: Sequence[str], ids: Sequence[str]) -> AnswerParity:
    """Greedy answers to the same rows."""
    differing = [row for row, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    first: dict[str, Any] | None = None
    if differing:
        row = differing[0]
        at = _parting(before[row], after[row])
        start = max(0, at - EXCERPT // 3)
        excerpt = slice(start, start + EXCERPT)
        first = {"row": ids[row], "position": at, "before": before[row][excerpt], "after": after[row][excerpt]}
    return AnswerParity(len(before), len(before) - len(differing), first)


def _parting(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Where two sequences begin to differ."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def divergence(before: NDArray[Any], after: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL of ``after`` from ``before`` (nats) and whether the likeliest is the same, a row each.

    Both are logits ``[positions, choices]``; where the numbers of choices differ (a padded vocabulary), the common
    beginning is compared.
    """
    choices = min(before.shape[1], after.shape[1])
    kl, same = np.empty(len(before)), np.empty(len(before), dtype=np.bool_)
    for row, (a, b) in enumerate(zip(before, after, strict=True)):  # row by row: float64 of a whole vocabulary is large
        p, q = _log_softmax(a[:choices]), _log_softmax(b[:choices])
        kl[row] = max(0.0, float(np.sum(np.exp(p) * (p - q))))
        same[row] = p.argmax() == q.argmax()
    return kl, same


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    exact -= exact.max()
    found: NDArray[np.float64] = exact - np.log(np.exp(exact).sum())
    return found


def compare_distributions(pairs: Iterable[tuple[str, NDArray[Any], NDArray[Any]]]) -> LogitParity | None:
    """``pairs``: row id, logits before, logits after, each ``[positions, choices]``. None for no positions."""
    kls: list[NDArray[np.float64]] = []
    sames: list[NDArray[np.bool_]] = []
    worst, worst_row = -1.0, ""
    for name, before, after in pairs:
        kl, same = divergence(before, after)
        kls.append(kl)
        sames.append(same)
        if len(kl) and kl.mean() > worst:
            worst, worst_row = float(kl.mean()), name
    if not sum(map(len, kls)):
        return None
    kl, same = np.concatenate(kls), np.concatenate(sames)
    return LogitParity(
        positions=len(kl),
        kl_mean=float(kl.mean()),
        kl_p95=float(np.percentile(kl, 95)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.mean()),
        worst_row=worst_row,
    )


def compare_models(
    before: tuple[str, Path],
    after: tuple[str, Path],
    rows: Sequence[Row],
    *,
    step: Step,
    closed: bool,
    to_messages: Callable[[Row], tuple[Message, ...]],
    max_rows: int = 64,
    threads: int | None = None,
    layer_of: Mapping[int, int] | None = None,
    progress: ProgressSink = ignore,
) -> Parity:
    """Compare two model folders, each given with its name. Both are loaded at once.

    ``rows``         with targets; all texts are compared as tokens, the first ``max_rows`` as distributions
    ``closed``       whether they are classifiers
    ``to_messages``  what a generator is shown for a row
    ``layer_of``     see :func:`slmops.evaluate.drift.layer_drift`

    Raises:
        SlmopsError: a model cannot be opened.
    """
    texts = [row.text if closed else "\n".join(message.content for message in to_messages(row)) for row in rows]
    models: list[Any] = []
    try:
        for _, folder in (before, after):
            models.append((open_classifier if closed else open_generator)(folder, threads=threads))
        encoders = [_encoder(folder, model) for (_, folder), model in zip((before, after), models, strict=True)]
        tokens = compare_tokens(encoders[0], encoders[1], [*texts, *PROBES])
        own = models[1]
        engine = (
            compare_tokens(encoders[1], own.engine_tokens, [*texts, *PROBES]) if isinstance(own, OwnTokenizer) else None
        )
        seen, why = _logits(models, rows[:max_rows], to_messages, closed, progress)
    finally:
        for model in models:
            model.close()
    layers = None
    moved = seen is not None and (seen.kl_mean > SEEN_DRIFT or seen.top1_agreement < 1)
    if moved and tokens.share < 1:
        layers = LayerDrift((), None, "the two do not read the same tokens")
    elif moved:
        few = [list(encoders[0](text))[:LAYER_TOKENS] for text in texts[:LAYER_ROWS] if text]
        layers = layer_drift(before[1], after[1], [ids for ids in few if ids], layer_of=layer_of)
    return Parity(before[0], after[0], step, tokens, seen, None, engine, layers, why)


def _encoder(folder: Path, model: Any) -> Encode:
    """The folder's tokenizer as slmops reads it; the engine's own where the folder has none for us."""
    if not (folder / "tokenizer.json").is_file() and isinstance(model, OwnTokenizer):
        return model.engine_tokens
    from slmops.chat.files import open_tokenizer

    tokenizer = open_tokenizer(folder / "tokenizer.json")
    tokenizer.no_truncation()

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    return encode


def _logits(
    models: Sequence[Any],
    rows: Sequence[Row],
    to_messages: Callable[[Row], tuple[Message, ...]],
    closed: bool,
    progress: ProgressSink,
) -> tuple[LogitParity | None, str]:
    pairs = _label_pairs(models, rows) if closed else _token_pairs(models, rows, to_messages)
    if not closed and not all(isinstance(model, LogitGenerator) for model in models):
        return None, "the engine does not show its distribution over a given text"

    def told() -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
        for done, pair in enumerate(pairs, start=1):
            yield pair
            progress(Progress("parity", done, len(rows)))

    try:
        return compare_distributions(told()), ""
    except NotImplementedError as error:
        return None, str(error).rstrip(".")


def _label_pairs(models: Sequence[Classifier], rows: Sequence[Row]) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    order = [models[1].labels.index(label) for label in models[0].labels]
    for row in rows:
        a, b = (np.log(np.maximum(model.probabilities([row.text]), 1e-30)) for model in models)
        yield row.id, a, b[:, order]


def _token_pairs(
    models: Sequence[Generator], rows: Sequence[Row], to_messages: Callable[[Row], tuple[Message, ...]]
) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    for row in rows:
        a, b = (model.target_logits(to_messages(row), row.target or "") for model in models)  # type: ignore[attr-defined]
        yield row.id, a, b


# --- judging ----------------------------------------------------------------------------------------------------


def drift_gates(parity: Parity, config: DriftConfig) -> list[Gate]:
    """A gate for each limit that the recipe states for such a step."""
    limits: DriftLimits = getattr(config, parity.step)
    note = parity.layers.sentence if parity.layers else ""
    gates = []
    if parity.step != "pruned":  # a trimmed vocabulary has other numbers, and proves by itself that it reads alike
        gates.append(
            at_least(
                f"tokens {parity.name}", parity.tokens.share, config.tokens_equal, "share", _token_note(parity.tokens)
            )
        )
    if parity.logits is not None and limits.top1_agreement is not None:
        gates.append(
            at_least(f"top-1 {parity.name}", parity.logits.top1_agreement, limits.top1_agreement, "share", note)
        )
    if parity.logits is not None and limits.kl is not None:
        gates.append(at_most(f"KL {parity.name}", parity.logits.kl_mean, limits.kl, "nats", note))
    if parity.answers is not None and limits.answers_equal is not None:
        answers = parity.answers
        gates.append(
            at_least(f"answers {parity.name}", answers.share, limits.answers_equal, "share", _answer_note(answers))
        )
    return gates


def _token_note(tokens: TokenParity) -> str:
    if tokens.first is None:
        return ""
    first = tokens.first
    where = f"{first['text']!r} at token {first['position']}"
    return f"First difference in {where}: {first['before']} became {first['after']}."


def _answer_note(answers: AnswerParity) -> str:
    if answers.first is None:
        return ""
    first = answers.first
    return f"First difference in row {first['row']}: {first['before']!r} became {first['after']!r}."


def advice(parity: Parity) -> str:
    """What to try where a step moved the model too far."""
    if parity.tokens.share < 1 and parity.step != "pruned":
        return "Use the tokenizer of the checkpoint: the files of the two forms are not of one model."
    layer = parity.layers.start if parity.layers else None
    match parity.step:
        case "converted":
            return "A conversion must not change a model: choose another runtime or precision, and report this model."
        case "merged":
            return "A merge must not change a model: merge again in fp32, from the base that the adapter names."
        case "pruned":
            named = "" if layer is None else f" Keep layer {layer} whole, or remove less there."
            return f"Remove less at a time, and train the student again by the form before it.{named}"
        case "quantized":
            pass
    where = "" if layer is None else f", or keep layer {layer} and those near it in more bits"
    return f"Try more bits or a quantizer that is calibrated{where}, or train the student against the loss of bits."


def check_step(parity: Parity, gates: Sequence[Gate]) -> None:
    """Stop at a step that moved the model too far.

    Raises:
        GateError: names the step, the layer where it starts, and what to try.
    """
    failed = [gate for gate in gates if not gate.passed]
    if not failed:
        return
    signs = {"at_least": "≥", "at_most": "≤"}
    figures = ", ".join(
        f"{gate.name.split(' ')[0]} {gate.value:.3g} (limit {signs[gate.direction]} {gate.limit:g})" for gate in failed
    )
    where = failed[0].note or (parity.layers.sentence if parity.layers else "")
    raise GateError(f"The step {parity.name} moved the model: {figures}. {where}".rstrip(), remedy=advice(parity))
