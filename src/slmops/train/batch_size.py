"""How many tokens are worked through at once: as many as fit in the memory that is free, the GPU's where there is one,
by arithmetic.

Guarantees: decided once, before training, and remembered for a run that goes on after a kill (another division of the
same rows would round otherwise). Not covered: what other programs take while training runs; half of what is free is
left.
"""

from __future__ import annotations

import json
from pathlib import Path

from slmops.models import check_memory, estimate_memory, model_facts
from slmops.models.memory import Work
from slmops.recipe import Precision
from slmops.train.device import free_training_bytes
from slmops.train.methods import Method

SHARE = 0.5
"""Of the free memory that may be planned with."""
MOST_TOKENS = 1 << 20


def part_tokens(
    folder: Path, method: Method, *, longest: int, logit_share: float, work: Path, available_bytes: int | None = None
) -> int | None:
    """Padded tokens that fit at once into training the model at ``folder``; None where the machine does not tell.

    ``longest``: tokens of the longest row, which must fit alone; ``logit_share``: share of tokens with logits.

    Raises:
        MemoryBudgetError: not even the longest row fits; the message shows the arithmetic.
    """
    remembered = work / "part-tokens.json"
    if remembered.exists():
        found: int | None = json.loads(remembered.read_text("utf-8"))["tokens"]
        return found
    free = free_training_bytes() if available_bytes is None else available_bytes
    tokens = None if free is None else _fitting(folder, method, longest, logit_share, round(free * SHARE))
    work.mkdir(parents=True, exist_ok=True)
    written = work / ".part-tokens.json.tmp"
    written.write_text(json.dumps({"tokens": tokens, "available_bytes": free}), "utf-8")
    written.replace(remembered)
    return tokens


def _fitting(folder: Path, method: Method, longest: int, logit_share: float, budget: int) -> int:
    facts = model_facts(folder)
    work_kind: Work = "full" if method == "full" else "lora"
    precision: Precision = "int4" if method == "qlora" else "fp32"

    def logits(tokens: int) -> int:
        return max(1, round(tokens * logit_share))

    def fits(tokens: int) -> bool:
        return estimate_memory(
            facts,
            work=work_kind,
            precision=precision,
            batch_tokens=tokens,
            logit_tokens=logits(tokens),
            available_bytes=budget,
        ).fits

    check_memory(
        facts,
        work=work_kind,
        precision=precision,
        batch_tokens=longest,
        logit_tokens=logits(longest),
        available_bytes=budget,
    )
    low, high = longest, longest * 2
    while high < MOST_TOKENS and fits(high):
        low, high = high, high * 2
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
