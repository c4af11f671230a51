"""Stage 1 with a text teacher: every training and validation row is asked, each answer is judged, good ones are kept.

Guarantees: no answer is asked for twice, whatever happened in between (:mod:`slmops.distill.journal`); rows that ask
the same are asked once; the outcome does not depend on the order in which answers come. The test split is copied byte
for byte: the teacher never sees it here.

In this order: new texts (:mod:`slmops.distill.new_prompts`), answers, their checks one by one, what several samples
agree on, near-duplicates, the judge. A hopeless teacher is stopped after the first hundred answers.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slmops.artifacts import Dataset, Draft, Message, Row
from slmops.distill.agreement import Agreement, agree
from slmops.distill.asking import Asking
from slmops.distill.checks import REASONS, Verdict, check_answer, check_schema
from slmops.distill.diversity import balance, diversity
from slmops.distill.files import write_json, write_jsonl
from slmops.distill.journal import Journal, request_digest
from slmops.distill.judge import judge_request, read_score
from slmops.distill.language import check_language, is_other_language
from slmops.distill.new_prompts import Grown, Repeats, grow
from slmops.distill.privacy import leaves_machine
from slmops.distill.prompts import reasoning_of, teacher_request
from slmops.distill.teachers import TeacherFailure, TeacherRequest, TextTeacher
from slmops.errors import DataError, PrivacyError, TeacherError
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import CLOSED_TASKS, Task, TeacherConfig
from slmops.runtime import Generation

TAUGHT_SPLITS = ("train", "validation")
JOURNAL_NAME = "teacher-answers.jsonl"
ANSWER_WEIGHT = 0.9
"""Probability put on a text teacher's label; the rest is spread over the others."""
EARLY_LOOK_ANSWERS = 100

Redact = Callable[[str], str]
ToMessages = Callable[[Row], tuple[Message, ...]]


@dataclass(frozen=True)
class _Asked:
    """One row and what came of it. ``answer`` is the one that counts; ``failure`` where there is none. Tokens are of
    all samples; ``score`` is the judge's."""

    split: str
    row: Row
    answer: Generation | None
    failure: TeacherFailure | None
    verdict: Verdict
    prompt_tokens: int = 0
    completion_tokens: int = 0
    agreement: Agreement | None = None
    score: int | None = None

    @property
    def is_new(self) -> bool:
        return "new" in self.row.meta

    def rejected(self, reason: str) -> _Asked:
        return replace(self, verdict=Verdict(False, reason, self.verdict.normalized))


