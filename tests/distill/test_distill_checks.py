"""Judging answers: pure, so by the hundred."""

from __future__ import annotations

import json
import random
import string
import time
from fractions import Fraction

import pytest
from distill_helpers import row
from hypothesis import given, settings
from hypothesis import strategies as st

from slmops.distill.checks import (
    REASONS,
    check_answer,
    final_number,
    find_json_object,
    is_refusal,
    looks_garbled,
    match_label,
    parse_number,
    strip_reasoning,
)

INTENTS = ("card_arrival", "card", "lost_card", "refund", "Not_refunded", "exchange rate", "top-up failed")


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("refund", "refund"),
        ("Refund.", "refund"),
        ('"refund"', "refund"),
        ("**refund**", "refund"),
        ("`card_arrival`", "card_arrival"),
        ("card arrival", "card_arrival"),
        ("CARD-ARRIVAL", "card_arrival"),
        ("Label: refund", "refund"),
        ("label = 'lost card'.", "lost_card"),
        ("The answer is refund.", "refund"),
        ("The correct category is: exchange_rate", "exchange rate"),
        ("Intent: lost_card\nBecause the refund was mentioned.", "lost_card"),
        ('{"label": "refund"}', "refund"),
        ('```json\n{"intent": "lost_card"}\n```', "lost_card"),
        ("refund, because money should come back for the lost card", "refund"),
        ("I would say this is about a refund here", "refund"),
        ("This is card_arrival, I think", "card_arrival"),  # "card" stands inside the longer label
        ("not_refunded", "Not_refunded"),
        ("  top up failed\n", "top-up failed"),
    ],
)
def test_label_is_read(answer: str, label: str) -> None:
    assert match_label(answer, INTENTS) == label


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "something else",
        "refund or lost_card",
        "This is not a refund",
        "It isn't refund",
        "refunds",
        "discard",
        "Label: x",
    ],
)
def test_label_is_not_guessed(answer: str) -> None:
    assert match_label(answer, INTENTS) is None


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, the passage says otherwise.", "no"),
        ("Answer: yes", "yes"),
        ("There is no way to tell", None),
        ("A good question", None),
        ("not yes", None),
    ],
)
def test_short_labels(answer: str, label: str | None) -> None:
    assert match_label(answer, ("yes", "no")) == label


def test_nli_negation_is_not_taken_for_the_label() -> None:
    labels = ("entailment", "neutral", "contradiction")
    assert match_label("This is not entailment", labels) is None
    assert match_label("The premise gives a contradiction", labels) == "contradiction"
    assert match_label("not_entailment", ("entailment", "not_entailment")) == "not_entailment"


def test_labels_that_differ_in_case_alone_need_the_exact_spelling() -> None:
    labels = ("Apple", "apple")
    assert match_label("apple", labels) == "apple"
    assert match_label("APPLE", labels) is None


LABEL = st.text(string.ascii_lowercase + "_", min_size=4, max_size=20).filter(lambda text: text.strip("_") == text)


