"""What some families (Gemma 2) do to the output layer's numbers, for those who apply that layer by themselves.

Not covered: families that scale their logits (Granite, Cohere).
"""

from __future__ import annotations

from typing import Any


def soft_capped(logits: Any, config: Any) -> Any:
    """``logits`` (a tensor) bent so that none exceeds the model's cap; as they are where ``config`` names none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap
