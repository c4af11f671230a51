"""Stage 1 with a text teacher: every training and validation row is asked, each answer is judged, good ones are kept.

Guarantees: no answer is asked for twice, whatever happened in between (:mod:`slmops.distill.journal`); rows that ask
the same are asked once; the outcome does not depend on the order in which answers come. The test split is copied byte
for byte: the teacher never sees it here.

Order of asking: by request digest, so that the first hundred answers are a fair sample and a hopeless teacher is
stopped early.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.distill.checks import REASONS, Verdict, check_answer
from slmops.distill.files import write_json, write_jsonl
from slmops.distill.journal import Journal, request_digest
from slmops.distill.privacy import leaves_machine
from slmops.distill.prompts import teacher_messages
from slmops.distill.teachers import TeacherFailure, TextTeacher
from slmops.errors import DataError, PrivacyError, TeacherError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import CLOSED_TASKS, Task, TeacherConfig
from slmops.runtime import Generation, GenerationRequest

logger = logging.getLogger(__name__)

TAUGHT_SPLITS = ("train", "validation")
JOURNAL_NAME = "teacher-answers.jsonl"
ANSWER_WEIGHT = 0.9
"""Probability put on a text teacher's label; the rest is spread over the others."""
EARLY_LOOK_ANSWERS = 100

Redact = Callable[[str], str]
ToMessages = Callable[[Row], tuple[Message, ...]]
_Outcomes = Generator[tuple[int, Generation | TeacherFailure], None, None]


@dataclass(frozen=True)
class _Asked:
    """One row and what came of it."""

    split: str
    row: Row
    outcome: Generation | TeacherFailure
    verdict: Verdict


def ask_teacher(
    dataset: Dataset,
    task: Task,
    config: TeacherConfig,
    ask: TextTeacher,
    draft: Draft,
    *,
    to_messages: ToMessages | None = None,
    redact: Redact | None = None,
    journal_folder: Path | None = None,
    progress: ProgressSink = ignore,
) -> None:
    """Write a :class:`Dataset` with the teacher's answers into ``draft.path``.

    ``train.jsonl``, ``validation.jsonl``: ``target`` is the teacher's accepted answer (``meta["target_source"]`` is
    "teacher"); a row whose answer was rejected keeps its gold target ("gold"), and is left out where it has none.
    ``teacher.jsonl``: every answer as it came. ``quarantine.jsonl``: what was there, and every rejected answer.
    ``summary.json``: what was there, and ``"teacher"``. For closed label sets ``teacher_<split>.npy``: float32
    ``[rows, labels]`` log-probabilities, :data:`ANSWER_WEIGHT` on the row's target.

    ``to_messages`` gives what the teacher is shown; without it, :func:`~slmops.distill.prompts.teacher_messages`, which
    tell it the form of the answer. A teacher that was adapted to the task is shown what it was adapted on.

    ``redact`` is applied to every message before it is sent (and not to the rows that are kept). It is required when
    the teacher is on another machine; pass the data stage's redaction. ``journal_folder`` keeps the answers beyond
    this draft, so that another configuration finds them again; without it they live in ``draft.work``.

    Raises:
        TeacherError: nobody answers, the token budget is spent, or too few answers are good. Answers are kept.
        PrivacyError: the teacher is on another machine and there is no ``redact``.
        DataError: a closed task without labels.
        StorageError: the disk would not take it.
    """
    started_s = time.monotonic()
    if leaves_machine(config) and redact is None:
        raise PrivacyError(
            f"The teacher {config.model} is on another machine and no redaction was given: the rows would leave as "
            "they are.",
            remedy="Pass redact, or name a teacher on this machine.",
        )
    labels = dataset.labels
    if task in CLOSED_TASKS and not labels:
        raise DataError(
            f"The task is {task}, but the data set {dataset.path} has no labels.", remedy="Give rows with labels."
        )
    rows = [(split, row) for split in TAUGHT_SPLITS for row in dataset.rows(split)]
    show = to_messages or (lambda row: teacher_messages(task, labels, row, config.system))
    requests = [_request(show(row), config, redact) for _, row in rows]
    digests = [request_digest(ask.identity, request) for request in requests]
    with Journal((journal_folder or draft.work) / JOURNAL_NAME) as journal:
        collector = _Collector(config, task, labels, rows, digests, progress)
        failures = _collect(ask, dict(zip(digests, requests, strict=True)), journal, collector)
        asked = [
            _judged(task, labels, split, row, journal.get(digest) or failures[digest])
            for (split, row), digest in zip(rows, digests, strict=True)
        ]
    summary = _summarize(asked)
    if summary["success_ratio"] < config.min_success_ratio:
        raise _too_few(asked, config, summary)
    _write(dataset, draft.path, asked, labels if task in CLOSED_TASKS else None, summary)
    # Not among the files: the same answers have the same digest, however long they took.
    draft.metrics["teacher"] = {**summary, "seconds": round(time.monotonic() - started_s, 3)}


