"""Right or wrong, row by row.

Every function that can gives one value a row, float64 ``[rows]`` in 0..1, so that intervals and paired tests see rows,
not a mean; zero rows give an empty array. Corpus measures (BLEU, macro-F1, micro slot-F1) give one number.

Not covered: meaning. A right answer in other words is wrong to :func:`exact_match` and half right to :func:`rouge_l`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.evaluate.numbers import final_answer, same_answer
from slmops.recipe import CLOSED_TASKS, Task

PerRow = NDArray[np.float64]

_PRIMARY: dict[str, str] = {
    "classification": "accuracy",
    "nli": "accuracy",
    "qa": "exact_match",
    "math": "numeric_match",
    "extraction": "slot_f1",
    "conversation": "rouge_l",
    "summarization": "rouge_l",
    "generation": "rouge_l",
}


def primary_metric(task: Task) -> str:
    """Name of the metric that a task is judged by."""
    return _PRIMARY[task]


def primary_scores(task: Task, predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    """The task's primary metric, ``[rows]``."""
    functions: dict[str, Callable[[Sequence[str], Sequence[str]], PerRow]] = {
        "accuracy": accuracy,
        "exact_match": exact_match,
        "numeric_match": numeric_match,
        "slot_f1": slot_f1,
        "rouge_l": rouge_l,
    }
    return functions[primary_metric(task)](predictions, targets)


# Closed label sets


