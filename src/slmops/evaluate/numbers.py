"""The number that a worked solution ends in.

The answer is what follows the last ``####`` (GSM8K's marker), else the last ``\\boxed{...}``, else the last number of
the text. ``1,234``, ``$1234.00``, ``1.5``, ``3/2``, ``1 1/2``, ``50%`` and ``1.2e3`` are read exactly, as fractions;
LaTeX such as ``\\sqrt{2}`` goes to math-verify. Two numbers are the same within a relative difference of
:data:`RELATIVE_TOLERANCE`. A percent sign is a unit (``50%`` is 50), because solutions write it or leave it out.

Not covered: numbers in words, decimal commas, answers of several numbers (the last one counts), and LaTeX outside the
main thread (compared as text there).
"""

from __future__ import annotations

import re
import threading
from fractions import Fraction

RELATIVE_TOLERANCE = 1e-6
MAX_DIGITS = 300  # a model that repeats one digit for ever must not cost a minute of big-number arithmetic
LATEX_TIMEOUT_S = 3

_NUMBER = re.compile(
    r"""
    (?:(?<![\w)\]])(?P<sign>[-−+]))?          # a minus after a word or bracket is a difference or a range
    (?:[$€£¥]\s?(?P<sign_inside>[-−])?)?
    (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?
    (?P<decimals>(?<=\d)\.\d+|(?<![\d.])\.\d+)?
    (?P<exponent>(?<=\d)[eE][+-]?\d{1,2}(?!\w))?
    (?:\s?/\s?(?P<denominator>\d+(?:\.\d+)?))?
    """,
    re.VERBOSE,
)
_MIXED = re.compile(r"(?<![\d.,/])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d./])")
_CALCULATION = re.compile(r"<<[^<>]*>>")
_LATEX = re.compile(r"\\[a-zA-Z]+")
_OPERATION = re.compile(r"\\(?:times|cdot|div|approx|[rR]ightarrow|therefore|implies|quad|left|right)(?![a-zA-Z])")
_PLAIN_LATEX = (  # LaTeX that needs no parser
    (re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)\s*(?=\\[dt]?frac)"), " "),  # as in 1\frac{1}{2}
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2 "),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\[,;:! ]"), ""),
)


def final_answer(text: str) -> Fraction | str | None:
    """The final number as a fraction, or its LaTeX where only a parser of mathematics can read it, or None."""
    region = _answer_region(_CALCULATION.sub("", text))
    for pattern, plain in _PLAIN_LATEX:
        region = pattern.sub(plain, region)
    if _LATEX.search(region):
        return region.strip()
    return last_number(region)


def same_answer(prediction: str, target: str) -> bool:
    """Whether both texts end in the same number. Two texts without a number are never the same."""
    mine, wanted = final_answer(prediction), final_answer(target)
    if mine is None or wanted is None:
        return False
    if isinstance(mine, Fraction) and isinstance(wanted, Fraction):
        return abs(mine - wanted) <= Fraction(RELATIVE_TOLERANCE) * max(abs(mine), abs(wanted))
    return _same_latex(str(mine), str(wanted))


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly; None where there is none that can be read."""
    text = _MIXED.sub(_fold_mixed, text)
    numbers = [m for m in _NUMBER.finditer(text) if m["whole"] or m["decimals"]]
    return _value(numbers[-1]) if numbers else None


def _fold_mixed(match: re.Match[str]) -> str:
    whole, top, bottom = match.groups()
    if max(map(len, (whole, top, bottom))) > MAX_DIGITS or int(bottom) == 0 or int(top) >= int(bottom):
        return match[0]
    return f"{int(whole) * int(bottom) + int(top)}/{int(bottom)}"


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > MAX_DIGITS:
        return None
    digits = (match["whole"] or "0").replace(",", "") + (match["decimals"] or "") + (match["exponent"] or "")
    value = Fraction(digits)
    if match["denominator"]:
        if not (denominator := Fraction(match["denominator"])):
            return None
        value /= denominator
    negative = (match["sign"] or "+") != "+" or bool(match["sign_inside"])
    return -value if negative else value


def _answer_region(text: str) -> str:
    if "####" in text:
        after = text.rpartition("####")[2].strip()
        return after.splitlines()[0] if after else ""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed
    lines = [line for line in text.splitlines() if re.search(r"\d|\\", line)]
    if lines and _LATEX.search(lines[-1]):
        mathematics = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", lines[-1])
        if mathematics:
            return str(next(part for part in mathematics[-1] if part))
        return _OPERATION.sub(" ", lines[-1]).rpartition("=")[2]
    return lines[-1] if lines else ""


def _last_boxed(text: str) -> str | None:
    opening = "\\boxed{"
    start = text.rfind(opening)
    if start < 0:
        return None
    depth = 1
    for at in range(start + len(opening), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start + len(opening) : at]
    return None


def _same_latex(mine: str, wanted: str) -> bool:
    if threading.current_thread() is not threading.main_thread():
        # math-verify stops runaway work (9^{9^{9}}) with an alarm signal, which only the main thread may set.
        return _as_latex(mine) == _as_latex(wanted)
    from math_verify import parse, verify

    parsed = [parse(f"${_as_latex(side)}$", parsing_timeout=LATEX_TIMEOUT_S) for side in (mine, wanted)]
    return all(parsed) and bool(verify(parsed[1], parsed[0], timeout_seconds=LATEX_TIMEOUT_S))


def _as_latex(answer: str) -> str:
    return answer.strip().strip("$")