@given(st.sets(LABEL, min_size=2, max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_every_decoration_of_a_label_is_read_as_that_label(labels: set[str], rng: random.Random) -> None:
    ordered = sorted(labels)
    plain = [label.replace("_", " ") for label in ordered]
    if len({" ".join(text.split()) for text in plain}) < len(ordered):
        return
    label = rng.choice(ordered)
    for answer in (
        label,
        label.upper(),
        f'"{label}"',
        f"'{label}'.",
        f"{label}.",
        f"Label: {label}",
        f"  {label}\n",
        f"**{label}**",
    ):
        assert match_label(answer, ordered) == label


@given(st.text(max_size=200), st.sets(LABEL, min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_what_is_read_is_always_a_label(answer: str, labels: set[str]) -> None:
    assert match_label(answer, sorted(labels)) in {*labels, None}


@given(st.text(max_size=300), st.sampled_from(["classification", "math", "extraction", "conversation", "qa"]))
@settings(max_examples=200, deadline=None)
def test_no_answer_breaks_the_checks(answer: str, task: str) -> None:
    for gold in (None, "#### 3"):
        verdict = check_answer(task, ("yes", "nope"), row(1, target=gold), answer, "stop")  # type: ignore[arg-type]
        assert verdict.accepted == (verdict.reason is None)
        assert verdict.reason is None or verdict.reason in REASONS
        assert not verdict.accepted or verdict.normalized


@pytest.mark.parametrize("answer", ["", "   \n", "<think>hm</think>  "])
def test_empty(answer: str) -> None:
    assert check_answer("qa", None, row(1), answer, "stop").reason == "empty"


def test_truncated_is_rejected_for_every_task() -> None:
    for task in ("classification", "math", "extraction", "qa"):
        assert check_answer(task, ("refund",), row(1), "refund #### 3", "length").reason == "truncated"  # type: ignore[arg-type]


def test_reasoning_is_dropped() -> None:
    assert strip_reasoning("<think>refund? no</think>\nlost_card") == "lost_card"
    assert strip_reasoning("<think>never ends") == ""


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I am sorry, I cannot assist with this request.",
        "Sorry, I can’t comply.",
        "I cannot comply with this.",
        "As an AI language model, I do not have opinions.",
        "Unfortunately, I am unable to answer.",
        "I apologize, but I'm not able to provide this.",
    ],
)
def test_refusals(text: str) -> None:
    assert is_refusal(text)
    assert check_answer("conversation", None, row(1), text, "stop").reason == "refusal"
    assert check_answer("classification", ("refund",), row(1), text + " refund", "stop").reason == "refusal"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry to hear that your parcel is late. Let me check the tracking for you.",
        "Sorry for the trouble! You can reset it under Settings.",
        "I can't wait to help you with your order.",
        "Unfortunately, the shop is closed on Sundays.",
    ],
)
def test_apologies_are_not_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_a_refusal_that_is_the_gold_answer_is_learned() -> None:
    text = "I'm sorry, but I can't help with that."
    assert check_answer("conversation", None, row(1, target=text), text, "stop").accepted


@pytest.mark.parametrize("text", ["the the " * 200, "ha" * 400, "a" * 60, "ok\x00ok", "\ufffd" * 9, "哈" * 300])
def test_garbage(text: str) -> None:
    assert looks_garbled(text)
    assert check_answer("generation", None, row(1), text, "stop").reason == "garbage"


def test_prose_is_not_garbage(repository) -> None:  # type: ignore[no-untyped-def]
    assert not looks_garbled((repository / "src/slmops/errors.py").read_text("utf-8"))
    assert not looks_garbled("1. Open the app.\n2. Choose the card.\n3. Choose freeze.\n" * 3)
    assert not looks_garbled("--------------------------------------------------------\nTable\n" + "=" * 60)


def test_echo() -> None:
    assert check_answer("summarization", None, row(1, "say this"), "say this", "stop").reason == "echo"


def test_gold_decides_for_labels() -> None:
    wrong = check_answer("classification", INTENTS, row(1, target="card"), "refund", "stop")
    assert (wrong.accepted, wrong.reason, wrong.normalized) == (False, "disagrees_with_gold", "refund")
    assert check_answer("classification", INTENTS, row(1, target="refund"), "Refund!", "stop").normalized == "refund"
    assert check_answer("classification", INTENTS, row(1), "Refund!", "stop").accepted
    assert check_answer("classification", INTENTS, row(1), "weather", "stop").reason == "not_a_label"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("$1,234.50", Fraction("1234.5")),
        ("-$5", -5),
        ("− 7 degrees", -7),
        ("1,234,567 people", 1234567),
        ("3/4", Fraction(3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("40%", 40),
        (".5", Fraction(1, 2)),
        ("1e3", 1000),
        ("**18.00**", 18),
        ("no number", None),
        ("1/0", None),
        ("9" * 5000, None),
    ],
)
def test_numbers(text: str, number: Fraction | None) -> None:
    assert parse_number(text) == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "${:,}", "**{}**", "{}.0", "{} apples", "{}."]))
