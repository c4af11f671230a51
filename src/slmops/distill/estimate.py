"""What asking a teacher would take: requests, tokens, money, time. Nothing is asked.

Guarantees: ``*_most`` are what the limits are checked with: at most so much, for a teacher that makes no more than a
token of each byte and stops at ``max_tokens``. Not covered: tries that fail, reasoning that a server hides and bills,
and how quick the server is: the time is for :data:`TOKENS_PER_S` and :data:`FIRST_TOKEN_S`, which it says.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from slmops.artifacts import Dataset, Row
from slmops.distill.ask import JOURNAL_NAME, TAUGHT_SPLITS, Redact, ToMessages, row_requests
from slmops.distill.budget import MOST_TOKENS_A_ESTIMATED, load_prices, money
from slmops.distill.journal import Journal, request_digest
from slmops.distill.judge import JUDGE_MAX_TOKENS, judge_config, judge_request
from slmops.distill.new_prompts import writing_request, writing_requests_at_most
from slmops.distill.prompts import reasoning_of
from slmops.distill.teachers import TeacherRequest, estimated_tokens
from slmops.recipe import CLOSED_TASKS, PricesConfig, Task, TeacherConfig

TOKENS_PER_S = 40.0
"""Tokens a second of one answer, as a guess."""
FIRST_TOKEN_S = 0.5
REASONING_TOKENS = 80
UNKNOWN_SHARE = 0.5
"""Of ``max_tokens``, for answers whose like nobody has seen."""


@dataclass(frozen=True)
class Estimate:
    """``requests`` are to be asked, ``known`` are answered already. Tokens and ``money`` are likely ones, for what is
    to be asked; ``money`` is None where no price is known, 0 for a teacher in this process. ``fits``: whether the
    most of it stays within the budgets and the likely time within the limit.
    """

    rows: int
    requests: int
    known: int
    prompt_tokens: int
    prompt_tokens_most: int
    completion_tokens: int
    completion_tokens_most: int
    money: float | None
    money_most: float | None
    currency: str | None
    time_s: float
    fits: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Sum:
    def __init__(self) -> None:
        self.requests = self.known = 0
        self.prompt = self.prompt_most = self.completion = self.completion_most = 0
        self.money = self.money_most = 0.0
        self.work_s = 0.0

    def add(self, request: TeacherRequest, completion: float, prices: PricesConfig | None, times: int = 1) -> None:
        prompt = estimated_tokens(request.messages)
        most = round(prompt * MOST_TOKENS_A_ESTIMATED)
        completion = min(round(completion), request.max_tokens)
        self.requests += times
        self.prompt += times * prompt
        self.prompt_most += times * most
        self.completion += times * completion
        self.completion_most += times * request.max_tokens
        self.money += times * money(prices, prompt, completion)
        self.money_most += times * money(prices, most, request.max_tokens)
        self.work_s += times * (FIRST_TOKEN_S + completion / TOKENS_PER_S)


def estimate(
    dataset: Dataset,
    task: Task,
    config: TeacherConfig,
    *,
    identity: str,
    to_messages: ToMessages | None = None,
    redact: Redact | None = None,
    journal_folder: Path | None = None,
) -> Estimate:
    """For :func:`slmops.distill.ask_teacher` with the same arguments; ``identity`` is the teacher's.

    New texts are counted as the recipe wants them, with one round of asking for them; the judge for every row.

    Raises:
        RecipeError: the price of the model is not known.
    """
    prices = load_prices(config) if config.remote else None
    judge = judge_config(config)
    judge_prices = load_prices(judge) if judge is not None and judge.remote else None
    labels = dataset.labels
    path = None if journal_folder is None else journal_folder / JOURNAL_NAME
    known = known_answers(path)
    total, rows, seen = _Sum(), 0, set[str]()
    train: list[Row] = []
    for split in TAUGHT_SPLITS:
        for row in dataset.rows(split):
            rows += 1
            if split == "train":
                train.append(row)
            for request in row_requests(task, labels, row, config, to_messages=to_messages, redact=redact):
                digest = request_digest(identity, request)
                if digest in seen:
                    continue
                seen.add(digest)
                if digest in known:
                    total.known += 1
                else:
                    total.add(request, _answer_tokens(task, row, config), prices)
            if judge is not None and config.judge is not None:
                answer = row.target or "x" * (3 * round(UNKNOWN_SHARE * config.max_tokens))
                total.add(judge_request(config.judge, task, row, answer), JUDGE_MAX_TOKENS / 2, judge_prices)
    if config.new_prompts is not None and train:
        closed = labels if task in CLOSED_TASKS else None
        times = writing_requests_at_most(train, closed, config)
        longest = max(train, key=lambda row: len(row.text))
        if times:
            request = writing_request(task, longest, config.new_prompts.kinds[0], None, config, 0)
            total.add(request, request.max_tokens / 2, prices, times)
            for new in row_requests(task, labels, longest, config, to_messages=to_messages, redact=redact):
                total.add(new, _answer_tokens(task, longest, config), prices, times * config.new_prompts.texts_each)
    priced = prices if prices is not None else judge_prices
    paid = not config.remote or prices is not None
    time_s = total.work_s / min(config.concurrency, max(1, total.requests))
    most_tokens = total.prompt_most + total.completion_most
    fits = (
        (config.budget_tokens is None or most_tokens <= config.budget_tokens)
        and (config.budget_money is None or total.money_most <= config.budget_money)
        and (config.time_limit_s is None or time_s <= config.time_limit_s)
    )
    return Estimate(
        rows=rows,
        requests=total.requests,
        known=total.known,
        prompt_tokens=total.prompt,
        prompt_tokens_most=total.prompt_most,
        completion_tokens=total.completion,
        completion_tokens_most=total.completion_most,
        money=round(total.money, 6) if paid else None,
        money_most=round(total.money_most, 6) if paid else None,
        currency=None if priced is None else priced.currency,
        time_s=round(time_s, 1),
        fits=fits,
    )


def known_answers(path: Path | None) -> Container[str]:
    """What can be asked whether it is ``in``: a journal that was read, or nothing."""
    if path is None or not path.exists():
        return frozenset()
    with Journal(path) as journal:
        return journal


def _answer_tokens(task: Task, row: Row, config: TeacherConfig) -> float:
    """Likely tokens of an answer: those of gold where there is one, and some to reason."""
    reasons = task != "math" and config.remote and reasoning_of(task, config.reasoning) != "none"
    if row.target is not None:
        likely = len(row.target.encode()) / 3 + 2
    else:
        likely = 8 if task in CLOSED_TASKS else UNKNOWN_SHARE * config.max_tokens
    return likely + (REASONING_TOKENS if reasons else 0)
