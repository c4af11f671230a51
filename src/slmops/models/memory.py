"""Does the work fit in memory? Answered by arithmetic before a byte of the model is loaded.

Guarantees: work that is refused is refused with every term shown, and with the number of tokens that would fit.
Not covered: memory that Python and libraries take for themselves, and fragmentation; the estimate for training counts
the values that backpropagation keeps in a Llama-like layer without recomputation, and a test holds it against what
torch really keeps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slmops.errors import MemoryBudgetError
from slmops.models.facts import ModelFacts
from slmops.recipe import Precision

Work = Literal["infer", "full", "lora"]

LORA_RANK = 16
_FLOAT = 4  # bytes
_ADAM_BYTES = 8  # two moments in fp32 for each trained weight
_LOGIT_COPIES = 3  # logits, their log-softmax, their gradient
_WORK_NAMES = {"infer": "Running", "full": "Training all of", "lora": "Training LoRA adapters on"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for. ``available_bytes`` is None where the machine does not tell."""

    work: Work
    precision: Precision
    batch_tokens: int
    parameters: int
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    cache_bytes: int
    available_bytes: int | None

    @property
    def total_bytes(self) -> int:
        return (
            self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes + self.cache_bytes
        )

    @property
    def fits(self) -> bool:
        return self.available_bytes is None or self.total_bytes <= self.available_bytes

    @property
    def arithmetic(self) -> str:
        """The sum, written out: ``weights 538 MB + gradients 538 MB + ... = 2.2 GB``."""
        terms = [
            ("weights", self.weights_bytes),
            ("gradients", self.gradients_bytes),
            ("optimizer", self.optimizer_bytes),
            ("activations", self.activations_bytes),
            ("cache", self.cache_bytes),
        ]
        shown = " + ".join(f"{name} {format_bytes(size)}" for name, size in terms if size)
        return f"{shown} = {format_bytes(self.total_bytes)}"


def estimate_memory(
    facts: ModelFacts,
    *,
    work: Work,
    precision: Precision,
    batch_tokens: int,
    logit_tokens: int | None = None,
    available_bytes: int | None = None,
) -> MemoryEstimate:
    """What ``work`` on ``batch_tokens`` tokens at once takes; pure arithmetic.

    ``logit_tokens``: positions whose logits are computed in training; None: all of them.
    """
    trained = {"infer": 0, "full": facts.parameters, "lora": lora_parameters(facts)}[work]
    weight_bytes = facts.bytes_by_precision[precision]
    gradient_bytes = 2 if work == "full" and precision == "fp16" else _FLOAT
    logits = batch_tokens if logit_tokens is None else logit_tokens
    if work == "infer":
        activations = batch_tokens * _layer_peak_values(facts) + facts.vocab_size
    else:
        activations = batch_tokens * (
            facts.layers * _kept_values_per_layer(facts) + 2 * facts.hidden_size + _layer_peak_values(facts)
        )
        activations += logits * facts.vocab_size * _LOGIT_COPIES
    return MemoryEstimate(
        work=work,
        precision=precision,
        batch_tokens=batch_tokens,
        parameters=facts.parameters,
        weights_bytes=weight_bytes + (trained * _FLOAT if work == "lora" else 0),
        gradients_bytes=trained * gradient_bytes,
        optimizer_bytes=trained * _ADAM_BYTES,
        activations_bytes=activations * _FLOAT,
        cache_bytes=batch_tokens * facts.kv_cache_bytes_per_token if work == "infer" else 0,
        available_bytes=available_bytes,
    )