@settings(deadline=None)
def test_integers_survive_dressing(number: int, dress: str) -> None:
    assert parse_number(dress.format(number)) == number


@pytest.mark.parametrize(
    ("text", "number", "announced"),
    [
        ("6 + 6 = 12\n#### 12", 12, True),
        ("#### 3\nwait\n#### 4", 4, True),
        (r"so \boxed{\frac{1}{2}}", Fraction(1, 2), True),
        ("The final answer is $18.", 18, True),
        ("10 - 3 = 7", 7, False),
        ("it is 5-3", 3, False),
    ],
)
def test_final_number(text: str, number: Fraction, announced: bool) -> None:
    assert final_number(text) == (number, announced)


def test_math_agrees_with_gold_and_gains_the_marker() -> None:
    gold = row(1, target="48/2 = <<48/2=24>>24\n#### 1,072")
    assert check_answer("math", None, gold, "So 1072\n#### 1072", "stop").normalized == "So 1072\n#### 1072"
    assert (
        check_answer("math", None, gold, "In total 1072 clips", "stop").normalized == "In total 1072 clips\n#### 1072"
    )
    assert check_answer("math", None, gold, "#### 1073", "stop").reason == "disagrees_with_gold"
    assert check_answer("math", None, gold, "many", "stop").reason == "no_final_number"
    assert check_answer("math", None, row(1), "maybe 3 or so", "stop").reason == "no_final_number"
    assert check_answer("math", None, row(1), "The answer is 0.5", "stop").normalized == "The answer is 0.5\n#### 0.5"


def test_gsm8k_gold_passes_its_own_check(shared_data) -> None:  # type: ignore[no-untyped-def]
    with (shared_data / "gsm8k/train.jsonl").open() as file:
        golds = [json.loads(line)["answer"] for line, _ in zip(file, range(1500), strict=False)]
    bad = [g for g in golds if not check_answer("math", None, row(1, target=g), g, "stop").accepted]
    assert bad == []


def test_bitext_answers_pass(shared_data) -> None:  # type: ignore[no-untyped-def]
    import csv

    with (shared_data / "bitext_support/train.csv").open(encoding="utf-8") as file:
        answers = [raw["response"] for raw in csv.DictReader(file)][:2000]
    reasons = [check_answer("conversation", None, row(1), answer, "stop").reason for answer in answers]
    assert sum(reason is not None for reason in reasons) <= len(answers) * 0.005


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": {"b": []}}\n```', {"a": {"b": []}}),
        ('Here it is: {"a": "}"} Enjoy!', {"a": "}"}),
        ('{"a": 1} {"a": 2}', None),
        ('{"a": 1', None),
        ('{"a": NaN}', None),
        ("[1]", None),
        ("{" * 3000, None),
        ('{"a":' * 3000, None),
    ],
)
def test_json(text: str, data: object) -> None:
    assert find_json_object(text) == data
    verdict = check_answer("extraction", None, row(1), text, "stop")
    assert verdict.accepted == (data is not None)
    assert not verdict.accepted or json.loads(verdict.normalized or "") == data


@pytest.mark.parametrize(
    "piece", ["I" + " " * 60_000, "I" + " " * 50, "not ", "answer is ", "1,", "{", '{"a":1}', "the label ", ".", "1/"]
)
def test_hostile_answers_take_no_time(piece: str) -> None:
    answer = piece * max(1, 60_000 // len(piece)) + "can"
    started = time.process_time()
    for task in ("classification", "math", "extraction", "qa"):
        check_answer(task, INTENTS, row(1), answer, "stop")  # type: ignore[arg-type]
    assert time.process_time() - started < 5
