"""A model's answers on a data set, judged.

Guarantees: ``per_row`` and ``predictions`` are in the order of the rows, so two models scored on the same rows can be
compared pair by pair. Rows without a target cannot be judged and are refused, never skipped in silence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Message, Row
from slmops.errors import DataError
from slmops.evaluate import metrics
from slmops.evaluate.measures import Measure, OwnMetric, measured
from slmops.evaluate.significance import bootstrap_interval
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import CLOSED_TASKS, Task
from slmops.runtime import Classifier, Generation, GenerationRequest, Generator, TextScore

CLASSIFIER_BATCH = 64
GENERATOR_BATCH = 16
LEAST_PROBABILITY = 1e-12  # a label with probability 0 would make the mean log-likelihood infinite
CALIBRATION_BINS = 15
MAX_CONFUSIONS = 50

_T = TypeVar("_T")


@dataclass(frozen=True)
class Confusion:
    """``rows`` rows of class ``target`` were taken for ``prediction``."""

    target: str
    prediction: str
    rows: int

    def to_json(self) -> dict[str, Any]:
        return {"target": self.target, "prediction": self.prediction, "rows": self.rows}


@dataclass(frozen=True)
class ClassScore:
    """One class of a closed label set. ``rows`` have it as their target."""

    label: str
    rows: int
    precision: float
    recall: float
    f1: float

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "rows": self.rows,
            "precision": self.precision,
            "recall": self.recall,
            "f1": self.f1,
        }


@dataclass(frozen=True, eq=False)
class Scores:
    """
    ``metric``       the primary metric's name
    ``value``        its mean over rows
    ``ci95``         bootstrap interval of the mean
    ``per_row``      float64 ``[rows]``
    ``others``       further metrics by name
    ``predictions``  one a row
    ``classes``      closed tasks: each class, the worst F1 first
    ``confusions``   closed tasks: the :data:`MAX_CONFUSIONS` commonest mistakes, the commonest first
    ``measures``     of the user's own, by name; added by :meth:`with_measures` and not kept by :meth:`to_json`
    """

    metric: str
    value: float
    ci95: tuple[float, float]
    rows: int
    per_row: NDArray[np.float64]
    others: dict[str, float] = field(default_factory=dict)
    predictions: list[str] = field(default_factory=list)
    classes: tuple[ClassScore, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    measures: Mapping[str, Measure] = field(default_factory=dict)

    def with_measures(self, own: Sequence[OwnMetric], rows: Sequence[Row], *, seed: int) -> Scores:
        """These scores with the user's own measures of the same answers to ``rows``; raises as :func:`measured`."""
        return replace(self, measures=measured(own, self.predictions, rows, seed=seed)) if own else self

    def figure(self, name: str) -> float | None:
        """A measure or a further metric by its name."""
        own = self.measures.get(name)
        return self.others.get(name) if own is None else own.value

    def first(self, rows: int, *, seed: int) -> Scores:
        """These scores on the first ``rows`` rows alone, for comparison with a model that was asked no more."""
        if self.rows <= rows:
            return self
        per_row = self.per_row[:rows]
        interval = bootstrap_interval(per_row, seed)
        return replace(
            self,
            value=float(per_row.mean()),
            ci95=interval,
            rows=rows,
            per_row=per_row,
            predictions=self.predictions[:rows],
        )

    def summary(self) -> dict[str, Any]:
        """``{"value", "ci95": [lo, hi], "rows"}``, as the report has it."""
        return {"value": self.value, "ci95": list(self.ci95), "rows": self.rows}

    def to_json(self) -> dict[str, Any]:
        """All of it as plain JSON; :meth:`from_json` reads it back."""
        return {
            "metric": self.metric,
            **self.summary(),
            "per_row": self.per_row.tolist(),
            "others": dict(self.others),
            "predictions": list(self.predictions),
            "classes": [c.to_json() for c in self.classes],
            "confusions": [c.to_json() for c in self.confusions],
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Scores:
        return cls(
            metric=raw["metric"],
            value=float(raw["value"]),
            ci95=(float(raw["ci95"][0]), float(raw["ci95"][1])),
            rows=int(raw["rows"]),
            per_row=np.asarray(raw["per_row"], dtype=np.float64),
            others=dict(raw.get("others", {})),
            predictions=list(raw.get("predictions", ())),
            classes=tuple(ClassScore(**c) for c in raw.get("classes", ())),
            confusions=tuple(Confusion(**c) for c in raw.get("confusions", ())),
        )


def score_predictions(
    predictions: Sequence[str],
    targets: Sequence[str],
    *,
    task: Task,
    labels: Sequence[str] | None = None,
    seed: int = 0,
    others: dict[str, float] | None = None,
) -> Scores:
    """Judge answers that are already there: the primary metric of ``task`` with its interval, and the others that fit.

    Raises:
        DataError: no rows.
    """
    if not targets:
        raise DataError("There are no rows to score.", remedy="Give the data set a test split with rows in it.")
    per_row = metrics.primary_scores(task, predictions, targets)
    closed = task in CLOSED_TASKS
    return Scores(
        metric=metrics.primary_metric(task),
        value=float(per_row.mean()),
        ci95=bootstrap_interval(per_row, seed),
        rows=len(targets),
        per_row=per_row,
        others={**_other_metrics(task, labels, predictions, targets), **(others or {})},
        predictions=list(predictions),
        classes=class_scores(predictions, targets) if closed else (),
        confusions=top_confusions(predictions, targets) if closed else (),
    )


def _other_metrics(
    task: Task, labels: Sequence[str] | None, predictions: Sequence[str], targets: Sequence[str]
) -> dict[str, float]:
    known = labels if labels or task not in CLOSED_TASKS else sorted(set(targets))
    others = {"format_valid": float(metrics.format_validity(task, known, predictions).mean())}
    match task:
        case "classification" | "nli":
            others["macro_f1"] = metrics.macro_f1(predictions, targets)
        case "extraction":
            others["slot_f1_micro"] = metrics.slot_f1_micro(predictions, targets)
            others["json_valid"] = float(metrics.json_validity(predictions).mean())
            others["exact_match"] = float(metrics.exact_match(predictions, targets).mean())
        case "qa":
            others["rouge_l"] = float(metrics.rouge_l(predictions, targets).mean())
        case "conversation" | "summarization" | "generation":
            others["bleu"] = metrics.bleu(predictions, targets)
            others["exact_match"] = float(metrics.exact_match(predictions, targets).mean())
        case "math":
            pass
    return others


def score_classifier(
    classifier: Classifier, rows: Sequence[Row], *, task: Task, seed: int = 0, progress: ProgressSink = ignore
) -> Scores:
    """Judge a classifier: accuracy, macro-F1, negative log-likelihood (nats a row), expected calibration error.

    A row whose target is not among the classifier's labels counts as wrong; ``others["unknown_label_rows"]`` says how
    many there are.

    Raises:
        DataError: no rows, or a row without a target.
    """
    targets = _targets(rows)
    probabilities = probabilities_of(classifier, [row.text for row in rows], progress)
    predictions = [classifier.labels[i] for i in probabilities.argmax(axis=1)] if len(rows) else []
    return score_predictions(
        predictions,
        targets,
        task=task,
        labels=classifier.labels,
        seed=seed,
        others=_likelihood(probabilities, classifier.labels, targets) if len(rows) else None,
    )


def probabilities_of(
    classifier: Classifier, texts: Sequence[str], progress: ProgressSink = ignore
) -> NDArray[np.float64]:
    """``[rows, labels]`` in the order of ``texts``; asked by length, because a batch pads to its longest text."""
    found = np.zeros((len(texts), len(classifier.labels)))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    done = 0
    for batch in _batches(order, CLASSIFIER_BATCH):
        found[batch] = classifier.probabilities([texts[i] for i in batch])
        done += len(batch)
        progress(Progress("evaluate", done, len(texts)))
    return found


def _likelihood(probabilities: NDArray[np.float64], labels: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    column = {label: index for index, label in enumerate(labels)}
    wanted = np.array([column.get(target, -1) for target in targets])
    of_target = np.where(wanted >= 0, probabilities[np.arange(len(targets)), wanted], 0.0)
    right = probabilities.argmax(axis=1) == wanted
    return {
        "nll": float(-np.log(np.maximum(of_target, LEAST_PROBABILITY)).mean()),
        "ece": expected_calibration_error(probabilities.max(axis=1), right.astype(np.float64)),
        "unknown_label_rows": float(np.sum(wanted < 0)),
    }


def expected_calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.float64], bins: int = CALIBRATION_BINS
) -> float:
    """Mean distance between confidence and accuracy over ``bins`` equal bins of confidence, weighted by rows
    (Guo et al. 2017). 0 for no rows."""
    if not len(confidence):
        return 0.0
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def score_generator(
    generator: Generator,
    rows: Sequence[Row],
    *,
    task: Task,
    max_new_tokens: int,
    to_messages: Callable[[Row], tuple[Message, ...]],
    labels: Sequence[str] | None = None,
    seed: int = 0,
    progress: ProgressSink = ignore,
) -> Scores:
    """Judge a generator by greedy answers of at most ``max_new_tokens`` tokens.

    ``others`` tells ``cut_off`` (share of answers that ended at the limit), ``answer_tokens`` (mean) and, where the
    engine can score given text, ``perplexity`` (per token; not for comparing models with unlike tokenizers) and
    ``bits_per_byte`` (comparable).

    Raises:
        DataError: no rows, or a row without a target.
    """
    targets = _targets(rows)
    conversations = [to_messages(row) for row in rows]
    requests = [GenerationRequest(m, max_tokens=max_new_tokens, temperature=0.0, seed=seed) for m in conversations]
    answers: list[Generation] = []
    for batch in _batches(requests, GENERATOR_BATCH):
        answers += generator.generate(batch)
        progress(Progress("evaluate", len(answers), len(rows)))
    others = {
        "cut_off": _mean([float(answer.finish_reason == "length") for answer in answers]),
        "answer_tokens": _mean([float(answer.completion_tokens) for answer in answers]),
        **_text_likelihood(generator, list(zip(conversations, targets, strict=True)), progress),
    }
    predictions = [answer.text.strip() for answer in answers]
    return score_predictions(predictions, targets, task=task, labels=labels, seed=seed, others=others)


