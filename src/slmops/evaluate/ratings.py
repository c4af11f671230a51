"""What people said of answers: filled forms in, win rate or means with intervals, agreement and significance out.

Raters of one item are averaged first, so that an item counts once however many looked at it; intervals and tests are
over items. Agreement is Cohen's kappa (1960) of each two raters over the items that both rated, meant over the pairs
(Light 1971): of the three preferences as they are, of scores with quadratic weights (Cohen 1968).

Guarantees: a file of another form, an item that is not in it, a rating that means nothing, or two ratings of one item
by one rater are refused; items that nobody rated are counted, not guessed. Not covered: raters who differ in strictness
are not calibrated to one another.
"""

from __future__ import annotations

import csv
import itertools
import json
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from slmops.errors import DataError
from slmops.evaluate.rating_form import PREFERENCES, SCORES, FormKind
from slmops.evaluate.significance import PairedTest, bootstrap_interval, paired_bootstrap


@dataclass(frozen=True)
class Rating:
    """``value``: one of ``left``, ``same``, ``right``, or a number from 1 to 5."""

    rater: str
    item: str
    value: str | int
    comment: str = ""


@dataclass(frozen=True)
class RatingResult:
    """``models``: the one that is asked about first.

    ``means``      each model's share of preferences (a tie is half), or its mean score
    ``intervals``  of these, 95 %
    ``test``       of no difference; None where one model was scored alone
    ``kappa``      agreement, None where no two raters rated the same items
    ``unrated``    items that nobody rated
    """

    kind: FormKind
    models: tuple[str, ...]
    means: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]
    counts: Mapping[str, int]
    test: PairedTest | None
    kappa: float | None
    raters: tuple[str, ...]
    items: int
    unrated: int
    comments: tuple[Rating, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "models": [
                {"name": name, "value": mean, "ci95": list(ends)}
                for name, mean, ends in zip(self.models, self.means, self.intervals, strict=True)
            ],
            "counts": dict(self.counts),
            "test": self.test.to_json() if self.test else None,
            "kappa": self.kappa,
            "raters": list(self.raters),
            "items": self.items,
            "unrated": self.unrated,
            "comments": [{"rater": one.rater, "item": one.item, "comment": one.comment} for one in self.comments],
        }


def find_key(ratings: Path, key: Path | None = None) -> dict[str, Any]:
    """The key of the form that ``ratings`` fill in: ``key``, or the one of that form beside the file.

    Raises:
        DataError: there is none, or it is of another form.
    """
    form = form_of(ratings)
    for path in [key] if key is not None else sorted(ratings.parent.glob("*.key.json")):
        found = _object(path)
        if found.get("form") == form:
            return found
    raise DataError(
        f"These ratings fill in the form {form}, whose key "
        + (f"{key} is not." if key is not None else f"is not in {ratings.parent}."),
        path=ratings,
        remedy="Name the .key.json that was written with the form: --key FILE.",
    )


def form_of(path: Path) -> str:
    """The form that a file of ratings belongs to. Raises :class:`DataError` where it does not say."""
    records, whole = _records(path)
    form = whole.get("form") or next((one.get("form") for one in records if one.get("form")), None)
    if not form:
        raise DataError("It does not say which form it fills in.", path=path, remedy="Keep the column form.")
    return str(form)


def read_ratings(path: Path, key: Mapping[str, Any]) -> list[Rating]:
    """What one rater filled in: the page's file, or the csv or jsonl of the form. The rater is the one that the file
    names, else the file's name.

    Raises:
        DataError: another form, an item that is not in it, or a rating that means nothing.
    """
    records, whole = _records(path)
    found: list[Rating] = []
    for number, record in enumerate(records, start=1):
        form = record.get("form") or whole.get("form")
        if form != key["form"]:
            raise DataError(f"This fills in the form {form}, and the key is of {key['form']}.", path=path, row=number)
        item = str(record.get("item"))
        if item not in key["items"]:
            raise DataError(f"There is no item {item!r} in this form.", path=path, row=number)
        value = rating_value(record.get("rating"), key["kind"])
        if value is None:
            continue
        if value == "":
            raise DataError(
                f"{record['rating']!r} is no rating.",
                path=path,
                row=number,
                remedy=f"Write one of {', '.join(map(str, allowed(key['kind'])))}, or leave it empty.",
            )
        rater = str(record.get("rater") or whole.get("rater") or path.stem)
        found.append(Rating(rater, item, value, str(record.get("comment") or "").strip()))
    return found


def allowed(kind: str) -> tuple[Any, ...]:
    return PREFERENCES if kind == "pairs" else SCORES


def rating_value(raw: Any, kind: str) -> str | int | None:
    """A rating as it counts; None for one that was not given, ``""`` for one that means nothing."""
    text = str(raw).strip().lower() if raw is not None else ""
    if not text:
        return None
    if kind == "pairs":
        return text if text in PREFERENCES else ""
    return next((score for score in SCORES if text in {str(score), f"{score}.0"}), "")


