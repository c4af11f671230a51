"""What may be kept of a request, and what is never in the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from monitor_helpers import answered

from slmops.artifacts import Message
from slmops.artifacts.events import Feedback
from slmops.errors import UsageError
from slmops.monitor.policy import MonitorPolicy, load_policy, parse_policy
from slmops.monitor.prepare import Preparation, format_check, is_json, keeps
from slmops.monitor.sketch import SKETCH_BYTES
from slmops.privacy import SubjectKey
from slmops.privacy.names import by_cues

KEY = SubjectKey(b"k" * 32)
SECRET = "card 4111 1111 1111 1111, mail ann@example.com"


def preparation(**policy: Any) -> Preparation:
    return Preparation(MonitorPolicy.model_validate(policy), KEY, (by_cues,), model="served", version="abc")


def test_without_leave_no_text_is_in_the_row() -> None:
    one = answered(messages=(Message("user", SECRET),), output=SECRET, subject="ann@example.com")
    event = preparation().event(one, sketched=True)
    assert (event["messages"], event["output"]) == (None, None)
    written = json.dumps({name: value for name, value in event.items() if name != "sketch"})
    for part in ("ann", "4111", "card", "example"):
        assert part not in written
    assert len(event["sketch"]) == SKETCH_BYTES
    assert event["input_chars"] == event["output_chars"] == len(SECRET)
    assert event["subject"] == KEY.hash("ann@example.com")
    assert (event["model"], event["version"]) == ("served", "abc")


def test_kept_texts_are_redacted_all_of_them() -> None:
    system = Message("system", "You serve bob@example.com")
    one = answered(messages=(system, Message("user", f"my name is Ann Lee. {SECRET}")), output=f"Dear Ann, {SECRET}")
    event = preparation(content="full", slices=["tenant"]).event(one, sketched=False)
    kept = event["messages"] + event["output"]
    for part in ("4111", "@", "Ann", "Lee"):
        assert part not in kept
    assert "my name is <NAME>" in kept
    assert [turn["role"] for turn in json.loads(event["messages"])] == ["system", "user"]
    assert event["sketch"] is None


def test_slices_are_the_named_ones_redacted_and_short() -> None:
    told = {"tenant": "acme", "mail": "a@b.de", "note": "x" * 500, "who": "ann@example.com"}
    event = preparation(slices=["tenant", "note", "who"]).event(answered(slices=told), sketched=False)
    assert json.loads(event["slices"]) == {"tenant": "acme", "note": "x" * 64, "who": "<EMAIL>"}


def test_sampling_keeps_about_its_share_and_always_the_same() -> None:
    policy = MonitorPolicy(content="sampled", sample=0.25)
    kept = [keeps(policy, f"id-{number}") for number in range(4000)]
    assert 0.22 < sum(kept) / 4000 < 0.28
    assert kept == [keeps(policy, f"id-{number}") for number in range(4000)]
    assert not keeps(MonitorPolicy(), "id")
    assert keeps(MonitorPolicy(content="full"), "id")


@given(st.text(), st.text())
def test_every_text_becomes_a_row_that_any_database_takes(asked: str, written: str) -> None:
    one = answered(messages=(Message("user", asked),), output=written, subject=asked or None)
    event = preparation(content="full").event(one, sketched=True)
    for value in event.values():
        if isinstance(value, str):
            value.encode()
            assert "\0" not in value


def test_feedback_is_redacted_and_hashed() -> None:
    given_ = Feedback("id", 1.0, 0.0, f"no: {SECRET}", "call +1 555 010 9999", "ann")
    kept = preparation().feedback(given_, "event")
    assert kept == {
        "event": "event",
        "subject": KEY.hash("ann"),
        "at": 1.0,
        "score": 0.0,
        "correction": "no: card <CARD>, mail <EMAIL>",
        "comment": "call <PHONE>",
    }


def test_forms_that_tasks_ask_for() -> None:
    labelled, extracted, worked = (format_check("nli", ["yes", "no"]), format_check("extraction"), format_check("math"))
    assert labelled is not None
    assert extracted is not None
    assert worked is not None
    assert (labelled("yes"), labelled("maybe")) == (True, False)
    assert (extracted('{"a": 1}'), extracted('{"a": 1')) == (True, False)
    assert (worked("#### 7"), worked("seven")) == (True, False)
    assert not is_json("[" * 100_000)
    asked_for = preparation().event(answered(wants_json=True, output="not json"), sketched=False)
    assert asked_for["format_ok"] is False
    assert preparation().event(answered(status=500), sketched=False)["format_ok"] is None


def test_policies_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("content: off\nretention_days: 7\nslices: [tenant]\nnames: cues\n")
    policy = load_policy(str(path))
    assert (policy.content, policy.retention_days, policy.slices) == ("off", 7, ("tenant",))
    assert len(policy.recognizers()) == 1
    assert load_policy("sampled").content == "sampled"
    path.write_text("")
    assert load_policy(str(path)) == MonitorPolicy()


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"contents": "full"}, "no key 'contents'.*content, sample"),
        ({"content": "everything"}, "content is 'everything'"),
        ({"sample": 2}, "sample is 2"),
        ({"retention_days": 0}, "retention_days is 0"),
        (["full"], "the file is"),
    ],
)
def test_a_wrong_policy_is_one_sentence(raw: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_policy(raw, "policy.yaml")


def test_a_policy_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*off, sampled, full"):
        load_policy("nowhere")
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="no YAML"):
        load_policy(str(tmp_path / "p.yaml"))
    with pytest.raises(UsageError, match="names"):
        MonitorPolicy(names="nobody:knows").recognizers()
