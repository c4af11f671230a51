"""A teacher's opinion of answers that were given: sampled, redacted, and only where the recipe lets texts leave."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from slmops.distill import (
    OpenAITeacher,
    TeacherFailure,
    check_remote_allowed,
    judge_config,
    judge_request,
    read_score,
    redacted,
)
from slmops.errors import DataError, RecipeError
from slmops.monitor.judging import as_row, chosen
from slmops.monitor.log import EventLog, Window
from slmops.privacy import Recognizer, redact
from slmops.progress import Progress, ProgressSink, ignore
from slmops.recipe import JudgeConfig, Recipe, TeacherConfig


@dataclass(frozen=True)
class Judged:
    """``asked`` answers got ``scored`` scores from ``judge``; ``mean`` is of these, from 1 to 5."""

    judge: str
    asked: int
    scored: int
    mean: float | None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def judge_answers(
    recipe: Recipe,
    log: EventLog,
    *,
    window: Window = Window(),
    share: float = 0.05,
    most: int = 200,
    recognizers: Sequence[Recognizer] = (),
    progress: ProgressSink = ignore,
) -> Judged:
    """Ask the recipe's judge (``teacher.judge``, else the teacher) about a share of the answers whose texts were kept.

    Texts are redacted once more before they leave. An answer is asked about once.

    Raises:
        RecipeError: the recipe names no server to ask.
        PrivacyError: texts would leave this machine and the recipe does not allow it.
        DataError: no texts were kept.
        TeacherError: the judge cannot be asked.
    """
    config = _judge(recipe)
    check_remote_allowed(config, recipe.privacy)
    events = log.events(window)
    if not any(row["messages"] for row in events):
        raise DataError(
            "No texts were kept of these answers, so nobody can judge them.",
            remedy="Serve with --monitor sampled (or full), or take a longer time with --days.",
        )
    asker = OpenAITeacher(config, seed=recipe.seed)
    known = [one["event"] for one in log.judgements(window) if one["judge"] == asker.identity]
    asked = chosen(events, known, share=share, most=most, seed=recipe.seed)
    rubric = recipe.teacher.judge or JudgeConfig()
    requests = [
        redacted(
            judge_request(rubric, recipe.task, as_row(event), event["output"]), lambda text: redact(text, recognizers)
        )
        for event in asked
    ]
    rows = []
    for done, (index, outcome) in enumerate(asker.answer(requests), start=1):
        score = None if isinstance(outcome, TeacherFailure) else read_score(outcome.text)
        if score is not None:
            rows.append({"event": asked[index]["id"], "judge": asker.identity, "at": time.time(), "score": score})
        progress(Progress("judging", done, len(asked), "answers"))
    log.judge(rows)
    mean = sum(cast("int", row["score"]) for row in rows) / len(rows) if rows else None
    return Judged(asker.identity, len(asked), len(rows), mean)


def _judge(recipe: Recipe) -> TeacherConfig:
    config = judge_config(recipe.teacher) or recipe.teacher
    if not config.remote:
        raise RecipeError(
            f"teacher.model is {config.model}, which is no server that could be asked to judge.",
            remedy="Name one in teacher.judge, for example {model: openai:my-model, base_url: http://127.0.0.1:8000/v1}.",
        )
    return config
