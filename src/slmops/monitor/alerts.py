"""Rules on the figures of a window, and a webhook that hears of them.

Which rules fire is a pure function of the figures. What goes out is the rule, the figure and the model's name: no text,
no subject, no request. A webhook is told of a change alone: that a rule has begun to fire, or has ended.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slmops.errors import ServeError, UsageError
from slmops.monitor.quality import figures, value_of

TIMEOUT_S = 10
METRICS = (*figures([]), "drift", "lost", "gaps")
"""What a rule may speak of: the figures of a window; ``drift``: views with an alarm; ``lost``: events that were lost;
``gaps``: times of which events are missing."""


class Rule(BaseModel):
    """``at_least``: rows that a figure must be made of before it counts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    above: float | None = None
    below: float | None = None
    at_least: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _says_something(self) -> Rule:
        if self.metric not in METRICS:
            raise ValueError(f"there is no metric {self.metric!r}; there are {', '.join(METRICS)}")
        if (self.above is None) == (self.below is None):
            raise ValueError("give either above or below")
        return self

    @property
    def name(self) -> str:
        return f"{self.metric} {'above' if self.below is None else 'below'} {self._limit:g}"

    @property
    def _limit(self) -> float:
        limit = self.above if self.below is None else self.below
        assert limit is not None
        return limit

    def fires(self, value: float) -> bool:
        return value > self._limit if self.below is None else value < self._limit


class Rules(BaseModel):
    """``webhook``: where changes are posted as JSON; nobody is told without it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    window_hours: Annotated[float, Field(gt=0)] = 24.0
    webhook: str | None = None


@dataclass(frozen=True)
class Alert:
    """A rule that fires, and the figure that it fires at."""

    rule: str
    metric: str
    value: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def load_rules(path: Path) -> Rules:
    """Raises :class:`UsageError` with what is wrong in the file."""
    try:
        rules = Rules.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is no YAML: {error}.") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "the file"
        raise UsageError(
            f"{path}: {where}: {problem['msg'].removeprefix('Value error, ')}.",
            remedy="For example: rules: [{metric: error_share, above: 0.02, at_least: 50}]",
        ) from None
    if rules.webhook is not None:
        check_url(rules.webhook)
    return rules


def check_url(url: str) -> None:
    """Raises :class:`UsageError` for anything but http and https."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise UsageError(
            f"webhook is {url!r}, not a URL of a server.", remedy="For example: http://127.0.0.1:9000/alerts"
        )


def firing(rules: Sequence[Rule], measured: Mapping[str, Any]) -> list[Alert]:
    """The rules that fire on these figures. What is not known fires nothing."""
    alerts = []
    for rule in rules:
        value, rows = value_of(measured.get(rule.metric))
        if (
            value is not None
            and (rows >= rule.at_least or rule.metric in {"drift", "lost", "gaps"})
            and rule.fires(value)
        ):
            alerts.append(Alert(rule.name, rule.metric, value, rows))
    return alerts


def changes(before: Sequence[str], now: Sequence[Alert]) -> tuple[list[Alert], list[str]]:
    """Alerts that are new, and rules that no longer fire. ``before``: rules that fired last time."""
    return [alert for alert in now if alert.rule not in before], [
        rule for rule in before if rule not in {alert.rule for alert in now}
    ]


def send(url: str, body: Mapping[str, Any]) -> None:
    """Post ``body`` as JSON.

    Raises:
        ServeError: nobody took it.
    """
    check_url(url)
    data = json.dumps(body, ensure_ascii=False).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with _opener().open(request, timeout=TIMEOUT_S):
            pass
    except (OSError, urllib.error.URLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        host = urlsplit(url).hostname
        raise ServeError(
            f"The webhook at {host} did not take the alert: {reason}.", remedy="It is sent again next time."
        ) from None


def _opener() -> urllib.request.OpenerDirector:
    """No redirects: an alert goes where it was told to go, and nowhere else."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    return urllib.request.build_opener(Stay)
