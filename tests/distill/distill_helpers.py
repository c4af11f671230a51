"""Data sets and teachers for the tests of stage 1."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slmops.artifacts import Dataset, Draft, Message, Row, drafting
from slmops.recipe import TeacherConfig


def row(number: int, text: str | None = None, target: str | None = None, **meta: Any) -> Row:
    return Row(f"r{number}", (Message("user", text or f"question {number}"),), target, meta)


def make_dataset(
    folder: Path,
    train: Sequence[Row],
    validation: Sequence[Row] = (),
    test: Sequence[Row] = (),
    labels: Sequence[str] | None = None,
) -> Dataset:
    with drafting("dataset", folder / "data") as draft:
        for split, rows in (("train", train), ("validation", validation), ("test", test)):
            lines = [json.dumps(one.to_json()) + "\n" for one in rows]
            (draft.path / f"{split}.jsonl").write_text("".join(lines), "utf-8")
        (draft.path / "quarantine.jsonl").write_text('{"reason": "was here before"}\n', "utf-8")
        summary = {"labels": None if labels is None else list(labels), "kept": "as it was"}
        (draft.path / "summary.json").write_text(json.dumps(summary), "utf-8")
    return Dataset.open(folder / "data")


def make_draft(folder: Path) -> Draft:
    out, work = folder / "out", folder / "work"
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    return Draft(out, work)


def config(url: str, **more: Any) -> TeacherConfig:
    settings: dict[str, Any] = {"timeout_s": 5.0, "retries": 3, "min_success_ratio": 0.0, **more}
    return TeacherConfig(model="openai:fake", base_url=url, **settings)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