def ask_teacher(
    dataset: Dataset,
    task: Task,
    config: TeacherConfig,
    ask: TextTeacher,
    draft: Draft,
    *,
    judge: TextTeacher | None = None,
    to_messages: ToMessages | None = None,
    redact: Redact | None = None,
    repeats: Repeats | None = None,
    seed: int = 0,
    journal_folder: Path | None = None,
    progress: ProgressSink = ignore,
) -> None:
    """Write a :class:`Dataset` with the teacher's answers into ``draft.path``.

    ``train.jsonl``, ``validation.jsonl``: ``target`` is the teacher's accepted answer (``meta["target_source"]`` is
    "teacher"; with several samples ``meta["confidence"]`` is the share that agrees); a row whose answer was rejected
    keeps its gold target ("gold"), and is left out where it has none. New rows stand at the end of ``train.jsonl``,
    with ``meta["new"]`` and ``meta["seed"]``. ``teacher.jsonl``: every answer as it came. ``quarantine.jsonl``: what
    was there, and every rejected answer. ``summary.json``: what was there, and ``"teacher"``. For closed label sets
    ``teacher_<split>.npy``: float32 ``[rows, labels]`` log-probabilities, :data:`ANSWER_WEIGHT` on the row's target, or
    spread over the samples' votes.

    ``to_messages`` gives what the teacher is shown; without it, :func:`~slmops.distill.prompts.teacher_messages`, which
    tell it the form of the answer. A teacher that was adapted to the task is shown what it was adapted on.

    ``redact`` is applied to every message before it is sent (and not to the rows that are kept). It is required when
    the teacher is on another machine; pass the data stage's redaction. ``repeats`` tells which texts are nearly the
    same, for ``config.new_prompts`` and ``config.near_duplicates``. ``judge`` (default: the teacher) answers for
    ``config.judge``. ``journal_folder`` keeps the answers beyond this draft, so that another configuration finds them
    again; without it they live in ``draft.work``.

    Raises:
        TeacherError: nobody answers, a limit is reached, or too few answers are good. Answers are kept.
        PrivacyError: the teacher is on another machine and there is no ``redact``.
        DataError: a closed task without labels.
        RecipeError: ``config.answer_schema`` or ``config.language`` are none.
        StorageError: the disk would not take it.
        ValueError: ``repeats`` is needed and not given.
    """
    started_s = time.monotonic()
    labels = dataset.labels
    _check(dataset, task, config, redact, repeats)
    given = [(split, row) for split in TAUGHT_SPLITS for row in dataset.rows(split)]
    with Journal((journal_folder or draft.work) / JOURNAL_NAME) as journal:
        stage = _Stage(task, labels, config, Asking(journal, config), redact, to_messages, progress)
        grown = stage.grow(dataset, ask, [row for split, row in given if split == "train"], repeats, seed)
        asked = stage.answers(ask, [*given, *(("train", row) for row in grown.rows)])
        if config.near_duplicates is not None and repeats is not None and task not in CLOSED_TASKS:
            asked = without_repeats(asked, repeats, config.near_duplicates)
        if config.judge is not None:
            asked = stage.judged(judge or ask, asked)
        summary = _summarize(asked) | {"spent": stage.asking.spent()}
    if grown.summary:
        summary["new_prompts"] = grown.summary | _new_summary(asked)
    if summary["success_ratio"] < config.min_success_ratio:
        raise _too_few(asked, config, summary)
    _write(dataset, draft.path, asked, labels if task in CLOSED_TASKS else None, summary)
    # Not among the files: the same answers have the same digest, however long they took.
    draft.metrics["teacher"] = {**summary, "seconds": round(time.monotonic() - started_s, 3)}


def _check(dataset: Dataset, task: Task, config: TeacherConfig, redact: Redact | None, repeats: Repeats | None) -> None:
    if leaves_machine(config) and redact is None:
        raise PrivacyError(
            f"The teacher {config.model} is on another machine and no redaction was given: the rows would leave as "
            "they are.",
            remedy="Pass redact, or name a teacher on this machine.",
        )
    if task in CLOSED_TASKS and not dataset.labels:
        raise DataError(
            f"The task is {task}, but the data set {dataset.path} has no labels.", remedy="Give rows with labels."
        )
    if config.answer_schema is not None:
        check_schema(config.answer_schema)
    if config.language is not None:
        check_language(config.language)
    if repeats is None and (config.new_prompts is not None or config.near_duplicates is not None):
        raise ValueError("new_prompts and near_duplicates need repeats")


def row_requests(
    task: Task,
    labels: Sequence[str] | None,
    row: Row,
    config: TeacherConfig,
    *,
    to_messages: ToMessages | None = None,
    redact: Redact | None = None,
) -> list[TeacherRequest]:
    """What is asked for one row: ``config.samples`` requests that differ in their seed."""
    request = teacher_request(task, labels, row, config, messages=to_messages(row) if to_messages else None)
    request = redacted(request, redact)
    if config.samples == 1:
        return [request]
    return [replace(request, seed=number) for number in range(1, config.samples + 1)]


def redacted(request: TeacherRequest, redact: Redact | None) -> TeacherRequest:
    if redact is None:
        return request
    messages = tuple(Message(message.role, redact(message.content)) for message in request.messages)
    return replace(request, messages=messages)


# --- asking -----------------------------------------------------------------------------------------------------


