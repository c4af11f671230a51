"""A classifier's probabilities at the temperature that was fitted on rows it had not learnt from.

Temperature scaling: On Calibration of Modern Neural Networks, Guo et al. 2017. The order of the labels stays.
"""

from __future__ import annotations

import numpy as np

from slmops.runtime.base import Probabilities


def calibrated(probabilities: Probabilities, temperature: float) -> Probabilities:
    """``[rows, labels]`` in and out: what the softmax would have given for logits divided by ``temperature``."""
    if temperature == 1.0:
        return probabilities
    # The logits are known but for a constant a row, which the softmax takes out again.
    scaled = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny)) / temperature
    scaled -= scaled.max(axis=-1, keepdims=True)
    np.exp(scaled, out=scaled)
    scaled /= scaled.sum(axis=-1, keepdims=True)
    return scaled.astype(np.float32)
