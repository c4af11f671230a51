"""What a teacher may cost, what it has cost, and what a request can cost at most.

Pure but for :func:`load_prices`. Guarantees: :class:`Ledger` lets a request leave only where its cost at most, and that
of all in flight, fits in what is left; a request that may have been paid for without an answer (a timeout, a body that
was cut) counts at its most. "At most" is a byte a token, which holds for every byte-level tokenizer, until the server's
own counts have told better; a server that counts more than a token a byte can overrun by those in flight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from slmops.errors import RecipeError
from slmops.recipe import PricesConfig, TeacherConfig

MOST_TOKENS_A_ESTIMATED = 3.0
"""Estimates count three bytes a token; no byte-level tokenizer makes more than a token of each byte."""
LEARNT_FROM = 8
LEARNT_MARGIN = 1.2


@dataclass(frozen=True)
class Limits:
    """Bounds of one call; None: none. ``time_s``: no request begins later."""

    tokens: int | None = None
    money: float | None = None
    time_s: float | None = None


UNLIMITED = Limits()


def money(prices: PricesConfig | None, prompt_tokens: float, completion_tokens: float) -> float:
    """Cost in the prices' currency; 0 where no price is known."""
    if prices is None:
        return 0.0
    return (prompt_tokens * prices.input_per_million + completion_tokens * prices.output_per_million) / 1e6


def load_prices(config: TeacherConfig) -> PricesConfig | None:
    """The prices of ``config.model``; None where the recipe gives none.

    A file holds one mapping a model: ``{MODEL: {input_per_million: ..., output_per_million: ..., currency: USD}}``;
    MODEL may be written with or without "openai:".

    Raises:
        RecipeError: the file cannot be read, or does not tell the price of the model.
    """
    if config.prices is None or isinstance(config.prices, PricesConfig):
        return config.prices
    path = Path(config.prices)
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"teacher.prices cannot be read: {error}.", path=path) from None
    if not isinstance(raw, Mapping):
        raise RecipeError(
            "teacher.prices is a mapping from model to prices.",
            path=path,
            remedy="For example: some-model: {input_per_million: 0.3, output_per_million: 1.1, currency: USD}",
        )
    entry: Any = raw.get(config.model, raw.get(config.model.removeprefix("openai:")))
    if entry is None:
        raise RecipeError(
            f"There is no price of {config.model} in it; it has {', '.join(map(str, raw)) or 'none'}.",
            path=path,
            remedy=f"Add: {config.model.removeprefix('openai:')}: {{input_per_million: ..., output_per_million: ...}}",
        )
    try:
        return PricesConfig.model_validate(entry)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise RecipeError(f"The price of {config.model}, {where}: {problem['msg'].lower()}.", path=path) from None


@dataclass
class Ledger:
    """Reserved before, settled after each request. Counts are of prompt and completion tokens."""

    limits: Limits
    prices: PricesConfig | None = None
    spent_tokens: int = 0
    spent_money: float = 0.0
    _reserved_tokens: int = field(default=0, init=False)
    _reserved_money: float = field(default=0.0, init=False)
    _told: int = field(default=0, init=False)
    _largest_ratio: float = field(default=0.0, init=False)

    @property
    def bounded(self) -> bool:
        return self.limits.tokens is not None or self.limits.money is not None

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight, so that no more will come back."""
        return self._reserved_tokens == 0

    def most_prompt_tokens(self, estimated: int) -> int:
        """At most so many, for a prompt that is estimated at so many."""
        learnt = min(MOST_TOKENS_A_ESTIMATED, LEARNT_MARGIN * self._largest_ratio)
        return math.ceil(estimated * (learnt if self._told >= LEARNT_FROM else MOST_TOKENS_A_ESTIMATED))

    def reserve(self, prompt_tokens: int, completion_tokens: int) -> bool:
        """Set aside; False where it does not fit into what is left now."""
        tokens, cost = prompt_tokens + completion_tokens, money(self.prices, prompt_tokens, completion_tokens)
        limits = self.limits
        if limits.tokens is not None and self.spent_tokens + self._reserved_tokens + tokens > limits.tokens:
            return False
        if limits.money is not None and self.spent_money + self._reserved_money + cost > limits.money * (1 + 1e-12):
            return False
        self._reserved_tokens += tokens
        self._reserved_money += cost
        return True

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """``(prompt, completion)`` tokens, set aside before and used in the end."""
        self._reserved_tokens -= sum(reserved)
        self._reserved_money = 0.0 if self.idle else self._reserved_money - money(self.prices, *reserved)
        self.spent_tokens += sum(used)
        self.spent_money += money(self.prices, *used)

    def learn(self, estimated: int, prompt_tokens: int) -> None:
        """The server counted ``prompt_tokens`` where ``estimated`` were."""
        self._told += 1
        self._largest_ratio = max(self._largest_ratio, prompt_tokens / max(1, estimated))

    def told(self) -> str:
        parts = []
        if self.limits.tokens is not None:
            parts.append(f"{self.spent_tokens:,} of {self.limits.tokens:,} tokens")
        if self.limits.money is not None and self.prices is not None:
            parts.append(f"{self.spent_money:.4g} of {self.limits.money:.4g} {self.prices.currency}")
        return f"{' and '.join(parts)} were spent"
