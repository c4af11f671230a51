"""What a loss curve says: whether a model began to learn its training rows by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RISE = 0.05
"""Share above its lowest point from which a validation loss counts as risen."""


def overfitting(history: Sequence[Mapping[str, float]]) -> str | None:
    """A sentence where the validation loss has risen while the training loss fell, else None."""
    points = [point for point in history if "validation_loss" in point]
    if len(points) < 2:
        return None
    best = min(points, key=lambda point: point["validation_loss"])
    last = points[-1]
    if last["validation_loss"] <= best["validation_loss"] * (1 + RISE):
        return None
    losses = [(point["step"], point["loss"]) for point in history if "loss" in point and "step" in point]
    before = [loss for step, loss in losses if step <= best["step"]]
    after = [loss for step, loss in losses if step > best["step"]]
    if not before or not after or after[-1] >= before[-1]:
        return None
    return (
        f"The model overfits: since step {best['step']:.0f} the validation loss rose from "
        f"{best['validation_loss']:.3f} to {last['validation_loss']:.3f} while the training loss fell from "
        f"{before[-1]:.3f} to {after[-1]:.3f}. Train for fewer epochs, set train.patience, or give more rows."
    )
