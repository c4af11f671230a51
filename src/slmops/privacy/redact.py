"""Take personal data out of a text, on this machine, before the text is written or goes anywhere else.

Found by form, each with its own check where there is one: e-mail addresses, payment cards (Luhn), IBANs (mod 97),
IP addresses, numbers of people (US social security, UK national insurance), telephone numbers, identifiers of letters
and digits, and long digit runs as account or order numbers. Each becomes a tag such as ``<EMAIL>``. The same text gives
the same result, and a redacted text redacts to itself.

Not found: names, unless a recognizer is given (:mod:`slmops.privacy.names`); postal addresses, dates of birth, and
anything that only its meaning gives away. How much is found on real rows: ``python -m benchmarks redaction``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from slmops.privacy.checksums import CARD_DIGITS, is_iban, is_ip, is_us_social_security, passes_luhn

FILLER = "\ufffc"
"""Stands where something was found, until all rules have run: no rule matches it."""
PHONE_DIGITS = range(7, 16)

_MAY_HOLD = re.compile(r"@|:.*:|(?:\d\D*){4}", re.DOTALL)
"""What every rule needs one of: most texts have none, and are done with at once."""
_EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_DIGITS = re.compile(r"(?<!\d)\d+(?:[ -]\d+)*(?!\d)")
_GROUP = re.compile(r"\d+")
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:])")
_SOCIAL_SECURITY = re.compile(r"(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])")
_NATIONAL_INSURANCE = re.compile(r"\b[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]\b")
_PHONE = re.compile(
    r"(?<![\w.,-])(?:\+|00)?\(?\d{1,4}\)?(?:[ ./-]?\(?\d{2,5}\)?){1,5}"
    r"(?P<extension>\s?(?:x|ext\.?)\s?\d{1,5})?(?![\w-])"
)
_DATE = re.compile(r"(?:\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2(?:19|20)\d{2})(?!\d)")
_IDENTIFIER = re.compile(r"\b(?=[A-Z\d-]*[A-Z])(?=(?:[A-Z-]*\d){5})[A-Z\d]+(?:-[A-Z\d]+)*\b")
_NUMBER = re.compile(r"(?<![\w.])\d{6,}(?![\w.])")


class Found(NamedTuple):
    """A piece of personal data: ``text[start:end]`` is of ``kind``, for example ``EMAIL``."""

    kind: str
    start: int
    end: int


Recognizer = Callable[[str], Iterable[Found]]
"""Finds what no form tells, people's names above all. It gets a text in which :data:`FILLER` stands for what was found
before, and tells places in it."""


def redact(text: str, recognizers: Sequence[Recognizer] = ()) -> str:
    """``text`` with what is found replaced by tags."""
    found = find(text, recognizers)
    if not found:
        return text
    pieces, at = [], 0
    for kind, start, end in found:
        pieces += [text[at:start], f"<{kind}>"]
        at = end
    return "".join([*pieces, text[at:]])


def find(text: str, recognizers: Sequence[Recognizer] = ()) -> list[Found]:
    """What is personal in ``text``, in its order, without overlaps."""
    found: list[Found] = []
    rest = text
    for rule in (*(_RULES if _MAY_HOLD.search(text) else ()), *recognizers):
        for one in rule(rest):
            if one.start < one.end and FILLER not in rest[one.start : one.end]:
                found.append(one)
                rest = rest[: one.start] + FILLER * (one.end - one.start) + rest[one.end :]
    return sorted(found, key=lambda one: one.start)


# --- rules ---------------------------------------------------------------------------------------------------------


def _rule(kind: str, pattern: re.Pattern[str], holds: Callable[[str], bool] = bool) -> Recognizer:
    def look(text: str) -> Iterator[Found]:
        return (Found(kind, *match.span()) for match in pattern.finditer(text) if holds(match[0]))

    return look


def _cards(text: str) -> Iterator[Found]:
    """Payment cards within runs of groups of digits, which may go on before and after the card."""
    for run in _DIGITS.finditer(text):
        groups = [match.span() for match in _GROUP.finditer(text, *run.span())]
        first = 0
        while first < len(groups):
            last = next(
                (last for last in range(len(groups) - 1, first - 1, -1) if _is_card(text, groups, first, last)), -1
            )
            if last >= 0:
                yield Found("CARD", groups[first][0], groups[last][1])
            first = max(first, last) + 1


def _is_card(text: str, groups: Sequence[tuple[int, int]], first: int, last: int) -> bool:
    digits = "".join(text[start:end] for start, end in groups[first : last + 1])
    return len(digits) in CARD_DIGITS and passes_luhn(digits)


def _phones(text: str) -> Iterator[Found]:
    for match in _PHONE.finditer(text):
        number = match[0].removesuffix(match["extension"] or "")
        digits = sum(character.isdigit() for character in number)
        if digits in PHONE_DIGITS and not _DATE.match(number) and not (number.isdigit() and number[0] != "0"):
            yield Found("PHONE", *match.span())


_RULES: tuple[Recognizer, ...] = (
    _rule("EMAIL", _EMAIL),
    _rule("IBAN", _IBAN, is_iban),
    _cards,
    _rule("IP", _IP, is_ip),
    _rule("ID", _SOCIAL_SECURITY, is_us_social_security),
    _rule("ID", _NATIONAL_INSURANCE),
    _phones,
    _rule("ID", _IDENTIFIER),
    _rule("NUMBER", _NUMBER),
)
"""In this order: what is checked most strictly comes first."""
