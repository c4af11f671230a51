"""Whether rows may be sent to the teacher that a recipe names.

Guarantees: a teacher behind a URL that is not this machine's loopback is refused unless the recipe says
``privacy: remote``. Names are not resolved: only ``localhost`` and loopback addresses count as this machine, whatever
a resolver would say of other names.
"""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from slmops.distill.budget import load_prices
from slmops.distill.judge import judge_config
from slmops.errors import PrivacyError, RecipeError
from slmops.recipe import TeacherConfig

OPENAI_URL = "https://api.openai.com/v1"
OPENAI_KEY_VARIABLE = "OPENAI_API_KEY"


def teacher_url(config: TeacherConfig) -> str:
    """Where a remote teacher is asked. The environment is not read for it: a recipe says where its rows go.

    Raises:
        RecipeError: ``teacher.base_url`` is not a plain http or https URL.
    """
    url = (config.base_url or OPENAI_URL).rstrip("/")
    try:
        parts = urlsplit(url)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    # A backslash, an "@" or a blank is where two URL parsers disagree about the host.
    if not good or re.search(r"[\s\\@\x00-\x20]", url):
        raise RecipeError(
            f"teacher.base_url is {config.base_url!r}, not a URL of a server.",
            remedy="For example: http://127.0.0.1:8000/v1",
        )
    return url


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine: localhost, 127.0.0.0/8 or ::1."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def leaves_machine(config: TeacherConfig) -> bool:
    """Whether asking this teacher, or its judge, sends rows to another machine."""
    return any(one.remote and not is_loopback(teacher_url(one)) for one in _askers(config))


def _askers(config: TeacherConfig) -> list[TeacherConfig]:
    """The teacher, and its judge where there is one."""
    judge = judge_config(config)
    return [config] if judge is None else [config, judge]


def api_key(config: TeacherConfig) -> str | None:
    """The key out of the environment, or None where none is needed.

    Raises:
        RecipeError: a key is needed and its variable is not set, or holds no key (the message never shows its value).
    """
    variable = config.api_key_env or (OPENAI_KEY_VARIABLE if config.base_url is None else None)
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise RecipeError(
            f"The environment variable {variable} holds characters that no API key has.", remedy="Set it again."
        )
    if key or is_loopback(teacher_url(config)):
        return key or None
    named = "teacher.api_key_env names" if config.api_key_env else "OpenAI's API needs a key in"
    raise RecipeError(
        f"{named} the environment variable {variable}, which is not set.",
        remedy=f"Set it: export {variable}=... (or name another in teacher.api_key_env).",
    )


def check_remote_allowed(config: TeacherConfig, privacy: str) -> None:
    """Refuse, before any work, a teacher or judge that must not or cannot be asked. ``privacy`` is the recipe's word.

    Raises:
        PrivacyError: rows would leave this machine and the recipe does not allow it.
        RecipeError: the URL is not one, the API key's variable is not set, or its price is not known.
    """
    for one in _askers(config):
        if one.remote:
            _check_one(one, privacy)


def _check_one(config: TeacherConfig, privacy: str) -> None:
    url = teacher_url(config)
    if not is_loopback(url) and privacy != "remote":
        raise PrivacyError(
            f"The teacher {config.model} is at {urlsplit(url).hostname}: the text of every training and validation row "
            f"would leave this machine, and the recipe says privacy: {privacy}.",
            remedy="Set privacy: remote to allow it (rows are redacted first), or name a teacher on this machine.",
        )
    api_key(config)
    load_prices(config)
