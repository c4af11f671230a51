"""Banking77 with ten labels a class: a teacher labels the other texts; its student beside label-only rows.

Each seed draws its own test rows, labels and unlabelled texts from the training file. All rows see the same labels: the
adapted teacher, the linear model on TF-IDF, the student that learns from what both of these think of the unlabelled
texts, and the same student on the labels alone. Differences are over the same test rows of all seeds, with
the interval of a paired bootstrap over rows.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import check, classified_right, data_file, log, mean, say, spread
from slmops.evaluate.baselines import baseline_scores
from slmops.evaluate.significance import paired_bootstrap
from slmops.pipeline.context import Context
from slmops.pipeline.teach import ask_for_answers, make_student, make_teacher, prepare_data
from slmops.recipe import parse_recipe
from slmops.store import Store

SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)
LABELS_EACH = 10
TEST_EACH, QUICK_TEST_EACH = 15, 2
QUICK_UNLABELLED = 300


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    table = read(Path(data_file(options, "banking77/train.csv")))
    right: dict[str, list[float]] = defaultdict(list)
    accuracy: dict[str, list[float]] = defaultdict(list)
    texts = 0
    with Store.open(options.store) as store:
        for seed in QUICK_SEEDS if quick else SEEDS:
            folder = options.store.resolve() / "few_labels" / f"{'quick-' if quick else ''}{seed}"
            texts = write_parts(table, folder, seed, quick=quick)
            for name, values in outcomes(recipe(folder, seed, quick=quick), store).items():
                right[name] += values
                accuracy[name].append(mean(values))
                say(f"seed {seed}: {name} {accuracy[name][-1]:.4f}")
    gains = {name: paired_bootstrap(right[name], right["student"]) for name in ("untaught", "linear")}
    checks = [
        {**check(f"points above {name}", [100 * test.difference], 0.0), "ci95": [100 * end for end in test.ci95]}
        for name, test in gains.items()
    ]
    return {
        "ours": mean(accuracy["student"]),
        "peer": {name: mean(accuracy[name]) for name in ("teacher", "untaught", "linear")},
        "by_seed": dict(accuracy),
        "ratio": mean(accuracy["student"]) / max(mean(accuracy[name]) for name in gains),
        "spread": spread(
            [a / max(b, c) for a, b, c in zip(*(accuracy[n] for n in ("student", "untaught", "linear")), strict=True)]
        ),
        "target": "above both label-only rows, with intervals above 0",
        "passed": quick or all(test.ci95[0] > 0 for test in gains.values()),
        "checks": checks,
        "labels_each": LABELS_EACH,
        "unlabelled_texts": texts,
        "test_rows": len(right["student"]),
    }


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def write_parts(table: Sequence[tuple[str, str]], folder: Path, seed: int, *, quick: bool) -> int:
    """Test rows and labels of each class, the rest without its labels; the number of those."""
    rng = random.Random(seed)
    of_class: dict[str, list[str]] = defaultdict(list)
    for text, label in dict(table).items():  # a text of two classes belongs to the last
        of_class[label].append(text)
    parts: dict[str, list[tuple[str, str]]] = {"test": [], "labelled": [], "unlabelled": []}
    for label, texts in sorted(of_class.items()):
        rng.shuffle(texts)
        first, second = QUICK_TEST_EACH if quick else TEST_EACH, LABELS_EACH
        parts["test"] += [(text, label) for text in texts[:first]]
        parts["labelled"] += [(text, label) for text in texts[first : first + second]]
        parts["unlabelled"] += [(text, "") for text in texts[first + second :]]
    rng.shuffle(parts["unlabelled"])
    if quick:
        del parts["unlabelled"][QUICK_UNLABELLED:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text"] if name == "unlabelled" else ["text", "category"])
            writer.writerows([text] if name == "unlabelled" else [text, label] for text, label in rows)
    return len(parts["unlabelled"])


def recipe(folder: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "few-labels",
        "task": "classification",
        "seed": seed,
        "data": {
            "train": str(folder / "labelled.csv"),
            "test": str(folder / "test.csv"),
            "input": "{text}",
            "target": "{category}",
            "split": {"validation": 0.1},
        },
        "teacher": [{"adapt_epochs": 12}, {"model": "linear"}],
        "distill": {"unlabelled": str(folder / "unlabelled.csv")},
    }
    if quick:
        raw["teacher"][0] = {"adapt_epochs": 0.2, "frozen_share": 0.9}
        raw["train"] = {"epochs": 2}
    return raw


def outcomes(raw: dict[str, Any], store: Store) -> dict[str, list[float]]:
    """For each row 1 where it is right, by name."""
    context = Context(parse_recipe(raw), store, False, log())
    data = prepare_data(context)
    teacher = make_teacher(context, data)
    answers = ask_for_answers(context, data, teacher)
    student = make_student(context, "student", answers, taught=True, teacher=teacher, data=data)
    untaught = make_student(context, "untaught", data, taught=False)
    rows = context.test_rows(data)
    linear = baseline_scores(data, context.recipe.seed, task="classification")["linear"]
    models = {"teacher": teacher, "student": student, "untaught": untaught}
    return {
        **{name: classified_right(model.path, rows) for name, model in models.items() if model is not None},
        "linear": linear.first(len(rows), seed=0).per_row.tolist(),
    }
