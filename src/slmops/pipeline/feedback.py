"""From what people said of answers to rows that a recipe can read, with lineage to the events.

The events stay where they are; the rows become an artifact of the store, whose inputs are the bundle and a digest of
the events and what was said of them: ``slmops trace`` leads from a model back to them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import yaml

from slmops.artifacts import Artifact, Bundle, Curated, Draft, Message, Row
from slmops.data.similar import repeats
from slmops.distill import LocalTeacher, TeacherFailure, check_answer, student_messages, teacher_request
from slmops.errors import DataError, ModelError
from slmops.monitor import curate as curating
from slmops.monitor.log import EventLog, Window
from slmops.package import resolve_model_folder
from slmops.privacy import Recognizer, redact
from slmops.recipe import CLOSED_TASKS, Task, TeacherConfig
from slmops.runtime import open_classifier, open_generator
from slmops.runtime.description import ModelDescription
from slmops.store import Store, code_version
from slmops.trust import digest_json

ONE_COLUMN = re.compile(r"\{([^{}|]+)\}")
SURE = 0.7
"""A classifier that teaches is believed from this confidence on."""


@dataclass(frozen=True)
class Columns:
    """What the recipe calls a row's parts: ``input`` and ``target``, or ``messages`` for both."""

    input: str = "text"
    target: str = "label"
    messages: str | None = None

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Columns:
        """The columns of a recipe's ``data`` section. Where its template joins several columns, a row cannot be taken
        apart again: the columns are ``text`` and ``label`` then."""
        data = recipe.get("data") or {}
        if data.get("messages"):
            return cls(messages=str(data["messages"]))
        names = [ONE_COLUMN.fullmatch(str(data.get(key) or "")) for key in ("input", "target")]
        default = cls()
        return cls(
            names[0][1].strip() if names[0] else default.input, names[1][1].strip() if names[1] else default.target
        )

    def row(self, one: curating.Curated) -> dict[str, Any]:
        """The columns, and where they come from."""
        told = {"event": one.event, "source": one.source, "answered": one.answered}
        if self.messages is None and len([turn for turn in one.messages if turn.role != "system"]) == 1:
            return {self.input: one.text, self.target: one.target, **told}
        turns = [turn.to_json() for turn in one.messages] + [{"role": "assistant", "content": one.target}]
        return {self.messages or "messages": turns, **told}


def curate_feedback(
    bundle: Bundle,
    log: EventLog,
    store: Store,
    *,
    window: Window = Window(),
    teacher: Path | None = None,
    most_per_label: int | None = None,
    near_duplicates: float = 0.9,
    recognizers: Sequence[Recognizer] = (),
) -> Curated:
    """Feedback on a bundle's answers as an artifact of the store; the same feedback gives the same one.

    ``teacher``: a model on this machine that answers what people called bad without saying what is right.

    Raises:
        DataError: nobody said anything of its answers, or nothing of it can be learnt from.
        ModelError: the teacher cannot be opened, or answers with other labels.
    """
    given = log.feedback(window)
    said = {one["event"] for one in given}
    answered = [_redacted(event, recognizers) for event in log.events(window) if event["id"] in said]
    given = [{**one, "correction": _redact(one["correction"], recognizers)} for one in given]
    if not given:
        raise DataError(
            "There is no feedback on these answers.",
            remedy="Send some to POST /v1/feedback, or take a longer time with --days.",
        )
    recipe = yaml.safe_load((bundle.path / "recipe.yaml").read_text("utf-8")) or {}
    description = ModelDescription.read(bundle.model_path)
    task = cast("Task", description.task or recipe.get("task") or "generation")
    inputs: dict[str, Artifact | str] = {"bundle": bundle, "events": _digest(answered, given)}
    if teacher is not None:
        inputs["teacher"] = _teacher_digest(teacher)

    def build(draft: Draft) -> None:
        curation = curating.curate(
            answered,
            given,
            labels=description.labels,
            teacher=None if teacher is None else _Teacher(teacher, task, description.labels),
            repeats=partial(repeats, threshold=near_duplicates),
            most_per_label=most_per_label,
            rows_per_label=_rows_per_label(bundle),
        )
        _write(draft, curation, Columns.of(recipe))

    return store.stage(
        "feedback",
        Curated,
        inputs=inputs,
        config={"most_per_label": most_per_label, "near_duplicates": near_duplicates},
        code_version=code_version("slmops.monitor.curate", "slmops.pipeline.feedback", "slmops.privacy"),
        build=build,
    ).artifact


def _rows_per_label(bundle: Bundle) -> int:
    """Training rows of a label on average; 0 for an open task."""
    data = bundle.report.get("data") or {}
    labels = data.get("labels") or ()
    return round(data["rows"]["train"] / len(labels)) if labels else 0


def artifacts_of(store: Path, events: Iterable[str]) -> list[Path]:
    """Curated artifacts of the store that hold rows of these events."""
    wanted = set(events)
    found = []
    for path in sorted((store / "artifacts" / Curated.kind).glob("*/rows.jsonl")):
        others = [path, path.with_name("quarantine.jsonl")]
        if any(json.loads(line)["event"] in wanted for one in others for line in _lines(one)):
            found.append(path.parent)
    return found


