"""Which of a teacher's signals help: each added to gold alone, on the same rows, with intervals.

Closed: banking77, accuracy of the small encoder on the test rows. Open: bitext answers, log-likelihood a byte of the
human's answer under a student of six layers. Each difference is from the student of gold (or of the teacher's text)
alone, over the same test rows and seeds, with the interval of a paired bootstrap over rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import classified_right, data_file, log, mean
from slmops.evaluate.significance import paired_bootstrap
from slmops.pipeline.context import Context
from slmops.pipeline.teach import ask_for_answers, make_student, make_teacher, prepare_data
from slmops.recipe import parse_recipe
from slmops.store import Store
from slmops.trust import digest_file

SEEDS, QUICK_SEEDS = (0, 1), (0,)
CLOSED_ROWS, OPEN_ROWS = 3000, 160
NONE = {"gold": 1, "forward_kl": 0, "hidden": 0}
CLOSED: dict[str, dict[str, Any]] = {
    "gold": NONE,
    "forward_kl": {**NONE, "gold": 0.3, "forward_kl": 0.7},
    "reverse_kl": {**NONE, "gold": 0.3, "reverse_kl": 0.7},
    "jsd": {**NONE, "gold": 0.3, "jsd": 0.7},
    "hidden": {**NONE, "gold": 0.3, "hidden": 1},
    "forward_kl + hidden": {"gold": 0.3, "forward_kl": 0.7, "hidden": 1},
    "jsd + hidden": {**NONE, "gold": 0.3, "jsd": 0.7, "hidden": 1},
}
OPEN: dict[str, dict[str, Any]] = {
    "gold": {"losses": NONE},
    "forward_kl": {"losses": {**NONE, "gold": 0.5, "forward_kl": 0.5}},
    "reverse_kl": {"losses": {**NONE, "gold": 0.5, "reverse_kl": 0.5}},
    "jsd": {"losses": {**NONE, "gold": 0.5, "jsd": 0.5}},
    "hidden": {"losses": {**NONE, "hidden": 0.5}},
    "attention": {"losses": {**NONE, "attention": 0.5}},
    "on policy": {
        "losses": {**NONE, "gold": 0.5, "reverse_kl": 0.5},
        "on_policy_share": 0.25,
        "on_policy_tokens": 32,
    },
}
QUICK_CLOSED = ("gold", "forward_kl", "jsd")
QUICK_OPEN = ("gold", "forward_kl")


def closed_recipe(path: str, seed: int, losses: Mapping[str, float], *, quick: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "signals-closed",
        "task": "classification",
        "seed": seed,
        "data": {"train": path, "input": "{text}", "target": "{category}", "limit": CLOSED_ROWS},
        "distill": {"losses": dict(losses)},
    }
    if quick:
        raw["data"]["limit"] = 400
        raw["teacher"] = {"adapt_epochs": 0.2, "frozen_share": 0.9}
        raw["train"] = {"epochs": 2}
    return raw


def open_recipe(path: str, seed: int, distill: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    return {
        "name": "signals-open",
        "task": "conversation",
        "seed": seed,
        "data": {
            "train": path,
            "input": "{instruction}",
            "target": "{response}",
            "limit": 24 if quick else OPEN_ROWS,
            "split": {"validation": 0.1, "test": 0.2},
        },
        # Nobody writes answers here: the text is the human's for all, so that the signals alone differ.
        "teacher": {"adapt_epochs": 0.2 if quick else 2, "max_tokens": 1, "min_success_ratio": 0},
        "student": {"layers": 2 if quick else 6},
        "distill": dict(distill),
        "train": {"max_tokens": 64 if quick else 128, "epochs": 1 if quick else 3},
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    seeds = QUICK_SEEDS if quick else SEEDS
    banking, bitext = data_file(options, "banking77/train.csv"), data_file(options, "bitext_support/train.csv")
    names = {"closed": QUICK_CLOSED if quick else tuple(CLOSED), "open": QUICK_OPEN if quick else tuple(OPEN)}
    scores: dict[str, dict[str, list[float]]] = {"closed": {}, "open": {}}
    weights: dict[str, dict[str, list[str]]] = {"closed": {}, "open": {}}
    with Store.open(options.store) as store:
        for seed in seeds:
            for name in names["closed"]:
                raw = closed_recipe(banking, seed, CLOSED[name], quick=quick)
                note(scores["closed"], weights["closed"], name, right_rows(raw, store))
            for name in names["open"]:
                raw = open_recipe(bitext, seed, OPEN[name], quick=quick)
                note(scores["open"], weights["open"], name, log_likelihoods(raw, store))
    tables = {form: table(found, weights[form]) for form, found in scores.items()}
    best = max((row for row in tables["closed"] if row["signals"] != "gold"), key=lambda row: row["gain"])
    return {
        "ours": tables,
        "peer": "gold alone",
        "ratio": best["value"] / tables["closed"][0]["value"] if tables["closed"][0]["value"] else None,
        "spread": best["ci95"],
        **judged(tables, best, quick=quick),
        "seeds": len(seeds),
    }


def judged(
    tables: Mapping[str, Sequence[Mapping[str, Any]]], best: Mapping[str, Any], *, quick: bool
) -> dict[str, Any]:
    """What had to hold, and whether it did. A quick look has too few rows to show a gain: it shows that each signal
    reaches the student (whose weights differ from those of gold alone), and that none does harm beyond noise."""
    if not quick:
        return {"target": "the interval of the best closed signal lies above 0", "passed": best["ci95"][0] > 0}
    signals = [row for rows in tables.values() for row in rows if row["signals"] != "gold"]
    heard = all(row["differs"] for row in signals)
    unharmed = all(row["ci95"][1] >= 0 for row in signals)
    return {
        "target": "quick: every signal changes the student, and none makes it worse beyond noise",
        "passed": heard and unharmed,
    }


def note(
    scores: dict[str, list[float]], weights: dict[str, list[str]], name: str, found: tuple[list[float], str]
) -> None:
    """One seed's values by row, and the digest of the student's weights."""
    scores.setdefault(name, []).extend(found[0])
    weights.setdefault(name, []).append(found[1])


def table(scores: Mapping[str, Sequence[float]], weights: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """A row a setting: its mean, how far above gold alone with the interval, over the same rows, and whether the
    student is another one than that of gold alone."""
    found = []
    for name, values in scores.items():
        test = paired_bootstrap(scores["gold"], values)
        found.append(
            {
                "signals": name,
                "value": mean(values),
                "gain": test.difference,
                "ci95": list(test.ci95),
                "rows": len(values),
                "differs": weights[name] != weights["gold"],
            }
        )
    return found


def taught(raw: Mapping[str, Any], store: Store) -> tuple[Any, Any]:
    context = Context(parse_recipe(raw), store, False, log())
    data = prepare_data(context)
    teacher = make_teacher(context, data)
    answers = data if not context.recipe.closed else ask_for_answers(context, data, teacher)
    return context.test_rows(data), make_student(context, "student", answers, taught=True, teacher=teacher, data=data)


def right_rows(raw: Mapping[str, Any], store: Store) -> tuple[list[float], str]:
    rows, student = taught(raw, store)
    return classified_right(student.path, rows), weights_of(student)


def weights_of(student: Any) -> str:
    return digest_file(student.path / "model.safetensors").sha256


def log_likelihoods(raw: Mapping[str, Any], store: Store) -> tuple[list[float], str]:
    """Of each test row, a byte of the human's answer: vocabularies do not matter then."""
    from slmops.runtime import open_generator

    rows, student = taught(raw, store)
    generator = open_generator(student.path)
    scores = generator.score([(row.messages, row.target) for row in rows])
    generator.close()
    return [score.logprob / max(1, score.bytes) for score in scores], weights_of(student)