def judge_ratings(ratings: Sequence[Rating], key: Mapping[str, Any], *, seed: int = 0) -> RatingResult:
    """What all ``ratings`` say together.

    Raises:
        DataError: none at all, or two of one item by one rater.
    """
    if not ratings:
        raise DataError("Nothing was rated.", remedy="Fill in the form, and save its file.")
    seen: set[tuple[str, str]] = set()
    for one in ratings:
        if (one.rater, one.item) in seen:
            raise DataError(
                f"{one.rater} rated {one.item} twice.",
                remedy="Give each file once, and each rater a name of their own.",
            )
        seen.add((one.rater, one.item))
    judge = _judge_pairs if key["kind"] == "pairs" else _judge_scores
    means, intervals, counts, test = judge(ratings, key, seed)
    return RatingResult(
        kind=cast(FormKind, key["kind"]),
        models=tuple(key["models"]),
        means=means,
        intervals=intervals,
        counts=counts,
        test=test,
        kappa=agreement(ratings, key),
        raters=tuple(sorted({one.rater for one in ratings})),
        items=len({one.item for one in ratings}),
        unrated=len(key["items"]) - len({one.item for one in ratings}),
        comments=tuple(one for one in ratings if one.comment),
    )


_Judged = tuple[tuple[float, ...], tuple[tuple[float, float], ...], dict[str, int], PairedTest | None]


def _judge_pairs(ratings: Sequence[Rating], key: Mapping[str, Any], seed: int) -> _Judged:
    by_item: dict[str, list[float]] = defaultdict(list)
    counts = dict.fromkeys(("first", "same", "second"), 0)
    for one in ratings:
        better = preferred(one, key)
        by_item[one.item].append({0: 1.0, None: 0.5, 1: 0.0}[better])
        counts["same" if better is None else ("first", "second")[better]] += 1
    first = np.array([np.mean(values) for values in by_item.values()])
    low, high = bootstrap_interval(first, seed)
    mean = float(first.mean())
    # Of each item the share that prefers the first, less the share that prefers the second.
    test = paired_bootstrap(1 - first, first, seed=seed)
    return (mean, 1 - mean), ((low, high), (1 - high, 1 - low)), counts, test


def preferred(rating: Rating, key: Mapping[str, Any]) -> int | None:
    """The number of the model whose answer was found better; None for neither."""
    if rating.value == "same":
        return None
    model: int = key["items"][rating.item]["models"][0 if rating.value == "left" else 1]
    return model


def _judge_scores(ratings: Sequence[Rating], key: Mapping[str, Any], seed: int) -> _Judged:
    by_row: list[dict[str, list[float]]] = [defaultdict(list) for _ in key["models"]]
    for one in ratings:
        about = key["items"][one.item]
        by_row[about["models"][0]][about["row"]].append(float(one.value))
    values: list[NDArray[np.float64]] = []
    for name, rows in zip(key["models"], by_row, strict=True):
        if not rows:
            raise DataError(f"No answer of {name} was rated.", remedy="Rate more items.")
        values.append(np.array([np.mean(scores) for scores in rows.values()]))
    test = None
    if len(values) == 2:
        shared = [row for row in by_row[0] if row in by_row[1]]
        if shared:
            ours, theirs = ([float(np.mean(rows[row])) for row in shared] for rows in by_row)
            test = paired_bootstrap(theirs, ours, seed=seed)
    counts = {str(score): sum(one.value == score for one in ratings) for score in SCORES}
    intervals = tuple(bootstrap_interval(scores, seed) for scores in values)
    return tuple(float(scores.mean()) for scores in values), intervals, counts, test


def agreement(ratings: Sequence[Rating], key: Mapping[str, Any]) -> float | None:
    """Mean kappa over the pairs of raters; None where it cannot be said."""
    from sklearn.metrics import cohen_kappa_score

    given: dict[str, dict[str, Any]] = defaultdict(dict)
    for one in ratings:
        given[one.rater][one.item] = one.value
    kappas = []
    for first, second in itertools.combinations(given.values(), 2):
        both = [item for item in first if item in second]
        if not both:
            continue
        with warnings.catch_warnings():  # of raters who said one thing throughout there is no kappa
            warnings.simplefilter("ignore")
            kappas.append(
                cohen_kappa_score(
                    [first[item] for item in both],
                    [second[item] for item in both],
                    labels=list(allowed(key["kind"])),
                    weights=None if key["kind"] == "pairs" else "quadratic",
                )
            )
    known = [float(kappa) for kappa in kappas if np.isfinite(kappa)]
    return sum(known) / len(known) if known else None


def _records(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The items of a file, and what it says of all of them."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The ratings cannot be read: {error}.", path=path) from None
    try:
        if path.suffix == ".csv":
            return [dict(row) for row in csv.DictReader(text.splitlines(keepends=True))], {}
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()], {}
        whole = json.loads(text)
        return list(whole["ratings"]), whole
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"This is no file of ratings: {type(error).__name__} {error}.",
            path=path,
            remedy="Give what the form saved (json), or its csv or jsonl with ratings filled in.",
        ) from None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"The key cannot be read: {error}.", path=path) from None
    return found if isinstance(found, dict) else {}