class _Stage:
    """The steps that ask, over one journal."""

    def __init__(
        self,
        task: Task,
        labels: Sequence[str] | None,
        config: TeacherConfig,
        asking: Asking,
        redact: Redact | None,
        to_messages: ToMessages | None,
        progress: ProgressSink,
    ) -> None:
        self.asking = asking
        self._task, self._labels, self._config = task, labels, config
        self._redact, self._to_messages, self._progress = redact, to_messages, progress
        self._check = partial(
            check_answer,
            task,
            labels,
            keep_steps=reasoning_of(task, config.reasoning) == "keep",
            schema=config.answer_schema,
        )

    def grow(
        self, dataset: Dataset, ask: TextTeacher, train: Sequence[Row], repeats: Repeats | None, seed: int
    ) -> Grown:
        if self._config.new_prompts is None or repeats is None:
            return Grown([], {})
        known = [row.text for split in ("validation", "test") for row in dataset.rows(split)]

        def answers(requests: Sequence[TeacherRequest]) -> list[str | None]:
            shown = [redacted(request, self._redact) for request in requests]
            digests = [request_digest(ask.identity, request) for request in shown]
            counter = _Counter("new texts", len(set(digests)), self._progress, self.asking)
            self.asking.fill(ask, dict(zip(digests, shown, strict=True)), counter.add)
            found = [self.asking.journal.get(digest) for digest in digests]
            return [None if one is None or one.finish_reason == "length" else one.text for one in found]

        closed = self._labels if self._task in CLOSED_TASKS else None
        return grow(train, known, self._task, closed, self._config, seed=seed, repeats=repeats, ask=answers)

    def answers(self, ask: TextTeacher, rows: Sequence[tuple[str, Row]]) -> list[_Asked]:
        """What came of each row, in order."""
        by_digest: dict[str, TeacherRequest] = {}
        digests: list[tuple[str, ...]] = []
        for _, row in rows:
            requests = row_requests(
                self._task, self._labels, row, self._config, to_messages=self._to_messages, redact=self._redact
            )
            own = tuple(request_digest(ask.identity, request) for request in requests)
            by_digest |= zip(own, requests, strict=True)
            digests.append(own)
        collector = _Collector(self._config, rows, digests, self._judge_one, self._progress, self.asking)
        failures = self.asking.fill(ask, by_digest, collector.add)
        del by_digest, collector
        return [self._settle(split, row, own, failures) for (split, row), own in zip(rows, digests, strict=True)]

    def _judge_one(self, row: Row, outcome: Generation | TeacherFailure) -> Verdict:
        """The checks that need nothing but the row and one answer."""
        if isinstance(outcome, TeacherFailure):
            return Verdict(False, f"failed_{outcome.kind}", None)
        verdict = self._check(row, outcome.text, outcome.finish_reason)
        if verdict.accepted and verdict.normalized is not None and self._task not in {*CLOSED_TASKS, "extraction"}:
            wanted = self._config.language
            if wanted is not None and is_other_language(verdict.normalized, wanted, row.text):
                return Verdict(False, "wrong_language", None)
        return verdict

    def _settle(self, split: str, row: Row, digests: Sequence[str], failures: Mapping[str, TeacherFailure]) -> _Asked:
        found = [self.asking.journal.get(digest) for digest in digests]
        answers = [one for one in found if one is not None]
        tokens = (sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers))
        if not answers:
            failure = failures[digests[0]]
            return _Asked(split, row, None, failure, self._judge_one(row, failure))
        verdicts = [self._judge_one(row, one or failures[digest]) for one, digest in zip(found, digests, strict=True)]
        if len(digests) == 1:
            asked = _Asked(split, row, answers[0], None, verdicts[0], *tokens)
        else:
            agreement = agree(self._task, verdicts)
            at = agreement.chosen
            if at is None:  # nothing could be read: told is what most of them are
                reason, _ = Counter(one.reason for one, said in zip(verdicts, found, strict=True) if said).most_common(
                    1
                )[0]
                asked = _Asked(split, row, answers[0], None, Verdict(False, reason, None), *tokens, agreement=agreement)
            else:
                asked = _Asked(split, row, found[at], None, verdicts[at], *tokens, agreement=agreement)
                if asked.verdict.accepted and agreement.share < self._config.min_agreement:
                    asked = asked.rejected("low_agreement")
        wanted = row.meta.get("seed_label")
        if wanted is not None and asked.verdict.accepted and asked.verdict.normalized != wanted:
            return asked.rejected("disagrees_with_seed")
        return asked

    def judged(self, judge: TextTeacher, asked: Sequence[_Asked]) -> list[_Asked]:
        """The same, with the judge's scores; what is below the least one is rejected."""
        config = self._config.judge
        if config is None:
            return list(asked)
        requests: dict[str, TeacherRequest] = {}
        digests: list[str | None] = []
        for one in asked:
            if not one.verdict.accepted or one.verdict.normalized is None:
                digests.append(None)
                continue
            request = redacted(judge_request(config, self._task, one.row, one.verdict.normalized), self._redact)
            digests.append(digest := request_digest(f"judge: {judge.identity}", request))
            requests[digest] = request
        counter = _Counter("judge", len(requests), self._progress, self.asking)
        self.asking.fill(judge, requests, counter.add)
        scored = []
        for one, own in zip(asked, digests, strict=True):
            if own is None:
                scored.append(one)
                continue
            said = self.asking.journal.get(own)
            score = None if said is None else read_score(said.text)
            one = replace(one, score=score)
            bad = "not_judged" if score is None else "low_judge_score" if score < config.min_score else None
            scored.append(one if bad is None else one.rejected(bad))
        return scored


