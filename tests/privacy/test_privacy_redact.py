from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.privacy.redact import is_iban, passes_luhn, redact


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to ann.lee+shop@mail.example.com today", "write to <EMAIL> today"),
        ("card 4111 1111 1111 1111 was charged", "card <CARD> was charged"),
        ("4111 1111 1111 1111 25 times", "<CARD> 25 times"),
        ("on 12 4111-1111-1111-1111", "on 12 <CARD>"),
        ("4111111111111111", "<CARD>"),
        ("IBAN GB82 WEST 1234 5698 7654 32 please", "IBAN <IBAN> please"),
        ("from 192.168.10.1 and ::1", "from <IP> and <IP>"),
        ("call +1 (555) 010-9999 or 555-0100-123", "call <PHONE> or <PHONE>"),
        ("account 123456, order 1234567890123456789", "account <NUMBER>, order <NUMBER>"),
    ],
)
def test_personal_data_becomes_a_tag(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize("text", ["it cost 12.50 on 3 May", "version 1.2.3", "room 404 at 10:30", "", "plain words"])
def test_ordinary_text_stays(text: str) -> None:
    assert redact(text) == text


def test_checks_of_cards_and_ibans() -> None:
    assert passes_luhn("4111 1111 1111 1111")
    assert not passes_luhn("4111 1111 1111 1112")
    assert is_iban("GB82 WEST 1234 5698 7654 32")
    assert not is_iban("GB83 WEST 1234 5698 7654 32")


@given(st.text())
def test_redacting_twice_changes_nothing(text: str) -> None:
    assert redact(redact(text)) == redact(text)


def test_formed_data_of_a_real_set_is_found(shared_data: Path) -> None:
    rows = json.loads((shared_data / "pii" / "generated_small.json").read_text("utf-8"))
    formed = [
        (row["full_text"], span["entity_value"])
        for row in rows
        for span in row["spans"]
        if span["entity_type"] in {"EMAIL_ADDRESS", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS"}
    ]
    missed = [value for text, value in formed if value in redact(text)]
    assert len(formed) >= 5
    assert len(missed) <= 0.1 * len(formed), missed
