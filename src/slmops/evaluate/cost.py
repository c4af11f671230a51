"""What 1,000 answers cost, and when a student has paid for itself. Pure arithmetic; prices are in one currency.

Not covered: electricity, idle hours, people.
"""

from __future__ import annotations

import math

SECONDS_PER_HOUR = 3600


def cost_per_1000(throughput_per_s: float, price_per_hour: float) -> float:
    """Price of 1,000 answers on a machine that is kept busy.

    Raises:
        ValueError: a throughput of 0 or less, or a negative price.
    """
    if not throughput_per_s > 0 or price_per_hour < 0:
        raise ValueError(f"{throughput_per_s} answers a second at {price_per_hour} an hour have no price")
    return 1000 * price_per_hour / (throughput_per_s * SECONDS_PER_HOUR)


def cost_per_1000_by_tokens(tokens_per_request: float, price_per_million_tokens: float) -> float:
    """Price of 1,000 answers of a teacher that is paid by the token. ``tokens_per_request``: prompt and answer, mean.

    Raises:
        ValueError: a negative number.
    """
    if tokens_per_request < 0 or price_per_million_tokens < 0:
        raise ValueError(f"{tokens_per_request} tokens at {price_per_million_tokens} per million have no price")
    return 1000 * tokens_per_request * price_per_million_tokens / 1_000_000


def break_even_requests(training_cost: float, teacher_cost_per_1000: float, student_cost_per_1000: float) -> int | None:
    """Answers after which training the student has paid for itself; None where it never does.

    Raises:
        ValueError: a negative cost.
    """
    if min(training_cost, teacher_cost_per_1000, student_cost_per_1000) < 0:
        raise ValueError("costs cannot be negative")
    saved_per_1000 = teacher_cost_per_1000 - student_cost_per_1000
    if training_cost == 0:
        return 0 if saved_per_1000 >= 0 else None
    return math.ceil(1000 * training_cost / saved_per_1000) if saved_per_1000 > 0 else None