@dataclass
class _Counter:
    """Progress of requests that no row waits for."""

    task: str
    total: int
    progress: ProgressSink
    asking: Asking
    done: int = field(default=0, init=False)

    def add(self, digest: str, outcome: Generation | TeacherFailure) -> None:
        self.done += 1
        self.progress(Progress(self.task, self.done, self.total, "requests", _spent_note(self.asking)))


class _Collector:
    """Follows the answers as they come: progress for people, and the early end of a hopeless run."""

    def __init__(
        self,
        config: TeacherConfig,
        rows: Sequence[tuple[str, Row]],
        digests: Sequence[tuple[str, ...]],
        judge_one: Callable[[Row, Generation | TeacherFailure], Verdict],
        progress: ProgressSink,
        asking: Asking,
    ) -> None:
        self._config, self._judge_one, self._progress, self._asking = config, judge_one, progress, asking
        self._total = sum(map(len, digests))
        self._rows: dict[str, list[tuple[str, Row]]] = {}
        for own, row in zip(digests, rows, strict=True):
            for digest in own:
                self._rows.setdefault(digest, []).append(row)
        self._seen = self._accepted = 0
        self._first: list[_Asked] = []

    def add(self, digest: str, outcome: Generation | TeacherFailure) -> None:
        for split, row in self._rows.pop(digest):
            verdict = self._judge_one(row, outcome)
            self._seen += 1
            # Of several samples some may be wrong: only what cannot be read counts against them this early.
            self._accepted += verdict.accepted or (self._config.samples > 1 and verdict.normalized is not None)
            if self._seen <= EARLY_LOOK_ANSWERS:
                self._first.append(_asked_once(split, row, outcome, verdict))
        note = f"{self._accepted / self._seen:.0%} good, {_spent_note(self._asking)}"
        self._progress(Progress("teacher", self._seen, self._total, "rows", note))
        if self._seen >= EARLY_LOOK_ANSWERS and self._first:
            if hopeless(self._accepted, self._seen, self._config.min_success_ratio):
                raise _too_few(self._first, self._config, _summarize(self._first), early=True)
            if self._seen >= 10 * EARLY_LOOK_ANSWERS:
                self._first = []


def _asked_once(split: str, row: Row, outcome: Generation | TeacherFailure, verdict: Verdict) -> _Asked:
    if isinstance(outcome, TeacherFailure):
        return _Asked(split, row, None, outcome, verdict)
    return _Asked(split, row, outcome, None, verdict, outcome.prompt_tokens, outcome.completion_tokens)


def _spent_note(asking: Asking) -> str:
    tokens = f"{asking.prompt_tokens + asking.completion_tokens:,} tokens"
    return tokens if asking.currency is None else f"{tokens}, {asking.money:.2f} {asking.currency}"