def accuracy(predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    """1 where the label is the target to the letter (white space around it aside). ``[rows]``."""
    return _per_row(lambda p, t: p.strip() == t.strip(), predictions, targets)


def macro_f1(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Mean F1 over the classes that occur in targets or predictions, each class counting the same. 0 for no rows."""
    if not _checked(predictions, targets):
        return 0.0
    from sklearn.metrics import f1_score

    guesses, truths = [p.strip() for p in predictions], [t.strip() for t in targets]
    return float(f1_score(truths, guesses, average="macro", zero_division=0))


# Text


def normalise(text: str) -> str:
    """Text without what does not change an answer: case, Unicode form, punctuation around words, extra white space.

    Signs that belong to a number stay (``-5``, ``.5``, ``5%``), and so do articles: "A" may be the answer. A text of
    punctuation alone stays as it is.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("’", "'").replace("−", "-")
    words = [bare for word in folded.split() if (bare := _bare_word(word))]
    return " ".join(words) if words else " ".join(folded.split())


def _bare_word(word: str) -> str:
    start, end = 0, len(word)
    while start < end and _is_punctuation(word[start]):
        start += 1
    while end > start and _is_punctuation(word[end - 1]):
        end -= 1
    if start < end and word[start].isdigit() and start and word[start - 1] in "-.":
        start -= 2 if word[start - 2 : start] == "-." else 1
    if end < len(word) and word[end] == "%" and word[end - 1].isdigit():
        end += 1
    return word[start:end]


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def exact_match(predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    """1 where prediction and target are equal after :func:`normalise`. ``[rows]``."""
    return _per_row(lambda p, t: normalise(p) == normalise(t), predictions, targets)


class WordTokens:
    """Words for ROUGE in any script: runs of letters and digits, and each character of scripts without spaces.

    On English text this is rouge-score's own tokenizer; that one drops everything that is not a-z or 0-9, so an answer
    in Greek would score 0 against itself.
    """

    _WORD = re.compile(
        "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # kana and Han: no spaces
        "|[^\\W_\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
    )

    def tokenize(self, text: str) -> list[str]:
        return self._WORD.findall(unicodedata.normalize("NFKC", text).lower())


@lru_cache(maxsize=1)
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=WordTokens())


def rouge_l(predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    """F-measure of the longest common subsequence of words (Lin 2004), without stemming. ``[rows]``.

    Two texts without any word match where they are equal.
    """
    scorer, words = _rouge_scorer(), WordTokens()

    def one(prediction: str, target: str) -> float:
        if not words.tokenize(target):
            return float(prediction.strip() == target.strip())
        return float(scorer.score(target, prediction)["rougeL"].fmeasure)

    return _per_row(one, predictions, targets)


def bleu(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Corpus BLEU of sacrebleu with its defaults, 0..100. 0 for no rows."""
    if not _checked(predictions, targets):
        return 0.0
    from sacrebleu.metrics.bleu import BLEU

    return float(BLEU().corpus_score(list(predictions), [list(targets)]).score)


# Math


def numeric_match(predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    """1 where the final answers are the same number (see :mod:`slmops.evaluate.numbers`). ``[rows]``."""
    return _per_row(same_answer, predictions, targets)


# Structured answers


def parse_json(text: str) -> Any:
    """The JSON value that ``text`` is, strictly: nothing around it, no NaN.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("the text nests too deeply to be an answer") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def is_json(text: str) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


def json_validity(predictions: Sequence[str]) -> PerRow:
    """1 where the whole answer is one JSON value. ``[rows]``."""
    return np.array([is_json(p) for p in predictions], dtype=np.float64)


def slots(text: str) -> Counter[tuple[str, str]] | None:
    """``(name, normalised value)`` pairs of an extraction, with their number; None where it cannot be read.

    A JSON object, nested names joined by dots and lists read without order; or lines ``name: value``. A slot with
    null, an empty text or an empty list counts as absent.
    """
    try:
        value = parse_json(text)
    except ValueError:
        return _slots_of_lines(text)
    return Counter(_flatten("", value)) if isinstance(value, dict | list) else None


def _flatten(name: str, value: Any) -> list[tuple[str, str]]:
    match value:
        case dict():
            return [p for key, inner in value.items() for p in _flatten(f"{name}.{key}" if name else str(key), inner)]
        case list():
            return [pair for inner in value for pair in _flatten(name, inner)]
        case None:
            return []
        case str():
            return [(name, normalise(value))] if value.strip() else []
        case _:
            return [(name, json.dumps(value))]


def _slots_of_lines(text: str) -> Counter[tuple[str, str]] | None:
    found: Counter[tuple[str, str]] = Counter()
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, colon, value = line.partition(":")
        if not colon or line.startswith(("{", "[")):
            return None
        if value.strip():
            found[(normalise(name), normalise(value))] += 1
    return found


def slot_f1(predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    """F1 over slots, row by row. ``[rows]``; 1 where there is nothing to find and nothing was found, 0 where the
    prediction cannot be read."""
    return _per_row(_slot_f1_row, predictions, targets)


def _slot_f1_row(prediction: str, target: str) -> float:
    found, wanted = slots(prediction), slots(target)
    if found is None or wanted is None:
        return float(prediction.strip() == target.strip())
    if not found and not wanted:
        return 1.0
    return 2 * (found & wanted).total() / (found.total() + wanted.total())


def slot_f1_micro(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """F1 over all slots of all rows together. 1 where there is nothing to find and nothing was found."""
    _checked(predictions, targets)
    right = total = 0
    for prediction, target in zip(predictions, targets, strict=True):
        found, wanted = slots(prediction) or Counter(), slots(target) or Counter()
        right += (found & wanted).total()
        total += found.total() + wanted.total()
    return 2 * right / total if total else 1.0


# Format


def format_valid(task: Task, labels: Sequence[str] | None, answer: str) -> bool:
    """Whether an answer has the form that its reader needs, right or wrong.

    A closed task: one of the labels, to the letter. math: a number can be found. extraction: a JSON object. Everything
    else: some text, and one of ``labels`` where there are any.
    """
    bare = answer.strip()
    if task in CLOSED_TASKS or (labels and task == "qa"):
        return bare in set(labels or ())
    if task == "math":
        return final_answer(bare) is not None
    if task == "extraction":
        return bare.startswith("{") and is_json(bare)
    return bool(bare)


def format_validity(task: Task, labels: Sequence[str] | None, answers: Sequence[str]) -> PerRow:
    """:func:`format_valid` for each answer. ``[rows]``."""
    return np.array([format_valid(task, labels, answer) for answer in answers], dtype=np.float64)


# Shared


def _checked(predictions: Sequence[str], targets: Sequence[str]) -> int:
    if len(predictions) != len(targets):
        raise ValueError(f"{len(predictions)} predictions for {len(targets)} targets")
    return len(targets)


def _per_row(one: Callable[[str, str], float], predictions: Sequence[str], targets: Sequence[str]) -> PerRow:
    _checked(predictions, targets)
    return np.array([one(p, t) for p, t in zip(predictions, targets, strict=True)], dtype=np.float64)