def remove_derived(store: Path, events: Sequence[str]) -> tuple[list[str], list[str]]:
    """Delete the curated artifacts that hold rows of these events; their names, and those of what was made from them
    and is still there (data sets, models): that is for a person to decide."""
    paths = artifacts_of(store, events) if events else []
    if not paths:
        return [], []
    with Store.open(store) as opened:
        lineages = [opened.trace(opened.find(path)) for path in paths]
        later = {f"{node.kind} {node.digest[:12]}" for lineage in lineages for node in lineage.descendants}
        for path in paths:
            shutil.rmtree(path)
    with Store.open(store):
        pass  # what is gone leaves the index
    return [path.name for path in paths], sorted(later)


def _write(draft: Draft, curation: curating.Curation, columns: Columns) -> None:
    if not curation.rows:
        reasons = "; ".join(f"{rows} {why}" for why, rows in curation.summary["quarantined"]["reasons"].items())
        raise DataError(f"Nothing can be learnt from this feedback: {reasons}.", remedy="See content: in the policy.")
    rows = "".join(json.dumps(columns.row(row), ensure_ascii=False) + "\n" for row in curation.rows)
    (draft.path / "rows.jsonl").write_text(rows, "utf-8")
    left_out = "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in curation.quarantine)
    (draft.path / "quarantine.jsonl").write_text(left_out, "utf-8")
    summary = {**curation.summary, "columns": [*columns.row(curation.rows[0])]}
    (draft.path / "summary.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draft.metrics["rows"] = len(curation.rows)
    draft.metrics["new_labels"] = len(curation.summary["new_labels"])


def _digest(events: Sequence[Mapping[str, Any]], given: Sequence[Mapping[str, Any]]) -> str:
    """Of what the rows are made of, and nothing that tells it."""
    texts = [(one["id"], one["messages"], one["output"]) for one in events]
    said = [(one["event"], one["subject"], one["score"], one["correction"]) for one in given]
    return digest_json({"events": sorted(texts, key=str), "feedback": sorted(said, key=str)})


def _redacted(event: Mapping[str, Any], recognizers: Sequence[Recognizer]) -> dict[str, Any]:
    """Once more: a recognizer may have come after the event."""
    turns = json.loads(event["messages"]) if event["messages"] else None
    again = turns and [{**turn, "content": redact(turn["content"], recognizers)} for turn in turns]
    messages = json.dumps(again, ensure_ascii=False) if again else None
    return {**event, "messages": messages, "output": _redact(event["output"], recognizers)}


def _redact(text: str | None, recognizers: Sequence[Recognizer]) -> str | None:
    return None if text is None else redact(text, recognizers)


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.exists() else []


# --- a teacher on this machine ------------------------------------------------------------------------------------


def _teacher_digest(path: Path) -> str:
    from slmops.package.resolve import artifact_around

    artifact = artifact_around(path)
    return digest_json(str(path.resolve())) if artifact is None else artifact.digest


class _Teacher:
    """Answers of a model folder: a classifier's label where it is sure, a language model's text where it is sound."""

    def __init__(self, path: Path, task: Task, labels: Sequence[str]) -> None:
        self.folder = resolve_model_folder(path)
        self.task, self.labels = task, tuple(labels)
        self.form = ModelDescription.read(self.folder).form

    def __call__(self, conversations: Sequence[tuple[Message, ...]]) -> list[str | None]:
        return self._labels(conversations) if self.form == "classifier" else self._texts(conversations)

    def _labels(self, conversations: Sequence[tuple[Message, ...]]) -> list[str | None]:
        if self.task not in CLOSED_TASKS:
            raise ModelError(
                f"{self.folder} chooses labels, and the answers are texts.", remedy="Name another --teacher."
            )
        classifier = open_classifier(self.folder)
        rows = classifier.probabilities([messages[-1].content for messages in conversations])
        names = classifier.labels
        classifier.close()
        return [names[int(row.argmax())] if row.max() >= SURE else None for row in rows]

    def _texts(self, conversations: Sequence[tuple[Message, ...]]) -> list[str | None]:
        rows = [Row(str(number), messages) for number, messages in enumerate(conversations)]
        closed = self.task in CLOSED_TASKS
        config = TeacherConfig()
        generator = open_generator(self.folder)
        requests = [
            teacher_request(
                self.task,
                self.labels or None,
                row,
                config,
                temperature=0.0,
                messages=None if closed else student_messages(self.task, None, row),
            )
            for row in rows
        ]
        answers: list[str | None] = [None] * len(rows)
        for index, outcome in LocalTeacher(generator, identity=str(self.folder)).answer(requests):
            if not isinstance(outcome, TeacherFailure):
                verdict = check_answer(self.task, self.labels or None, rows[index], outcome.text, outcome.finish_reason)
                answers[index] = verdict.normalized if verdict.accepted else None
        generator.close()
        return answers