def hopeless(accepted: int, answers: int, min_ratio: float) -> bool:
    """Whether so few of the first answers are good that the floor is out of reach (three standard errors below)."""
    if answers < EARLY_LOOK_ANSWERS:
        return False
    return accepted / answers + 3 * math.sqrt(min_ratio * (1 - min_ratio) / answers) < min_ratio


def without_repeats(asked: Sequence[_Asked], repeats: Repeats, threshold: float) -> list[_Asked]:
    """Of nearly equal answers to different prompts the first stays; the others are rejected."""
    first: dict[tuple[Message, ...], str] = {}
    for one in asked:
        if one.verdict.accepted and one.verdict.normalized is not None:
            first.setdefault(one.row.messages, one.verdict.normalized)
    again = dict(zip(first, repeats([*first.values()], [], threshold), strict=True))
    return [
        one.rejected("near_duplicate") if one.verdict.accepted and again.get(one.row.messages) else one for one in asked
    ]


# --- what is said of it -----------------------------------------------------------------------------------------


def _summarize(asked: Sequence[_Asked]) -> dict[str, Any]:
    """Counts over rows; tokens too (rows that ask the same are counted each). New rows count apart."""
    asked = [one for one in asked if not one.is_new]
    accepted = sum(one.verdict.accepted for one in asked)
    rejected = Counter(one.verdict.reason for one in asked if one.verdict.reason and one.failure is None)
    failed = Counter(one.failure.kind for one in asked if one.failure is not None)
    summary: dict[str, Any] = {
        "asked": len(asked),
        "accepted": accepted,
        "rejected": dict(rejected.most_common()),
        "failed": failed.total(),
        "failures": dict(failed.most_common()),
        "prompt_tokens": sum(one.prompt_tokens for one in asked),
        "completion_tokens": sum(one.completion_tokens for one in asked),
        "success_ratio": accepted / len(asked) if asked else 1.0,
    }
    if shares := [one.agreement.share for one in asked if one.agreement is not None]:
        summary["agreement"] = {"mean": round(float(np.mean(shares)), 4), "unanimous": sum(s == 1 for s in shares)}
    if scores := Counter(one.score for one in asked if one.score is not None):
        summary["judge_scores"] = {str(score): scores[score] for score in sorted(scores)}
    return summary


def _new_summary(asked: Sequence[_Asked]) -> dict[str, Any]:
    new = [one for one in asked if one.is_new]
    reasons = Counter(one.verdict.reason for one in new if one.verdict.reason)
    return {"accepted": sum(one.verdict.accepted for one in new), "rejected": dict(reasons.most_common())}


_REMEDIES = {
    "truncated": "Raise teacher.max_tokens.",
    "refusal": "Say in teacher.system what the task is and why it is harmless, or ask another teacher.",
    "not_a_label": "Explain the labels in teacher.system, or ask a stronger teacher.",
    "disagrees_with_gold": "Ask a stronger teacher, or check the gold answers in data.train.",
    "no_final_number": "Ask for '#### number' in teacher.system, or ask a stronger teacher.",
    "not_json": "Describe the JSON object in teacher.system, or ask a stronger teacher.",
    "not_in_schema": "Describe the fields in teacher.system, or correct teacher.answer_schema.",
    "low_agreement": "Lower teacher.temperature or teacher.min_agreement, or ask a stronger teacher.",
    "wrong_language": "Name the language in teacher.system.",
    "near_duplicate": "Raise teacher.near_duplicates, or leave it out.",
    "low_judge_score": "Look at the scores in teacher.jsonl; then change teacher.judge.rubric or min_score.",
    "not_judged": "Name a stronger model in teacher.judge.model.",
}


def _too_few(
    asked: Sequence[_Asked], config: TeacherConfig, summary: Mapping[str, Any], *, early: bool = False
) -> TeacherError:
    bad = [one for one in asked if not one.verdict.accepted and not one.is_new]
    counts = Counter(one.verdict.reason or "" for one in bad)
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in counts.most_common())
    samples = "; ".join(f"row {one.row.id}: {_sample(one)}" for one in bad[:3])
    ended = "so the run was ended early" if early else "and"
    worst = counts.most_common(1)[0][0] if counts else ""
    otherwise = "See that the server is well and run again." if worst.startswith("failed_") else "Ask another teacher."
    return TeacherError(
        f"The teacher {config.model} gave {summary['accepted']:,} good answers of {summary['asked']:,}, {ended} "
        f"teacher.min_success_ratio is {config.min_success_ratio:g}. Not good: {reasons}. For example {samples}.",
        remedy=f"{_REMEDIES.get(worst, otherwise)} Or lower teacher.min_success_ratio. The answers are kept.",
    )


