"""Figures, alerts, ledger, curation and judging: pure functions of rows."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitor_helpers import NOW, row, said, turns

from slmops.artifacts import Message
from slmops.errors import ServeError, UsageError
from slmops.monitor.alerts import Alert, Rule, changes, check_url, firing, load_rules, send
from slmops.monitor.curate import curate
from slmops.monitor.judging import as_row, chosen
from slmops.monitor.ledger import Prices, Use, break_even, ledger, use_of
from slmops.monitor.quality import by_group, figures, quantile, share, value_of

# --- figures


def test_figures_by_hand() -> None:
    events = [row(n, latency_ms=float(n), finish_reason="length" if n == 1 else "stop") for n in range(1, 5)]
    events += [row(5, status=500, latency_ms=1e6, confidence=None, format_ok=None)]
    feedback = [said("id-1", score=1.0), said("id-2", score=0.0, correction="fee"), said("id-2", subject="x")]
    found = figures(events, feedback, [{"event": "id-1", "judge": "j", "score": 4}])
    assert found["requests"] == 5
    assert found["error_share"]["value"] == 0.2
    assert found["latency_ms_p50"] == {"value": 2.5, "rows": 4}
    assert found["confidence_mean"]["rows"] == 4
    assert found["confidence_mean"]["value"] == pytest.approx(0.9)
    assert found["length_stops"]["value"] == 0.25
    assert found["feedback_score"] == {"value": 0.5, "rows": 2}
    assert found["corrected_share"]["value"] == 0.25
    assert found["judge_score"] == {"value": 4, "rows": 1}
    assert (found["prompt_tokens"], found["completion_tokens"]) == (28, 4)
    assert found["first_ms_p95"]["value"] is None


def test_nothing_is_not_zero() -> None:
    found = figures([])
    assert found["requests"] == 0
    assert all(value_of(value)[0] is None for value in found.values() if isinstance(value, dict))


def test_groups_are_those_that_part_the_events() -> None:
    events = [row(1, slices='{"t": "a"}'), row(2, slices='{"t": "b"}', status=500), row(3, kind="chat")]
    groups = by_group(events, [said("id-1", score=1.0), said("id-3", score=0.0)], [])
    assert set(groups) == {"kind chat", "kind classify", "slice t=a", "slice t=b"}
    assert groups["slice t=a"]["feedback_score"]["value"] == 1.0
    assert groups["slice t=b"]["error_share"]["value"] == 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_numpys(values: list[float], level: float) -> None:
    assert quantile(values, level) == pytest.approx(float(np.quantile(values, level)), rel=1e-9, abs=1e-6)


def test_wilson_by_its_table() -> None:
    assert share(8, 10)["ci95"] == pytest.approx([0.4902, 0.9433], abs=1e-4)
    assert share(0, 20)["ci95"][0] == 0
    assert share(20, 20)["ci95"][1] == 1


# --- alerts


def test_rules_fire_on_what_is_known_and_enough() -> None:
    rules = [
        Rule(metric="error_share", above=0.1, at_least=10),
        Rule(metric="feedback_score", below=0.5, at_least=3),
        Rule(metric="judge_score", below=3),
        Rule(metric="drift", above=0),
        Rule(metric="requests", above=100),
    ]
    measured = {
        "error_share": {"value": 0.5, "rows": 9},
        "feedback_score": {"value": 0.2, "rows": 3},
        "judge_score": {"value": None, "rows": 0},
        "drift": 2,
        "requests": 101,
    }
    assert firing(rules, measured) == [
        Alert("feedback_score below 0.5", "feedback_score", 0.2, 3),
        Alert("drift above 0", "drift", 2.0, 2),
        Alert("requests above 100", "requests", 101.0, 101),
    ]
    begun, ended = changes(["drift above 0", "gone above 1"], firing(rules, measured))
    assert [one.metric for one in begun] == ["feedback_score", "requests"]
    assert ended == ["gone above 1"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules: []", "rules"),
        ("rules: [{metric: speed, above: 1}]", "no metric 'speed'; there are requests"),
        ("rules: [{metric: drift}]", "either above or below"),
        ("rules: [{metric: drift, above: 1, below: 2}]", "either above or below"),
        ("rules: [{metric: drift, above: 0}]\nwebhook: ftp://x", "not a URL"),
        ("rules: [{metric: drift, above: 0}]\nhook: x", "hook"),
        ("rules: [", "no YAML"),
    ],
)
def test_wrong_rules_are_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "alerts.yaml").write_text(text)
    with pytest.raises(UsageError, match=told):
        load_rules(tmp_path / "alerts.yaml")
    with pytest.raises(UsageError, match="cannot be read"):
        load_rules(tmp_path / "nowhere.yaml")


class Hook(HTTPServer):
    """A webhook that keeps what it is told, and answers as it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.told: list[Any] = []
        self.status = 200
        self.url = f"http://127.0.0.1:{self.server_address[1]}/hook"


class Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        self.server.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hook() -> Iterator[Hook]:
    server = Hook()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_webhook_hears_of_it_and_is_followed_nowhere(hook: Hook) -> None:
    send(hook.url, {"a": "ü"})
    assert hook.told == [{"a": "ü"}]
    for status in (302, 500):
        hook.status = status
        with pytest.raises(ServeError, match=r"127\.0\.0\.1 did not take the alert"):
            send(hook.url, {})
    assert len(hook.told) == 3
    with pytest.raises(UsageError):
        check_url("file:///etc/passwd")
    with pytest.raises(ServeError):
        send("http://127.0.0.1:9/", {})


# --- ledger


def test_the_ledger_by_hand() -> None:
    use = Use(
        requests=1000, prompt_tokens=2_000_000, completion_tokens=500_000, busy_s=10, days=2, first_at=0, joules=7.2e6
    )
    prices = Prices(1.0, 4.0, machine_hour=0.01, training_hour=2, training_s=7200, kwh=0.5, currency="EUR")
    found = ledger(use, prices)
    assert found["student_cost"] == pytest.approx(0.01 * 48 + 0.5 * 2)
    assert found["teacher_cost"] == pytest.approx(4.0)
    assert found["training_cost"] == 4.0
    assert found["saved"] == pytest.approx(4.0 - 1.48)
    assert found["saved_after_training"] == pytest.approx(-1.48)
    assert found["energy_kwh"] == pytest.approx(2)
    assert found["break_even"]["days"] == pytest.approx(4.0 / (2.52 / 2))
    assert found["break_even"]["at"] == pytest.approx(found["break_even"]["days"] * 86_400)
    assert found["break_even"]["requests"] == pytest.approx(500 * found["break_even"]["days"])
    assert found["student_per_1000"] == pytest.approx(1.48)


def test_a_student_that_costs_more_never_pays() -> None:
    use = Use(10, 100, 10, 1, 1, 0)
    assert ledger(use, Prices(1, 1, machine_hour=1))["break_even"] is None
    assert ledger(use, Prices())["teacher_cost"] is None
    assert ledger(use, Prices())["break_even"] is None
    assert break_even(Use(0, 0, 0, 0, 0), 1, 1) is None
    assert break_even(use, 0, 1) == {"days": 0.0, "at": 0.0, "requests": 0.0}
    assert ledger(use_of([]), Prices(1, 1))["student_per_1000"] is None


def test_use_is_of_good_answers() -> None:
    events = [row(1), row(86_401), row(2, status=500), row(3, prompt_tokens=None)]
    use = use_of(events, [{"joules": 5.0}, {"joules": None}])
    assert (use.requests, use.prompt_tokens, use.completion_tokens) == (3, 14, 3)
    assert use.days == pytest.approx(1)
    assert use.joules == 5.0
    assert use_of(events).joules is None
    assert use.first_at == NOW + 1


# --- curation


def kept(number: int, text: str, output: str = "refund", **changes: Any) -> dict[str, Any]:
    return row(number, messages=turns(text), output=output, **changes)


def test_what_each_kind_of_feedback_teaches() -> None:
    events = [kept(n, text) for n, text in enumerate(("lost", "fee?", "bad", "why", "unsure", "silent", "two"))]
    events.append(row(7))
    feedback = [
        said("id-0", score=0.0, correction=" card_lost "),
        said("id-1", score=1.0),
        said("id-2", score=0.2),
        said("id-3", comment="hm"),
        said("id-4", score=0.0),
        said("id-6", correction="a"),
        said("id-6", subject="other", correction="b"),
        said("id-7", score=1.0),
    ]
    answers = {"bad": "fee", "unsure": None}
    found = curate(
        events,
        feedback,
        labels=["refund", "fee"],
        teacher=lambda asked: [answers[messages[-1].content] for messages in asked],
    )
    assert [(one.text, one.target, one.source, one.new_label) for one in found.rows] == [
        ("lost", "card_lost", "correction", True),
        ("fee?", "refund", "confirmed", False),
        ("bad", "fee", "teacher", False),
    ]
    assert {one.event: one.reason for one in found.quarantine} == {
        "id-3": "a comment alone",
        "id-4": "called bad, and the teacher is not sure either",
        "id-6": "people corrected it to different answers",
        "id-7": "its text was not kept",
    }
    assert found.summary["new_labels"] == ["card_lost"]
    assert found.summary["sources"] == {"correction": 1, "confirmed": 1, "teacher": 1}


