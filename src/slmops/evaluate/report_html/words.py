"""Numbers, units and keys as a person reads them. Whatever is None becomes :data:`MISSING`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slmops.evaluate.gates import p_in_words

MISSING = "–"
SPACE = "\u00a0"  # a number and its unit stay on one line
DIGEST_DIGITS = 12  # as `slmops trace` prints them

_METRIC_NAMES = {
    "accuracy": "accuracy",
    "acc": "accuracy",
    "acc_norm": "accuracy by byte",
    "exact_match": "exact match",
    "numeric_match": "right final numbers",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU (0–100)",
    "slot_f1": "slot F1",
    "slot_f1_micro": "slot F1, micro",
    "macro_f1": "macro F1",
    "format_valid": "valid form",
    "json_valid": "valid JSON",
    "nll": "NLL, nats",
    "ece": "calibration error",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "cut_off": "cut off",
    "answer_tokens": "answer, tokens",
    "unknown_label_rows": "rows of unknown label",
    "tokens_per_s": "tokens/s, one request",
    "batch_tokens_per_s": "tokens/s, batch",
    "ttft_ms": "first text, ms (p50)",
    "load_s": "loading, s",
}
_SHARES = {
    *("accuracy", "exact_match", "numeric_match", "rouge_l", "slot_f1", "slot_f1_micro", "macro_f1"),
    *("format_valid", "json_valid", "ece", "cut_off", "share", "acc", "acc_norm"),
}


def metric_name(key: str) -> str:
    return _METRIC_NAMES.get(key, key.replace("_", " "))


def metric_value(value: float | None, key: str) -> str:
    return percent(value) if key in _SHARES else significant(value)


def significant(value: float | None) -> str:
    """Three digits that count: 17,401 · 94.9 · 2.72 · 0.0384."""
    if value is None:
        return MISSING
    size = abs(value)
    if size >= 99.95 or (size == int(size) and size < 1000):
        return f"{value:,.0f}"
    if size >= 0.001:
        rounded = float(f"{size:.3g}")  # 0.9996 is 1.00, with a digit less behind the point
        return f"{value:.{2 - math.floor(math.log10(rounded))}f}"
    return f"{value:.2e}"


def whole(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def money(value: float | None) -> str:
    """Two digits that count, never as a power of ten: 0.000050."""
    if not value or value >= 1:
        return MISSING if value is None else f"{value:,.2f}"
    return f"{value:.{1 - math.floor(math.log10(value))}f}"


def percent(share: float | None, decimals: int = 1) -> str:
    return MISSING if share is None else f"{100 * share:.{decimals}f}{SPACE}%"


def interval(ends: Sequence[float] | None) -> str:
    """``90.8 – 92.7``, in percent."""
    return MISSING if ends is None else f"{100 * ends[0]:.1f}{SPACE}–{SPACE}{100 * ends[1]:.1f}"


def size(value: float | None) -> str:
    """Decimal units, as a disk's label has them."""
    if value is None:
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 999.5:
            return f"{significant(value)}{SPACE}{unit}"
        value /= 1000
    return f"{significant(value)}{SPACE}TB"


def count(value: float | None) -> str:
    """135 M parameters."""
    if value is None:
        return MISSING
    for unit, below in (("", 1e3), ("k", 1e6), ("M", 1e9)):
        if abs(value) < 0.9995 * below:
            return f"{significant(value * 1000 / below)}{SPACE}{unit}".rstrip()
    return f"{significant(value / 1e9)}{SPACE}B"


def milliseconds(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"<{SPACE}0.01{SPACE}ms" if 0 < value < 0.01 else f"{significant(value)}{SPACE}ms"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    if seconds < 59.5:
        return f"{seconds:.{0 if seconds >= 9.95 else 1}f}{SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min {rest:02d}{SPACE}s"
    return f"{minutes // 60}{SPACE}h {minutes % 60:02d}{SPACE}min"


def digest(value: str) -> str:
    return value[:DIGEST_DIGITS]


def quantity(value: float | None, unit: str) -> str:
    """The value of a gate. ``unit``: ``share``, the name of a metric, ``MB``, ``ms`` or nothing."""
    if unit in _SHARES:
        return percent(value)
    return MISSING if value is None else f"{significant(value)}{SPACE}{unit}".rstrip()


def times(before: float | None, after: float | None, less: str, more: str) -> tuple[str, str]:
    """``("199×", "smaller")``: how many times less ``after`` is. A dash where either is not known."""
    if not before or not after:
        return MISSING, "not known"
    factor, word = (before / after, less) if before >= after else (after / before, more)
    return f"{factor:,.0f}×" if factor >= 9.95 else f"{factor:.1f}×", word


def comparison(test: Mapping[str, Any], other: str) -> str:
    """A paired test of the student (b) and ``other`` (a) in one sentence."""
    difference = test["difference"]
    low, high = (100 * end for end in test["ci95"])
    ends = f"95{SPACE}% interval {low:+.1f} to {high:+.1f}".replace("-", "−")
    won = f"of {plural(test['rows'], 'row')} it does better on {test['b_only']:,} and worse on {test['a_only']:,}"
    if difference == 0:
        return f"The student is as good as {other} ({ends}); {won}."
    points = f"{100 * abs(difference):.1f} points {'better' if difference > 0 else 'worse'}"
    noise = "beyond noise" if test["significant"] else "within noise"
    p_value = p_in_words(test["p_value"]).replace(" ", SPACE)
    return f"The student is {points} than {other}, {noise} ({p_value}; {ends}); {won}."


def own_comparison(test: Mapping[str, Any]) -> str:
    """A paired test of the student (b) and its teacher (a), in the measure's own unit."""
    low, high = (significant(end).replace("-", "−") for end in test["ci95"])
    noise = "beyond noise" if test["significant"] else "within noise"
    p_value = p_in_words(test["p_value"]).replace(" ", SPACE)
    change = significant(abs(test["difference"]))
    words = (
        "as much as the teacher"
        if not test["difference"]
        else (f"{change} {'more' if test['difference'] > 0 else 'less'} than the teacher")
    )
    return f"the student has {words} a row, {noise} ({p_value}; 95{SPACE}% interval {low} to {high})."


def benchmark_comparison(test: Mapping[str, Any], other: str, metric: str) -> str:
    """A paired test of the student (b) and ``other`` (a) on a benchmark."""
    noise = "beyond noise" if test["significant"] else "within noise"
    p_value = p_in_words(test["p_value"]).replace(" ", SPACE)
    size = abs(test["difference"])
    change = f"{100 * size:.1f} points" if metric in _SHARES else significant(size)
    if not test["difference"]:
        return f"the student is at the level of {other} ({p_value})."
    side = "above" if test["difference"] > 0 else "below"
    return f"the student is {change} {side} {other}, {noise} ({p_value})."


FILTERS: Mapping[str, Callable[..., str]] = {
    "count": count,
    "digest": digest,
    "duration": duration,
    "interval": interval,
    "metric_name": metric_name,
    "metric_value": metric_value,
    "milliseconds": milliseconds,
    "money": money,
    "benchmark_comparison": benchmark_comparison,
    "own_comparison": own_comparison,
    "percent": percent,
    "plural": plural,
    "quantity": quantity,
    "significant": significant,
    "size": size,
    "whole": whole,
}