def _request(messages: tuple[Message, ...], config: TeacherConfig, redact: Redact | None) -> GenerationRequest:
    if redact is not None:
        messages = tuple(Message(message.role, redact(message.content)) for message in messages)
    return GenerationRequest(messages, max_tokens=config.max_tokens, temperature=config.temperature)


def _judged(
    task: Task, labels: Sequence[str] | None, split: str, row: Row, outcome: Generation | TeacherFailure
) -> _Asked:
    if isinstance(outcome, TeacherFailure):
        return _Asked(split, row, outcome, Verdict(False, f"failed_{outcome.kind}", None))
    return _Asked(split, row, outcome, check_answer(task, labels, row, outcome.text, outcome.finish_reason))


# --- asking -----------------------------------------------------------------------------------------------------


class _Collector:
    """Follows the answers as they come: progress for people, and the early end of a hopeless run."""

    def __init__(
        self,
        config: TeacherConfig,
        task: Task,
        labels: Sequence[str] | None,
        rows: Sequence[tuple[str, Row]],
        digests: Sequence[str],
        progress: ProgressSink,
    ) -> None:
        self.config = config
        self._task, self._labels, self._progress = task, labels, progress
        self._total = len(rows)
        self._rows: dict[str, list[tuple[str, Row]]] = {}
        for digest, row in zip(digests, rows, strict=True):
            self._rows.setdefault(digest, []).append(row)
        self.seen: list[_Asked] = []
        self._accepted = 0
        self.tokens = 0

    def add(self, digest: str, outcome: Generation | TeacherFailure) -> None:
        if isinstance(outcome, Generation):
            self.tokens += outcome.prompt_tokens + outcome.completion_tokens
        for split, row in self._rows[digest]:
            asked = _judged(self._task, self._labels, split, row, outcome)
            self.seen.append(asked)
            self._accepted += asked.verdict.accepted
        note = f"{self._accepted / len(self.seen):.0%} good, {self.tokens:,} tokens"
        self._progress(Progress("teacher", len(self.seen), self._total, "rows", note))

    def hopeless(self) -> bool:
        return hopeless(self._accepted, len(self.seen), self.config.min_success_ratio)


def hopeless(accepted: int, answers: int, min_ratio: float) -> bool:
    """Whether so few of the first answers are good that the floor is out of reach (three standard errors below)."""
    if answers < EARLY_LOOK_ANSWERS:
        return False
    return accepted / answers + 3 * math.sqrt(min_ratio * (1 - min_ratio) / answers) < min_ratio


