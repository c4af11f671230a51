"""Whether a teacher's answer may be learned from.

Pure: :func:`check_answer` decides from the row and the answer alone. It is lenient about form where the meaning is
certain (case, quotes, "Label: x", a code fence around JSON) and strict about everything else: a doubtful answer is
rejected, because a wrong one is learned as if it were right.

Not covered here: whether an open answer is true or well written (:mod:`slmops.distill.judge`), its language
(:mod:`slmops.distill.language`), and what only several answers tell (:mod:`slmops.distill.agreement`).
"""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NoReturn

from slmops.artifacts import Row
from slmops.errors import MissingExtraError, RecipeError
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
    "not_in_schema": "the JSON object is not what teacher.answer_schema asks for",
    "low_agreement": "too few samples say the same",
    "wrong_language": "the answer is in another language",
    "near_duplicate": "the answer to another prompt is nearly the same",
    "low_judge_score": "the judge's score is below teacher.judge.min_score",
    "not_judged": "no score could be read from the judge's answer",
    "disagrees_with_seed": "the answer to a new text is not the label it was written for",
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


def check_answer(
    task: Task,
    labels: Sequence[str] | None,
    row: Row,
    answer: str,
    finish_reason: str,
    *,
    keep_steps: bool = True,
    schema: Mapping[str, Any] | None = None,
) -> Verdict:
    """Judge one answer. ``row.target`` is the gold answer where there is one; ``finish_reason`` "length" means cut.

    ``keep_steps`` False: of a worked solution only the final number is learned. ``schema``: JSON Schema that an
    extraction has to meet.
    """
    text = strip_reasoning(answer)
    if not text:
        return _rejected("truncated" if finish_reason == "length" else "empty")
    if finish_reason == "length":
        return _rejected("truncated")
    if task in CLOSED_TASKS:
        return _check_label(labels or (), row.target, announced_answer(text))
    if is_refusal(text) and not (row.target and is_refusal(row.target)):
        return _rejected("refusal")
    if looks_garbled(text):
        return _rejected("garbage")
    if task == "math":
        return _check_math(row.target, text, keep_steps)
    if task == "extraction":
        return _check_json(text, schema)
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


_ANNOUNCED = re.compile(
    r"^\W*(?:(?:the\s+)?final\s+)?(?:answer|label)\W{0,3}:\W{0,3}(\S[^\n]*)\Z", re.IGNORECASE | re.MULTILINE
)


def announced_answer(text: str) -> str:
    """What a reasoned answer comes to: ``"answer"`` of a JSON object, or the last line where it says ``Answer: x``."""
    if text.startswith(("{", "```")):
        said = (find_json_object(text) or {}).get("answer")
        return said.strip() if isinstance(said, str) and said.strip() else text
    last = _ANNOUNCED.search(text[text.rfind("\n") + 1 :])
    return last.group(1).strip() if last and "\n" in text else text


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
    every, unique = _plain_labels(tuple(labels))
    if (whole := _plain(text)) in every:
        return unique.get(whole)
    if named := _named_labels(text, unique):
        return named.pop() if len(named) == 1 else None
    return _leading_label(text, unique) or _contained_label(text, unique)


@lru_cache(maxsize=8)
def _plain_labels(labels: tuple[str, ...]) -> tuple[frozenset[str], dict[str, str]]:
    """All plain forms, and the label of each that only one label has."""
    by_plain: dict[str, list[str]] = {}
    for label in labels:
        by_plain.setdefault(_plain(label), []).append(label)
    return frozenset(by_plain), {plain: same[0] for plain, same in by_plain.items() if len(same) == 1 and plain}


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
        if key in plain:  # most labels are not: a pattern for each would be the slowest part of a check
            found_at = re.finditer(rf"(?<!\w){re.escape(key)}(?!\w)", plain)
            spans += [(m.start(), m.end(), label) for m in found_at]
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


def _check_math(gold: str | None, text: str, keep_steps: bool) -> Verdict:
    number, announced = final_number(text)
    if number is None:
        return _rejected("no_final_number")
    wanted = final_number(gold)[0] if gold is not None else None
    if wanted is None and not announced:
        return _rejected("no_final_number")
    last = f"#### {_number_text(number)}"
    written = last if not keep_steps else text if _FINAL[0].search(text) else f"{text}\n{last}"
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


def _check_json(text: str, schema: Mapping[str, Any] | None) -> Verdict:
    data = find_json_object(text)
    if data is None:
        return _rejected("not_json")
    written = json.dumps(data, ensure_ascii=False)
    if schema is not None and not _meets(data, json.dumps(schema, sort_keys=True)):
        return _rejected("not_in_schema")
    return Verdict(True, None, written)


def check_schema(schema: Mapping[str, Any]) -> None:
    """Refuse what is no JSON Schema.

    Raises:
        RecipeError: it is none.
        MissingExtraError: the library that reads it is not installed.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ModuleNotFoundError:
        raise MissingExtraError("teacher.answer_schema", "train") from None
    try:
        validator_for(schema).check_schema(dict(schema))
    except SchemaError as error:
        raise RecipeError(f"teacher.answer_schema is not a JSON Schema: {error.message}.") from None


@lru_cache(maxsize=4)
def _validator(schema: str) -> Any:
    from jsonschema.validators import validator_for
    from referencing import Registry

    parsed = json.loads(schema)
    return validator_for(parsed)(parsed, registry=Registry())  # an empty one: no reference is fetched


def _meets(data: Mapping[str, Any], schema: str) -> bool:
    return bool(_validator(schema).is_valid(data))
