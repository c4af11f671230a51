"""People's names: by the words that stand before them, or by a recognizer of one's own.

:func:`by_cues` needs no dictionary and no model: after "my name is", "Mr", "Dear" and the like, up to four words that
begin with a capital letter are a name. It finds those who introduce themselves or are addressed, in English, and no
others; what is found is rarely anything else. For more, name a function of a library that is made for it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator

from slmops.errors import UsageError
from slmops.privacy.redact import Found, Recognizer

_CUE = re.compile(
    r"\b(?:(?i:my (?:full |first |last )?name(?:'s| is)|name:|i am|i'm|this is|call me|signed,?|regards,?|dear|hi|hello"
    r"|mr|mrs|ms|miss|mx|dr|prof|sir|madam|contact|speak to|spoke to|on behalf of))\.?[ \t]+"
)
_WORD = re.compile(r"[^\W\d_][\w'’-]*\.?")
MOST_WORDS = 4
# fmt: off
NO_NAMES = frozenset((
    "sir", "madam", "customer", "customers", "team", "support", "service", "all", "there", "everyone", "i", "a", "an",
    "the", "my", "your", "our", "not", "from", "in", "at", "to", "monday", "tuesday", "wednesday", "thursday", "friday",
    "saturday", "sunday", "hello", "hi", "dear", "mr", "mrs", "ms", "dr", "urgent",
))
_PARTICLES = frozenset((
    "de", "da", "do", "dos", "van", "von", "der", "den", "del", "della", "di", "la", "le", "el", "al", "bin", "ben",
    "ibn", "of", "st",
))
# fmt: on


def by_cues(text: str) -> Iterator[Found]:
    """Names after the words that announce one."""
    for cue in _CUE.finditer(text):
        end = _end_of_name(text, cue.end())
        if end > cue.end():
            yield Found("NAME", cue.end(), end)


def _end_of_name(text: str, start: int) -> int:
    end = at = start
    for _ in range(MOST_WORDS):
        word = _WORD.match(text, at)
        if word is None:
            break
        plain = word[0].rstrip(".").casefold()
        if word[0][0].isupper() and plain not in NO_NAMES:
            end = at + len(word[0].rstrip("."))
        elif plain not in _PARTICLES or end == start:
            break
        blank = re.compile(r"[ \t]+").match(text, word.end())
        if blank is None:
            break
        at = blank.end()
    return end


def recognizer(name: str) -> Recognizer | None:
    """The recognizer that ``name`` stands for: ``none``, ``cues``, or ``module:function``.

    Raises:
        UsageError: there is no such function.
    """
    builtin: dict[str, Recognizer | None] = {"none": None, "cues": by_cues}
    if name in builtin:
        return builtin[name]
    module, separator, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function) if separator else None
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"names: {name} cannot be used: {error}.", remedy=_REMEDY) from None
    if not callable(found):
        raise UsageError(f"names: {name} is no function.", remedy=_REMEDY)
    return _checked(found, name)


_REMEDY = "Name none, cues, or module:function, a function from a text to (kind, start, end)."


def _checked(function: Recognizer, name: str) -> Recognizer:
    """What a function of others tells, as ours; places outside the text are left out."""

    def look(text: str) -> Iterator[Found]:
        for kind, start, end in function(text):
            if 0 <= start < end <= len(text):
                yield Found(re.sub(r"[^A-Z_]", "", str(kind).upper()) or "NAME", int(start), int(end))

    look.__name__ = name
    return look