def _collect(
    ask: TextTeacher, requests: Mapping[str, GenerationRequest], journal: Journal, collector: _Collector
) -> dict[str, TeacherFailure]:
    """Fill the journal; what it still lacks at the end comes back as failures."""
    for digest in requests:
        if (known := journal.get(digest)) is not None:
            collector.add(digest, known)
    pending = sorted(digest for digest in requests if journal.get(digest) is None)
    logger.info("%d answers are known, %d are asked for.", len(requests) - len(pending), len(pending))
    failures: dict[str, TeacherFailure] = {}
    if not pending:
        return failures
    limit = collector.config.budget_tokens
    left_tokens = None if limit is None else max(0, limit - collector.tokens)
    answers = ask.answer([requests[digest] for digest in pending], budget_tokens=left_tokens)
    with closing(_each(answers)) as outcomes:
        for index, outcome in outcomes:
            digest = pending[index]
            if isinstance(outcome, Generation):
                journal.add(digest, outcome)
            else:
                failures[digest] = outcome
                if outcome.kind == "budget":
                    continue
            collector.add(digest, outcome)
            if collector.hopeless():
                raise _too_few(collector.seen, collector.config, _summarize(collector.seen), early=True)
    unasked = sum(failure.kind == "budget" for failure in failures.values())
    if unasked:
        raise TeacherError(
            f"The token budget is spent: {collector.tokens:,} of teacher.budget_tokens = {limit:,} were used for "
            f"{len(requests) - len(failures):,} answers, and {unasked:,} requests were not asked. Answers are kept.",
            remedy="Raise teacher.budget_tokens and run again, or ask for fewer rows (data.limit) or shorter answers "
            "(teacher.max_tokens).",
        )
    return failures


def _each(answers: Iterator[tuple[int, Generation | TeacherFailure]]) -> _Outcomes:
    """The same, closable: closing it stops the teacher's work where that is possible."""
    yield from answers


# --- what is said of it -----------------------------------------------------------------------------------------


def _summarize(asked: Sequence[_Asked]) -> dict[str, Any]:
    """Counts over rows; tokens too (rows that ask the same are counted each)."""
    answers = [one.outcome for one in asked if isinstance(one.outcome, Generation)]
    accepted = sum(one.verdict.accepted for one in asked)
    rejected = Counter(
        one.verdict.reason for one in asked if one.verdict.reason and isinstance(one.outcome, Generation)
    )
    failed = Counter(one.outcome.kind for one in asked if isinstance(one.outcome, TeacherFailure))
    return {
        "asked": len(asked),
        "accepted": accepted,
        "rejected": dict(rejected.most_common()),
        "failed": failed.total(),
        "failures": dict(failed.most_common()),
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "completion_tokens": sum(answer.completion_tokens for answer in answers),
        "success_ratio": accepted / len(asked) if asked else 1.0,
    }


_REMEDIES = {
    "truncated": "Raise teacher.max_tokens.",
    "refusal": "Say in teacher.system what the task is and why it is harmless, or ask another teacher.",
    "not_a_label": "Explain the labels in teacher.system, or ask a stronger teacher.",
    "disagrees_with_gold": "Ask a stronger teacher, or check the gold answers in data.train.",
    "no_final_number": "Ask for '#### number' in teacher.system, or ask a stronger teacher.",
    "not_json": "Describe the JSON object in teacher.system, or ask a stronger teacher.",
}


def _too_few(
    asked: Sequence[_Asked], config: TeacherConfig, summary: Mapping[str, Any], *, early: bool = False
) -> TeacherError:
    counts = Counter(one.verdict.reason or "" for one in asked if not one.verdict.accepted)
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.most_common())
    bad = [one for one in asked if not one.verdict.accepted]
    samples = "; ".join(f"row {one.row.id}: {_sample(one.outcome)}" for one in bad[:3])
    ended = "so the run was ended early" if early else "and"
    worst = counts.most_common(1)[0][0] if counts else ""
    otherwise = "See that the server is well and run again." if worst.startswith("failed_") else "Ask another teacher."
    return TeacherError(
        f"The teacher {config.model} gave {summary['accepted']:,} good answers of {len(asked):,}, {ended} "
        f"teacher.min_success_ratio is {config.min_success_ratio:g}. Not good: {reasons}. For example {samples}.",
        remedy=f"{_REMEDIES.get(worst, otherwise)} Or lower teacher.min_success_ratio. The answers are kept.",
    )


