from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slmops.errors import StorageError, UsageError
from slmops.privacy import Found, SubjectKey, find
from slmops.privacy.checksums import is_iban, passes_luhn
from slmops.privacy.names import by_cues, recognizer
from slmops.privacy.redact import redact


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
        ("fax 001-420-335-7509x38548", "fax <PHONE>"),
        ("his number is 531-21-7351", "his number is <ID>"),
        ("NI QQ 12 34 56 C or AB 12 34 56 C", "NI QQ 12 34 56 C or <ID>"),
        ("order AB-123456-X and part SM-G991B", "order <ID> and part SM-G991B"),
    ],
)
def test_personal_data_becomes_a_tag(text: str, expected: str) -> None:
    assert redact(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "it cost 12.50 on 3 May",
        "version 1.2.3",
        "room 404 at 10:30",
        "",
        "plain words",
        "on 1998-06-28 14:48:14",
        "born 12/27/1986",
    ],
)
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


def test_places_are_told_in_order_without_overlaps() -> None:
    text = "a@b.de, 4111 1111 1111 1111, ::1"
    found = find(text)
    assert [(one.kind, text[one.start : one.end]) for one in found] == [
        ("EMAIL", "a@b.de"),
        ("CARD", "4111 1111 1111 1111"),
        ("IP", "::1"),
    ]


CARDS = st.integers(10**14, 10**15 - 1).map(
    lambda body: next(f"{body}{d}" for d in range(10) if passes_luhn(f"{body}{d}"))
)
MAILS = st.from_regex(r"\A[a-z]{1,9}(\.[a-z]{1,5})?@[a-z]{1,9}\.(com|de|org)\Z")
ADDRESSES = st.ip_addresses().map(str)
PHONES = st.from_regex(r"\A\+[1-9][0-9]{0,2} [1-9][0-9]{2} [0-9]{3} [0-9]{4}\Z")
SURROUNDINGS = st.text(st.characters(categories=["Ll", "Zs"]), max_size=12)


@given(SURROUNDINGS, CARDS | MAILS | ADDRESSES | PHONES, SURROUNDINGS)
def test_whatever_has_the_form_is_gone(before: str, personal: str, after: str) -> None:
    assert personal not in redact(f"{before} {personal} {after}")


@given(st.text(), st.text())
def test_recognizers_see_and_change_what_no_rule_found(text: str, name: str) -> None:
    def everything(rest: str) -> list[Found]:
        return [Found("NAME", 0, len(rest))]

    assert redact("plain words", [everything]) == "<NAME>"
    assert redact(f"{text} a@b.de", [everything]).count("<EMAIL>") >= 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("My name is Patricia Jeknić but call me Pat", "My name is <NAME> but call me <NAME>"),
        ("Dear Sir or Madam, I am not amused", "Dear Sir or Madam, I am not amused"),
        ("Mr. van den Berg and Dr Li", "Mr. van den Berg and Dr <NAME>"),
        ("this is Ann de la Cruz speaking", "this is <NAME> speaking"),
        ("i am sorry, I'm late", "i am sorry, I'm late"),
    ],
)
def test_names_behind_words_that_announce_them(text: str, expected: str) -> None:
    assert redact(text, [by_cues]) == expected


@given(st.text())
def test_redacting_names_twice_changes_nothing(text: str) -> None:
    once = redact(f"my name is {text}", [by_cues])
    assert redact(once, [by_cues]) == once


def test_a_recognizer_of_ones_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def names(text):\n    return [('per-son', 0, 3), ('x', 5, 999)]\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = recognizer("mine:names")
    assert mine is not None
    assert redact("Ann is here", [mine]) == "<PERSON> is here"
    assert recognizer("none") is None
    for wrong in ("mine:nothing", "nowhere:names", "spacy", "mine:__name__"):
        with pytest.raises(UsageError, match="names"):
            recognizer(wrong)


def test_a_subject_is_a_hash_under_a_key_that_stays(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "subject.key"
    key = SubjectKey.at(path)
    assert SubjectKey.at(path) == key
    assert path.stat().st_mode & 0o777 == 0o600
    assert key.hash("ann") == key.hash("ann") != key.hash("bob")
    assert len(key.hash("ann")) == 32
    assert SubjectKey.at(tmp_path / "other.key").hash("ann") != key.hash("ann")
    assert key.secret.hex() not in repr(key)
    path.write_text("short")
    with pytest.raises(UsageError, match="no key of 32 bytes"):
        SubjectKey.at(path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        SubjectKey.at(tmp_path / "file" / "subject.key")
