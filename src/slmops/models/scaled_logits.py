"""What some families do to the output layer's numbers, for those who apply that layer by themselves.

Gemma 2 caps its logits, Granite divides them, Cohere and Falcon-H1 multiply them. Guarantees: the same numbers as the
model's own forward gives, for the families in :data:`FACTORS` and all that cap. Not covered: what only a model's own
code says (``trust_remote_code`` is never set).
"""

from __future__ import annotations

from typing import Any

FACTORS = (("cohere", "logit_scale", 1), ("falcon_h1", "lm_head_multiplier", 1), ("hyperclovax", "logits_scaling", 1),
           ("granite", "logits_scaling", -1))  # fmt: skip
"""What a model's type begins with, the entry of its configuration, and whether logits are multiplied (1) or divided."""


def scaled_logits(logits: Any, config: Any) -> Any:
    """``logits`` (a tensor, as the output layer alone gives it) as the model of ``config`` would have given them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kind = str(getattr(text, "model_type", ""))
    for family, entry, power in FACTORS:
        factor = getattr(text, entry, None) if kind.startswith(family) else None
        if factor is not None and factor != 1:
            logits = logits * float(factor) if power == 1 else logits / float(factor)
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap
