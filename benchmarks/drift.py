"""Drift: false alarms on traffic of the same distribution, and how soon another data set in a tenth of it is noticed.

A classifier is trained on half of banking77 (TF-IDF with logistic regression: trained in seconds, calibrated). Its
reference are held-out rows; traffic is the other held-out rows, in fresh random parts each time, so that a draw's
reference is as much a sample as its window. A check compares the last 500 requests with the reference at alpha 0.01.
Detection: after 500 ordinary requests every tenth comes from another data set on the mean; a check every 50 requests.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import data_file, say
from slmops.models.linear import calibrated, fit_linear
from slmops.monitor.drift import ALPHA, Drift, drift
from slmops.monitor.quality import quantile, share
from slmops.monitor.reference import Reference, sample_of
from slmops.monitor.sketch import sketch, surprisals

TRAINED, VALIDATED, REFERENCE, WINDOW = 5000, 500, 2000, 500
EVERY, MOST_REQUESTS, MIXED = 50, 1500, 0.1
DRAWS, STREAMS, QUIET_STREAMS = 300, 25, 8
QUICK_DRAWS, QUICK_STREAMS = 6, 2
Event = Mapping[str, Any]


def run(options: argparse.Namespace) -> dict[str, Any]:
    draws, streams = (QUICK_DRAWS, QUICK_STREAMS) if options.quick else (DRAWS, STREAMS)
    bank = list(dict.fromkeys(read_csv(options, "banking77/train.csv", "text", "category")))
    random.Random(0).shuffle(bank)
    trained = bank[: 1500 if options.quick else TRAINED]
    model = fit_linear(trained, bank[TRAINED : TRAINED + VALIDATED], 0)
    assert model is not None
    model = calibrated(model, bank[TRAINED : TRAINED + VALIDATED])
    surprisal = surprisals(text for text, _ in trained)

    def events(texts: Sequence[str]) -> list[Event]:
        rows = model.probabilities(texts)
        return [event(text, model.labels, row, surprisal) for text, row in zip(texts, rows, strict=True)]

    held_out = events([text for text, _ in bank[TRAINED + VALIDATED :]])
    say(f"{len(held_out)} held-out rows")
    alarms = false_alarms(held_out, draws)
    others = {
        "bitext_support": [text for text, _ in read_csv(options, "bitext_support/train.csv", "instruction", "intent")],
        "boolq": [json.loads(line)["question"] for line in read_lines(options, "boolq/train.jsonl")],
        "restaurant8k": [
            row["userInput"]["text"]
            for row in json.loads(Path(data_file(options, "restaurant8k/train_0.json")).read_text("utf-8"))
        ],
    }
    delays = {name: detection(held_out, events(texts[:3000]), streams) for name, texts in others.items()}
    delays["nothing mixed in"] = detection(held_out, held_out, min(streams, QUIET_STREAMS))
    rate = alarms["0.01"]
    found = [one["detected"]["value"] for name, one in delays.items() if name in others]
    return {
        "ours": {"false_alarms": alarms, "detection": delays},
        "peer": None,
        "ratio": rate["value"],
        "spread": rate["ci95"],
        "target": f"false alarms at most {ALPHA:g} a check (interval), all shifts of {MIXED:.0%} detected",
        "passed": options.quick or (rate["ci95"][0] <= ALPHA and min(found) >= 0.95),
        "draws": draws,
        "streams": streams,
    }


def event(text: str, labels: Sequence[str], probabilities: Any, surprisal: Any) -> Event:
    """What a server would have recorded."""
    best = int(probabilities.argmax())
    numbers = sketch(text, surprisal)
    return {
        "novelty": numbers.novelty,
        "sketch": numbers.numbers,
        "input_chars": len(text),
        "output_chars": len(labels[best]),
        "confidence": float(probabilities[best]),
        "format_ok": True,
        "label": labels[best],
        "finish_reason": "stop",
    }


def false_alarms(rows: Sequence[Event], draws: int) -> dict[str, Any]:
    """Share of checks with an alarm at two levels, each on a fresh reference and a fresh window."""
    hits = {0.01: 0, 0.05: 0}
    views: dict[str, int] = {}
    for number in range(draws):
        drawn = random.Random(number).sample(range(len(rows)), REFERENCE + WINDOW)
        found = check([rows[i] for i in drawn[:REFERENCE]], [rows[i] for i in drawn[REFERENCE:]])
        for view in found.views:
            views[view.name] = views.get(view.name, 0) + view.alarm
        for level in hits:
            hits[level] += min(view.adjusted for view in found.views) <= level
        if number % 50 == 49:
            say(f"{number + 1} draws: {hits}")
    return {**{f"{level:g}": share(count, draws) for level, count in hits.items()}, "views": views}


def check(reference: Sequence[Event], window: Sequence[Event]) -> Drift:
    return drift(Reference(sample_of(reference)), sample_of(window))


def detection(rows: Sequence[Event], others: Sequence[Event], streams: int) -> dict[str, Any]:
    """Requests from the beginning of the shift until the first alarm."""
    delays = [delay(rows, others, random.Random(1000 + number)) for number in range(streams)]
    told = [one for one in delays if one is not None]
    say(f"{len(told)} of {streams} streams, {sorted(told)}")
    return {
        "detected": share(len(told), streams),
        "requests_median": median(told) if told else None,
        "requests_p90": quantile(told, 0.9),
        "within": MOST_REQUESTS,
    }


def delay(rows: Sequence[Event], others: Sequence[Event], chance: random.Random) -> int | None:
    order = chance.sample(range(len(rows)), len(rows))
    reference = [rows[i] for i in order[:REFERENCE]]
    ordinary = iter([rows[i] for i in order[REFERENCE:]])
    stream = [next(ordinary) for _ in range(WINDOW)]
    pick: Callable[[], Event] = lambda: chance.choice(others) if chance.random() < MIXED else next(ordinary)  # noqa: E731
    for requests in range(EVERY, MOST_REQUESTS + 1, EVERY):
        stream += [pick() for _ in range(EVERY)]
        if check(reference, stream[-WINDOW:]).alarm:
            return requests
    return None


def read_csv(options: argparse.Namespace, name: str, *columns: str) -> list[tuple[str, ...]]:
    with Path(data_file(options, name)).open(encoding="utf-8", newline="") as file:
        return [tuple(row[column] for column in columns) for row in csv.DictReader(file)]


def read_lines(options: argparse.Namespace, name: str) -> list[str]:
    return Path(data_file(options, name)).read_text("utf-8").splitlines()