def _sample(one: _Asked) -> str:
    text = one.answer.text if one.answer is not None else one.failure.detail if one.failure is not None else ""
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
        kept = [(one, row) for one in asked if one.split == split and (row := _taught_row(one)) is not None]
        rows = [row for _, row in kept]
        kept_rows[split] = len(rows)
        write_jsonl(folder / f"{split}.jsonl", (row.to_json() for row in rows))
        if labels is not None:
            logs = smoothed_log_probabilities(rows, labels, [_votes(one) for one, _ in kept])
            np.save(folder / f"teacher_{split}.npy", logs)
        if split == "train":
            if labels is not None:
                teacher_summary["balance"] = balance((row.target or "" for row in rows), labels)
            else:
                teacher_summary["answer_diversity"] = diversity(row.target or "" for row in rows)
            teacher_summary["prompt_diversity"] = diversity(row.text for row in rows)
    write_jsonl(folder / "teacher.jsonl", map(_answer_json, asked))
    _write_quarantine(dataset, folder, asked)
    teacher_summary["kept_rows"] = kept_rows
    write_json(folder / "summary.json", {**dataset.summary, "teacher": teacher_summary})


def _taught_row(one: _Asked) -> Row | None:
    """The row to learn from, or None where nobody knows a good answer."""
    if not one.verdict.accepted:
        if one.row.target is None:
            return None
        return replace(one.row, meta={**one.row.meta, "target_source": "gold"})
    meta = {**one.row.meta, "target_source": "teacher"}
    if one.agreement is not None:
        meta["confidence"] = round(one.agreement.share, 4)
    return replace(one.row, target=one.verdict.normalized, meta=meta)


def _votes(one: _Asked) -> Mapping[str, int] | None:
    return one.agreement.votes if one.verdict.accepted and one.agreement is not None else None


def smoothed_log_probabilities(
    rows: Sequence[Row], labels: Sequence[str], votes: Sequence[Mapping[str, int] | None] = ()
) -> NDArray[np.float32]:
    """``[rows, labels]``: log of :data:`ANSWER_WEIGHT` on each row's target and an equal share on every other label.

    A text teacher tells one label, not how sure it is; the smoothing keeps the student from learning certainty. With
    ``votes`` (label -> samples, one a row or None) each label gets that distribution in the measure of its votes.
    A gold target outside ``labels`` gives a uniform row.
    """
    width = len(labels)
    if width == 1:
        return np.zeros((len(rows), 1), dtype=np.float32)
    rest = (1 - ANSWER_WEIGHT) / (width - 1)
    place = {label: index for index, label in enumerate(labels)}
    distribution = np.full((len(rows), width), rest, dtype=np.float64)
    for index, row in enumerate(rows):
        said = (votes[index] if votes else None) or {row.target or "": 1}
        known = {place[label]: count for label, count in said.items() if label in place}
        if not known:
            distribution[index] = 1 / width
        for at, count in known.items():
            distribution[index, at] += (ANSWER_WEIGHT - rest) * count / sum(known.values())
    return np.log(distribution).astype(np.float32)


def _answer_json(one: _Asked) -> dict[str, Any]:
    told: dict[str, Any] = {"id": one.row.id, "split": one.split}
    if one.answer is not None:
        told |= {
            "answer": one.answer.text,
            "finish_reason": one.answer.finish_reason,
            "prompt_tokens": one.prompt_tokens,
            "completion_tokens": one.completion_tokens,
        }
    else:
        told |= {"answer": None, "failure": one.failure.detail if one.failure else ""}
    if one.agreement is not None:
        told |= {"agreement": round(one.agreement.share, 4), "votes": one.agreement.votes}
    if one.score is not None:
        told["judge_score"] = one.score
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
