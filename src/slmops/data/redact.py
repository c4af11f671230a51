"""Take personal data out of a text, on this machine, before the text goes anywhere else.

Found by form, each with its own check where there is one: e-mail addresses, payment cards (Luhn), IBANs (mod 97),
IP addresses, telephone numbers, and long digit runs as account or order numbers. Each becomes a tag such as
``<EMAIL>``. The same text gives the same result, and a redacted text redacts to itself.

Not found: names, postal addresses, and anything that only its meaning gives away.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

_EMAIL = re.compile(r"[\w.+%-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_DIGITS = re.compile(r"(?<!\d)\d+(?:[ -]\d+)*(?!\d)")
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:])")
_PHONE = re.compile(
    r"(?<![\w.,-])(?:\+|00)?\(?\d{1,4}\)?(?:[ ./-]?\(?\d{2,5}\)?){1,5}(?:\s?(?:x|ext\.?)\s?\d{1,5})?(?![\w-])"
)
_NUMBER = re.compile(r"(?<![\w.])\d{6,}(?![\w.])")
PHONE_DIGITS = range(7, 16)
CARD_DIGITS = range(13, 20)


def redact(text: str) -> str:
    """``text`` with what is found replaced by tags."""
    for pattern, replace in _RULES:
        text = pattern.sub(replace, text)
    return text


def passes_luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812)."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [digit if index % 2 == 0 else digit * 2 - 9 * (digit > 4) for index, digit in enumerate(reversed(digits))]
    return len(digits) >= 13 and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """The check digits of an IBAN (ISO 13616): moved to the end and read as a number, 1 modulo 97."""
    compact = text.replace(" ", "")
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def _hide_cards(run: re.Match[str]) -> str:
    """Payment cards within a run of groups of digits, which may go on before and after the card."""
    pieces = re.split(r"([ -])", run[0])  # groups at even places, what parts them at odd ones
    start = 0
    while start < len(pieces):
        for end in range(len(pieces), start, -2):
            digits = "".join(pieces[start:end:2])
            if len(digits) in CARD_DIGITS and passes_luhn(digits):
                pieces[start:end] = ["<CARD>"]
                break
        start += 2
    return "".join(pieces)


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_phone(text: str) -> bool:
    return sum(character.isdigit() for character in text) in PHONE_DIGITS


def _if(holds: Callable[[str], bool], tag: str) -> Callable[[re.Match[str]], str]:
    return lambda found: tag if holds(found[0]) else found[0]


_RULES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    (_EMAIL, "<EMAIL>"),
    (_IBAN, _if(is_iban, "<IBAN>")),
    (_DIGITS, _hide_cards),
    (_IP, _if(_is_ip, "<IP>")),
    (_PHONE, _if(_is_phone, "<PHONE>")),
    (_NUMBER, "<NUMBER>"),
)
"""In this order: what is checked most strictly comes first."""