def _text_likelihood(
    generator: Generator, conversations: Sequence[tuple[tuple[Message, ...], str]], progress: ProgressSink
) -> dict[str, float]:
    scored: list[TextScore] = []
    try:
        for batch in _batches(conversations, GENERATOR_BATCH):
            scored += generator.score(batch)
            progress(Progress("perplexity", len(scored), len(conversations)))
    except NotImplementedError:
        return {}
    return likelihood_metrics(scored)


def likelihood_metrics(scored: Sequence[TextScore]) -> dict[str, float]:
    """``perplexity`` and ``bits_per_byte`` over all texts together; a figure without tokens or bytes is left out."""
    nats = -sum(text.logprob for text in scored)
    tokens, length_bytes = sum(text.tokens for text in scored), sum(text.bytes for text in scored)
    found: dict[str, float] = {}
    if tokens:
        found["nll"] = nats / tokens
        found["perplexity"] = math.exp(min(nats / tokens, 700.0))  # e^710 does not fit in a float
    if length_bytes:
        found["bits_per_byte"] = nats / math.log(2) / length_bytes
    return found


def class_scores(predictions: Sequence[str], targets: Sequence[str]) -> tuple[ClassScore, ...]:
    """Precision, recall and F1 of each class among the targets; the worst first."""
    wanted, given = Counter(targets), Counter(predictions)
    right = Counter(t for p, t in zip(predictions, targets, strict=True) if p == t)
    scores = [
        ClassScore(
            label=label,
            rows=rows,
            precision=right[label] / given[label] if given[label] else 0.0,
            recall=right[label] / rows,
            f1=2 * right[label] / (rows + given[label]),
        )
        for label, rows in wanted.items()
    ]
    return tuple(sorted(scores, key=lambda score: (score.f1, score.label)))


def top_confusions(
    predictions: Sequence[str], targets: Sequence[str], most: int = MAX_CONFUSIONS
) -> tuple[Confusion, ...]:
    """The commonest pairs of target and wrong prediction."""
    wrong = Counter((t, p) for p, t in zip(predictions, targets, strict=True) if p != t)
    ranked = sorted(wrong.items(), key=lambda pair: (-pair[1], pair[0]))
    return tuple(Confusion(target, prediction, rows) for (target, prediction), rows in ranked[:most])


def _targets(rows: Sequence[Row]) -> list[str]:
    targets = [row.target for row in rows if row.target is not None]
    if len(targets) < len(rows):
        first = next(row.id for row in rows if row.target is None)
        raise DataError(
            f"{len(rows) - len(targets)} of {len(rows)} rows have no target to score against, the first is {first!r}.",
            remedy="Give data.target, or have the teacher answer the test rows first.",
        )
    return targets


def _batches(items: Sequence[_T], size: int) -> Iterator[list[_T]]:
    return (list(items[start : start + size]) for start in range(0, len(items), size))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