def test_without_a_teacher_what_is_only_bad_is_left_out() -> None:
    found = curate([kept(1, "x")], [said("id-1", score=0.0)])
    assert found.rows == ()
    assert "no teacher was given" in found.quarantine[0].reason
    same = curate([kept(1, "x")], [said("id-1", score=0.0)], teacher=lambda _: ["refund"])
    assert same.rows == ()
    assert "same answer" in same.quarantine[0].reason


def test_one_text_one_row_and_no_contradictions() -> None:
    events = [
        kept(1, "Where is it?"),
        kept(2, "where  is IT?"),
        kept(3, "why"),
        kept(4, "why"),
        kept(5, "where is it now?"),
    ]
    feedback = [said(f"id-{n}", correction="fee" if n != 4 else "card") for n in range(1, 6)]
    found = curate(events, feedback, repeats=lambda texts: [n > 0 for n, _ in enumerate(texts)])
    assert [one.event for one in found.rows] == ["id-1"]
    assert found.summary["duplicates_removed"] == 2
    assert {one.event for one in found.quarantine} == {"id-3", "id-4"}


def test_no_label_takes_more_than_its_share() -> None:
    events = [kept(n, f"text {n}") for n in range(60)]
    feedback = [said(f"id-{n}", correction="many" if n < 50 else f"few{n % 2}", at=NOW + n) for n in range(60)]
    found = curate(events, feedback, labels=["many"])
    assert found.summary["balance"] == {"many": 15, "few0": 5, "few1": 5}
    assert found.summary["over_balance"] == 35
    assert min(int(one.event[3:]) for one in found.rows if one.target == "many") == 35
    assert len(curate(events, feedback, labels=["many"], most_per_label=2).rows) == 6
    assert len(curate(events, feedback).rows) == 60


def test_a_new_label_may_have_as_many_rows_as_the_others_had() -> None:
    """Callers correct it most, and the model has seen none of it."""
    events = [kept(n, f"text {n}") for n in range(60)]
    feedback = [said(f"id-{n}", correction="new" if n < 50 else f"few{n % 2}", at=NOW + n) for n in range(60)]
    known = ["few0", "few1"]
    assert curate(events, feedback, labels=known, rows_per_label=40).summary["balance"]["new"] == 40
    assert curate(events, feedback, labels=known, rows_per_label=4).summary["balance"]["new"] == 15
    assert curate(events, feedback, labels=known, rows_per_label=40, most_per_label=3).summary["balance"]["new"] == 3


SAYINGS = st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", ""]), st.sampled_from([0.0, 1.0, None]))


@given(st.lists(SAYINGS, max_size=20))
def test_a_curation_never_contradicts_itself(given_: list[tuple[str, str, float | None]]) -> None:
    events = [kept(n, text) for n, (text, _, _) in enumerate(given_)]
    feedback = [said(f"id-{n}", correction=c or None, score=s) for n, (_, c, s) in enumerate(given_)]
    found = curate(events, feedback, labels=["refund"])
    assert len({one.text for one in found.rows}) == len(found.rows)
    assert not {one.event for one in found.rows} & {one.event for one in found.quarantine}
    assert found.summary["rows"] == len(found.rows)


# --- judging


def test_judged_answers_are_drawn_evenly_once() -> None:
    events = [kept(n, f"text {n}") for n in range(100)] + [row(100), kept(101, "x", status=500)]
    first = chosen(events, [], share=0.2, most=50, seed=1)
    assert len(first) == 20
    again = chosen(events, [one["id"] for one in first], share=0.2, most=50, seed=1)
    assert again == []
    more = chosen(events, [one["id"] for one in first], share=0.5, most=30, seed=1)
    assert len(more) == 10
    assert not {one["id"] for one in more} & {one["id"] for one in first}
    assert as_row(first[0]).messages == (Message("user", json.loads(first[0]["messages"])[0]["content"]),)