def check_memory(
    facts: ModelFacts,
    *,
    work: Work,
    precision: Precision,
    batch_tokens: int,
    logit_tokens: int | None = None,
    available_bytes: int | None = None,
) -> MemoryEstimate:
    """The estimate, if it fits into ``available_bytes`` (None: what this machine has free now).

    Raises:
        MemoryBudgetError: it does not; the message shows the sum and the remedy names what would fit.
    """
    available = available_memory_bytes() if available_bytes is None else available_bytes

    def estimate(tokens: int) -> MemoryEstimate:
        return estimate_memory(
            facts,
            work=work,
            precision=precision,
            batch_tokens=tokens,
            logit_tokens=None if logit_tokens is None else min(logit_tokens, tokens),
            available_bytes=available,
        )

    wanted = estimate(batch_tokens)
    if available is None:
        logger.info("This machine does not tell its free memory; %s is taken to fit.", wanted.arithmetic)
    if wanted.fits or available is None:
        return wanted
    low, high = 0, batch_tokens  # the largest number of tokens that fits is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if estimate(middle).fits else (low, middle)
    raise MemoryBudgetError(
        f"{_WORK_NAMES[work]} {facts.parameters / 1e6:,.1f} M parameters in {precision} with {batch_tokens:,} tokens "
        f"at once takes {wanted.arithmetic}, and {format_bytes(available)} are free.",
        remedy=_remedy(work, precision, low, facts, available),
    )


def lora_parameters(facts: ModelFacts, rank: int = LORA_RANK) -> int:
    """Weights of adapters on all seven matrices of each layer (Hu et al. 2021: a pair, in x ``rank`` x out)."""
    hidden, attention, key_value, wide = (
        facts.hidden_size,
        facts.attention_size,
        facts.key_value_size,
        facts.intermediate_size,
    )
    in_plus_out = 2 * (hidden + attention) + 2 * (hidden + key_value) + 3 * (hidden + wide)
    return facts.layers * rank * in_plus_out


def available_memory_bytes(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Memory that new work may take: what the system has free, or what this process's control groups still allow.

    None where neither can be read.
    """
    limits = [value for value in (_system_free_bytes(proc), _cgroup_free_bytes(proc, cgroups)) if value is not None]
    return min(limits, default=None)


def format_bytes(size_bytes: int) -> str:
    """Three digits and a decimal unit: ``538 MB``, ``2.15 GB``."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= scale:
            value = size_bytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{size_bytes} B"


def _kept_values_per_layer(facts: ModelFacts) -> int:
    """Values that backpropagation keeps of one token in one layer: both norms and their inputs, queries, keys and
    values, the attention's answer, and gate, up, activation and product of the feed-forward part."""
    return 6 * facts.hidden_size + 2 * facts.attention_size + 2 * facts.key_value_size + 4 * facts.intermediate_size


def _layer_peak_values(facts: ModelFacts) -> int:
    """Values of one token that are alive at once inside one layer, beyond what is kept."""
    return 2 * facts.hidden_size + 3 * facts.intermediate_size


def _remedy(work: Work, precision: Precision, fitting_tokens: int, facts: ModelFacts, available: int) -> str:
    if fitting_tokens > 0:
        return f"At most {fitting_tokens:,} tokens at once fit: use a smaller batch or shorter rows."
    ways = []
    if work == "full":
        ways.append("train LoRA adapters (adapt_method: lora)")
    smaller = [name for name, size in facts.bytes_by_precision.items() if size < available and name != precision]
    if work == "infer" and smaller:
        ways.append(f"run it in {smaller[0]}")
    ways += ["use a smaller model", "free some memory"]
    return f"Not even one token fits: {', '.join(ways[:-1])}, or {ways[-1]}."


def _system_free_bytes(proc: Path) -> int | None:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return _free_bytes_elsewhere() if proc == Path("/proc") else None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _free_bytes_elsewhere() -> int | None:
    """Without ``/proc``: what psutil says, where it is installed."""
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available)


def _cgroup_free_bytes(proc: Path, cgroups: Path) -> int | None:
    """The tightest limit on the way from this process's group to the root, less what is used there.

    File pages that can be dropped (``inactive_file``) count as free, as they do in ``MemAvailable``.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    free: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit_name, usage_name = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit_name, usage_name = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            limit, usage = _read_integer(folder / limit_name), _read_integer(folder / usage_name)
            if limit is not None and usage is not None and limit < 1 << 60:  # v1 writes "no limit" as a huge number
                free.append(max(0, limit - usage + _droppable_bytes(folder / "memory.stat")))
            if folder == root:
                break
    return min(free, default=None)


def _droppable_bytes(path: Path) -> int:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)


def _read_integer(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
