"""Personal data found by form: recall and precision by kind on real spans, and what is taken from ordinary text.

A span counts as found where no character of it that is a letter or digit is left; a tag counts as right where it
overlaps a span of its kind. People's names are looked for by the words before them (``cues``). Kinds that nothing here
looks for (addresses, places, organizations, titles, dates) are not counted as missed, and a tag on one is not right.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import data_file
from slmops.monitor.quality import share
from slmops.privacy.names import by_cues
from slmops.privacy.redact import Found, find, redact

KINDS = {
    "EMAIL_ADDRESS": "EMAIL",
    "CREDIT_CARD": "CARD",
    "PHONE_NUMBER": "PHONE",
    "IP_ADDRESS": "IP",
    "US_SSN": "ID",
    "US_DRIVER_LICENSE": "NUMBER",
    "IBAN_CODE": "IBAN",
    "PERSON": "NAME",
}
LEAST_RECALL = 0.95
"""Of the kinds that have a form, all together."""
TIMED_TEXTS = 2000


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = json.loads(Path(data_file(options, "pii/generated_small.json")).read_text("utf-8"))
    with Path(data_file(options, "banking77/train.csv")).open(encoding="utf-8", newline="") as file:
        ordinary = [row["text"] for row in csv.DictReader(file)]
    recall, precision = by_kind(rows)
    formed = [hits for kind, hits in recall.items() if kind != "NAME"]
    together = share(sum(hits["found"] for hits in formed), sum(hits["spans"] for hits in formed))
    tags = share(
        sum(hits["right"] for kind, hits in precision.items() if kind != "NAME"),
        sum(hits["tags"] for kind, hits in precision.items() if kind != "NAME"),
    )
    texts = ordinary[:TIMED_TEXTS]
    started = time.process_time()
    changed = sum(redact(text) != text for text in texts)
    spent_s = time.process_time() - started
    return {
        "ours": {"recall": together, "precision": tags, "us_a_text": 1e6 * spent_s / len(texts)},
        "peer": None,
        "ratio": together["value"],
        "spread": together["ci95"],
        "target": f"recall of at least {LEAST_RECALL:.0%} of what has a form",
        "passed": together["value"] >= LEAST_RECALL,
        "recall_by_kind": recall,
        "precision_by_kind": precision,
        "ordinary_texts_changed": share(changed, len(texts)),
    }


def by_kind(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``{"found", "spans"}`` by kind of span, and ``{"right", "tags"}`` by kind of tag."""
    recall: dict[str, dict[str, int]] = defaultdict(lambda: {"found": 0, "spans": 0})
    precision: dict[str, dict[str, int]] = defaultdict(lambda: {"right": 0, "tags": 0})
    for row in rows:
        text = row["full_text"]
        found = find(text, [by_cues])
        spans = [
            Found(KINDS[span["entity_type"]], span["start_position"], span["end_position"])
            for span in row["spans"]
            if span["entity_type"] in KINDS
        ]
        for span in spans:
            recall[span.kind]["spans"] += 1
            recall[span.kind]["found"] += covered(text, span, found)
        for tag in found:
            precision[tag.kind]["tags"] += 1
            precision[tag.kind]["right"] += any(
                span.kind == tag.kind and span.start < tag.end and tag.start < span.end for span in spans
            )
    return dict(sorted(recall.items())), dict(sorted(precision.items()))


def covered(text: str, span: Found, found: Sequence[Found]) -> bool:
    left = [place for place in range(span.start, span.end) if not any(tag.start <= place < tag.end for tag in found)]
    return not any(text[place].isalnum() for place in left)
