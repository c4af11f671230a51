"""Whether a teacher's answer may be learned from.

Pure: :func:`check_answer` decides from the row and the answer alone. It is lenient about form where the meaning is
certain (case, quotes, "Label: x", a code fence around JSON) and strict about everything else: a doubtful answer is
rejected, because a wrong one is learned as if it were right.

Not covered: whether an open answer is true or well written, and its language.
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

from slmops.artifacts import Row
from slmops.recipe import CLOSED_TASKS, Task

REASONS = {
    "empty": "nothing was answered",
    "truncated": "the answer was cut at max_tokens",
    "refusal": "the teacher refused",
    "garbage": "the answer repeats itself or is not text",
    "echo": "the answer is the question",
    "not_a_label": "no single label of the set could be read from the answer",
    "disagrees_with_gold": "the answer differs from the gold answer",
    "no_final_number": "there is no final number",
    "not_json": "the answer is not one JSON object",
}
"""Every reason for a rejection, in words."""


@dataclass(frozen=True)
class Verdict:
    """
    ``reason``      a key of :data:`REASONS`, or None when accepted
    ``normalized``  the answer in the form to learn; also given for a rejected answer that could be read
    """

    accepted: bool
    reason: str | None
    normalized: str | None


def check_answer(task: Task, labels: Sequence[str] | None, row: Row, answer: str, finish_reason: str) -> Verdict:
    """Judge one answer. ``row.target`` is the gold answer where there is one; ``finish_reason`` "length" means cut."""
    text = strip_reasoning(answer)
    if not text:
        return _rejected("truncated" if finish_reason == "length" else "empty")
    if finish_reason == "length":
        return _rejected("truncated")
    if task in CLOSED_TASKS:
        return _check_label(labels or (), row.target, text)
    if is_refusal(text) and not (row.target and is_refusal(row.target)):
        return _rejected("refusal")
    if looks_garbled(text):
        return _rejected("garbage")
    if task == "math":
        return _check_math(row.target, text)
    if task == "extraction":
        return _check_json(text)
    if text == row.text.strip():
        return _rejected("echo")
    return Verdict(True, None, text)


def _rejected(reason: str, normalized: str | None = None) -> Verdict:
    return Verdict(False, reason, normalized)


def strip_reasoning(text: str) -> str:
    """The answer without a leading ``<think>…</think>`` block and outer white space; "" if the block never ends."""
    stripped = text.strip()
    if stripped.startswith("<think>"):
        _, ended, stripped = stripped.partition("</think>")
        return stripped.strip() if ended else ""
    return stripped


# --- refusals and garbage ---------------------------------------------------------------------------------------

_REFUSAL = re.compile(
    r"""^\W*(?:
        (?:i\s*['’]?\s*a?m\s+(?:very\s+|so\s+)?sorry|sorry|i\s+apologi[sz]e|unfortunately)\b[^.!?\n]{0,40}?
            \bi\s*(?:['’]m|\s+am)?\s*(?:can\s*not|can['’]?t|(?:not\s+|un)able\s+to|won['’]?t)\s+
            (?:help|assist|comply|fulfil+|do\s+that|answer|provide|classify|engage|continue|process)
      | i\s*(?:can\s*not|can['’]?t|won['’]?t|(?:['’]m|\s+am)\s+(?:not\s+able|unable)\s+to)\s+
            (?:help\s+(?:you\s+)?with\s+(?:that|this)|assist\s+(?:you\s+)?with\s+(?:that|this)|comply|fulfil+)
      | i\s*(?:['’]m|\s+am)\s+unable\s+to\s+(?:help|assist|comply|fulfil+|answer|classify)
      | as\s+an?\s+(?:ai|artificial\s+intelligence|(?:large\s+)?language\s+model)\b
    )""",
    re.IGNORECASE | re.VERBOSE,
)

_OPENING_CHARACTERS = 300


def is_refusal(text: str) -> bool:
    """Whether the text opens as a refusal to answer (English). An apology alone is none: support agents apologize."""
    opening = " ".join(text[:_OPENING_CHARACTERS].split())  # bounded: the pattern may look back and forth
    return _REFUSAL.match(opening) is not None


def looks_garbled(text: str) -> bool:
    """Whether the text is noise: control characters, undecodable bytes, or very high repetition.

    Repetition is measured by compression, so it needs no words and works for any script: text below a tenth of its
    size after zlib, over at least 400 bytes. Ordinary prose compresses to 0.3-0.6.
    """
    if any(unicodedata.category(character) == "Cc" and character not in "\t\n\r" for character in text):
        return True
    if text.count("\ufffd") > max(1, len(text) // 50):
        return True
    if re.search(r"([^\W\d_])\1{24}", text):
        return True
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) >= 400 and len(zlib.compress(raw, 6)) < 0.1 * len(raw)


# --- labels -----------------------------------------------------------------------------------------------------

_LABEL_PREFIX = re.compile(
    r"(?:^|\b)(?:the\s+)?(?:(?:correct|right|best|final|predicted)\s+)?"
    r"(?:label|answer|category|class|classification|intent|topic|prediction|result|output)\W{0,3}\s*(?::|=|\bis\b)\s*"
    r"([^\n]+)",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"(?:\b(?:not|no|never|neither|nor|than|instead of|isn['’]?t|without)\b|n['’]t\b)\W*(?:\w+\W+)?$"
)
_SHORT_LABEL_CHARACTERS = 3


def match_label(answer: str, labels: Sequence[str]) -> str | None:
    """The one label that ``answer`` names, or None where that is not certain.

    In this order: the whole answer is a label (then up to case, quotes, punctuation, ``_`` for a space); a line says
    ``Label: x`` or JSON says ``{"label": "x"}``; the answer opens with a label and a stop; exactly one label is
    contained as whole words and is not denied ("not x"). A label inside a longer label that also matches does not
    count. Labels of up to three characters ("yes", "no", "A") are never found by mere containment.
    """
    text = answer.strip()
    if text in labels:
        return text
    by_plain: dict[str, list[str]] = {}
    for label in labels:
        by_plain.setdefault(_plain(label), []).append(label)
    unique = {plain: same[0] for plain, same in by_plain.items() if len(same) == 1 and plain}
    if (whole := _plain(text)) in by_plain:
        return unique.get(whole)
    if named := _named_labels(text, unique):
        return named.pop() if len(named) == 1 else None
    return _leading_label(text, unique) or _contained_label(text, unique)


def _plain(text: str) -> str:
    """Text without case, quotes, markup and outer punctuation; ``_``, ``-`` and ``/`` as spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = re.sub(r"[\s_\-/]+", " ", folded)
    return re.sub(r"^[\s\W]+|[\s\W]+$", "", spaced) or spaced.strip()


def _named_labels(text: str, unique: dict[str, str]) -> set[str]:
    """Labels that the answer itself announces."""
    said = [match.group(1) for match in _LABEL_PREFIX.finditer(text)]
    data = find_json_object(text)
    if data is not None:
        said += [value for value in data.values() if isinstance(value, str)]
    candidates = (piece for value in said for piece in (value, re.split(r"[.,;:(\n]", value)[0]))
    return {unique[plain] for candidate in candidates if (plain := _plain(candidate)) in unique}


def _leading_label(text: str, unique: dict[str, str]) -> str | None:
    return unique.get(_plain(re.split(r"[.,;:!(\n]|\s[-–—]\s", text, maxsplit=1)[0]))


def _contained_label(text: str, unique: dict[str, str]) -> str | None:
    plain = _plain(text)
    spans: list[tuple[int, int, str]] = []
    for key, label in unique.items():
        if len(key) <= _SHORT_LABEL_CHARACTERS:
            continue
        spans += [(m.start(), m.end(), label) for m in re.finditer(rf"(?<!\w){re.escape(key)}(?!\w)", plain)]
    outer = [
        span
        for span in spans
        if not any(o is not span and o[0] <= span[0] and span[1] <= o[1] and o[2] != span[2] for o in spans)
    ]
    if any(_NEGATION.search(plain[:start]) for start, _, _ in outer):
        return None
    found = {label for _, _, label in outer}
    return found.pop() if len(found) == 1 else None


def _check_label(labels: Sequence[str], gold: str | None, text: str) -> Verdict:
    label = text if text in labels else None if is_refusal(text) else match_label(text, labels)
    if label is None:
        return _rejected("refusal" if is_refusal(text) else "not_a_label")
    if gold is not None and label != gold:
        return _rejected("disagrees_with_gold", label)
    return Verdict(True, None, label)


# --- numbers ----------------------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"""(?:(?<![\w).])[-+−]\s?)?                                 # a sign, but not the minus between two numbers
        (?:(?:\d{1,3}(?:[,\u202f\u00a0]\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)    # 1,234.5 or 1234.5 or .5
        (?:\s?/\s?\d+)?
        (?:[eE][-+]?\d{1,3})?""",
    re.VERBOSE,
)
_CURRENCY = re.compile(r"\\?[$€£¥₹]\s?")
_LONGEST_NUMBER_CHARACTERS = 40
_FRACTION = re.compile(r"([-+−]?)\s*\\d?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}")
_FINAL = (
    re.compile(r"####\s*([^\n]+)"),
    re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}"),
    re.compile(r"(?:answer|result|total)\s*(?:is|=|:)\s*([^\n]+)", re.IGNORECASE),
)
RELATIVE_TOLERANCE = Fraction(1, 10**6)


def parse_number(text: str) -> Fraction | None:
    """The first number in ``text``, exactly: "$1,234.50", "3/4", "\\frac{3}{4}", "-2", "40%" (as 40), "1e3"."""
    text = _CURRENCY.sub("", text)
    if latex := _FRACTION.search(text):
        sign, above, below = latex.groups()
        return Fraction(int(above), int(below)) * (-1 if sign in {"-", "−"} else 1) if int(below) else None
    found = _NUMBER.search(text)
    if found is None:
        return None
    digits = re.sub(r"[\s,\u202f\u00a0]", "", found.group()).replace("−", "-")
    above, _, below = digits.partition("/")
    if len(digits) > _LONGEST_NUMBER_CHARACTERS:
        return None
    try:
        return Fraction(above) / Fraction(below or 1)
    except (ValueError, ZeroDivisionError):
        return None


def final_number(text: str) -> tuple[Fraction | None, bool]:
    """The number that a worked solution ends in, and whether it was announced (``####``, ``\\boxed``, "answer is").

    Without an announcement the last number of the text is taken.
    """
    for pattern in _FINAL:
        for said in reversed(pattern.findall(text)):
            if (number := parse_number(said)) is not None:
                return number, True
    numbers = [match.group() for match in _NUMBER.finditer(_CURRENCY.sub("", text))]
    return (parse_number(numbers[-1]) if numbers else None), False


def same_number(left: Fraction, right: Fraction) -> bool:
    """Equal up to rounding: a relative difference of at most :data:`RELATIVE_TOLERANCE`."""
    return abs(left - right) <= RELATIVE_TOLERANCE * max(abs(left), abs(right))


def _check_math(gold: str | None, text: str) -> Verdict:
    number, announced = final_number(text)
    if number is None:
        return _rejected("no_final_number")
    wanted = final_number(gold)[0] if gold is not None else None
    if wanted is None and not announced:
        return _rejected("no_final_number")
    written = text if _FINAL[0].search(text) else f"{text}\n#### {_number_text(number)}"
    if wanted is not None and not same_number(wanted, number):
        return _rejected("disagrees_with_gold", written)
    return Verdict(True, None, written)


def _number_text(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    decimal = f"{float(number):.10g}" if abs(number) < 10**15 else ""
    return decimal if decimal and Fraction(decimal) == number else f"{number.numerator}/{number.denominator}"


# --- JSON -------------------------------------------------------------------------------------------------------


def find_json_object(text: str) -> dict[str, Any] | None:
    """The one JSON object in ``text``, which may stand in a code fence or a sentence; None for none or several."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    found: list[dict[str, Any]] = []
    at = text.find("{")
    while at >= 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        found.append(value)
        at = text.find("{", end)
    return found[0] if len(found) == 1 else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _check_json(text: str) -> Verdict:
    data = find_json_object(text)
    return _rejected("not_json") if data is None else Verdict(True, None, json.dumps(data, ensure_ascii=False))
