"""Check digits: what tells a payment card or an account from any other number. Pure."""

from __future__ import annotations

import ipaddress

CARD_DIGITS = range(13, 20)
IBAN_CHARACTERS = range(15, 35)


def passes_luhn(number: str) -> bool:
    """The check digit of payment cards (ISO/IEC 7812)."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [digit if index % 2 == 0 else digit * 2 - 9 * (digit > 4) for index, digit in enumerate(reversed(digits))]
    return len(digits) >= CARD_DIGITS.start and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """The check digits of an IBAN (ISO 13616): moved to the end and read as a number, 1 modulo 97."""
    compact = text.replace(" ", "")
    moved = compact[4:] + compact[:4]
    return len(compact) in IBAN_CHARACTERS and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def is_ip(text: str) -> bool:
    """An IPv4 or IPv6 address."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_us_social_security(text: str) -> bool:
    """``AAA-GG-SSSS`` as they are given out: no part of zeros, no area 666 or from 900 up."""
    area, group, serial = text[:3], text[4:6], text[7:]
    return area not in {"000", "666"} and area < "900" and group != "00" and serial != "0000"