def _sample(outcome: Generation | TeacherFailure) -> str:
    text = outcome.text if isinstance(outcome, Generation) else outcome.detail
    return repr(text if len(text) <= 120 else text[:119] + "…")


# --- writing ----------------------------------------------------------------------------------------------------


def _write(
    dataset: Dataset,
    folder: Path,
    asked: Sequence[_Asked],
    labels: Sequence[str] | None,
    teacher_summary: dict[str, Any],
) -> None:
    shutil.copyfile(dataset.path / "test.jsonl", folder / "test.jsonl")
    kept_rows: dict[str, int] = {}
    for split in TAUGHT_SPLITS:
        kept = [row for one in asked if one.split == split and (row := _taught_row(one)) is not None]
        kept_rows[split] = len(kept)
        write_jsonl(folder / f"{split}.jsonl", (row.to_json() for row in kept))
        if labels is not None:
            np.save(folder / f"teacher_{split}.npy", smoothed_log_probabilities(kept, labels))
    write_jsonl(folder / "teacher.jsonl", map(_answer_json, asked))
    _write_quarantine(dataset, folder, asked)
    teacher_summary["kept_rows"] = kept_rows
    write_json(folder / "summary.json", {**dataset.summary, "teacher": teacher_summary})


def _taught_row(one: _Asked) -> Row | None:
    """The row to learn from, or None where nobody knows a good answer."""
    source: Literal["teacher", "gold"] = "teacher" if one.verdict.accepted else "gold"
    target = one.verdict.normalized if one.verdict.accepted else one.row.target
    if target is None:
        return None
    return replace(one.row, target=target, meta={**one.row.meta, "target_source": source})


def smoothed_log_probabilities(rows: Sequence[Row], labels: Sequence[str]) -> NDArray[np.float32]:
    """``[rows, labels]``: log of :data:`ANSWER_WEIGHT` on each row's target and an equal share on every other label.

    A text teacher tells one label, not how sure it is; the smoothing keeps the student from learning certainty.
    A gold target outside ``labels`` gives a uniform row.
    """
    width = len(labels)
    rest = (1 - ANSWER_WEIGHT) / (width - 1) if width > 1 else 1.0
    answer = ANSWER_WEIGHT if width > 1 else 1.0
    place = {label: index for index, label in enumerate(labels)}
    distribution = np.full((len(rows), width), rest, dtype=np.float64)
    for index, row in enumerate(rows):
        at = place.get(row.target or "")
        if at is None:
            distribution[index] = 1 / width
        else:
            distribution[index, at] = answer
    return np.log(distribution).astype(np.float32)


def _answer_json(one: _Asked) -> dict[str, Any]:
    told: dict[str, Any] = {"id": one.row.id, "split": one.split}
    if isinstance(one.outcome, Generation):
        told |= {
            "answer": one.outcome.text,
            "finish_reason": one.outcome.finish_reason,
            "prompt_tokens": one.outcome.prompt_tokens,
            "completion_tokens": one.outcome.completion_tokens,
        }
    else:
        told |= {"answer": None, "failure": one.outcome.detail}
    return {**told, "accepted": one.verdict.accepted, "reason": one.verdict.reason}


def _write_quarantine(dataset: Dataset, folder: Path, asked: Sequence[_Asked]) -> None:
    path = folder / "quarantine.jsonl"
    before = dataset.path / "quarantine.jsonl"
    if before.exists():
        shutil.copyfile(before, path)
    bad = (
        {
            **_answer_json(one),
            "stage": "distill",
            "reason": one.verdict.reason,
            "explanation": REASONS.get(one.verdict.reason or "", "the request failed"),
            "row": one.row.to_json(),
        }
        for one in asked
        if not one.verdict.accepted
    )
    write_jsonl(path, bad, append=True)
