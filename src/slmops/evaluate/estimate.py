"""What a model would need on a device that is not here: estimates, and called so wherever they are shown.

A figure that was measured here is multiplied by how many times slower the device is in what the work waits for: reading
the weights, for each token that is written; products, for a prompt; one core, for a model that is so small that it runs
on one. ``low`` and ``high`` are what comes of the other figures of the two machines: the real one is expected between
them, and `slmops bench` on the device finds it.

Pure: a profile, this machine's speed and a measurement in; estimates out. Not covered: accelerators, heat, kernels that
one of the two processors lacks (``notes`` names the instructions that are missing).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from slmops.evaluate.measure import Measurement
from slmops.evaluate.speed import MachineSpeed
from slmops.hardware import DeviceProfile

DOT_PRODUCT = frozenset({"asimddp", "i8mm", "avx_vnni", "avx512_vnni", "amx_int8"})
"""Any of these multiplies 8-bit numbers several times faster than fp32."""
SMALL_PARAMETERS = 20_000_000
"""A model below runs on one core, and its weights stay in the cache: memory is not what it waits for."""


@dataclass(frozen=True)
class Estimate:
    """``value`` with the ends of where it is expected. In the unit of the figure that it was made from."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class DeviceEstimate:
    """One model on one device.

    ``latency_ms``         ``{"p50", "p95"}``
    ``tokens_per_s``       generators: new tokens a second of a single request
    ``ttft_ms``            generators: median to the first text
    ``memory_bytes``       the peak measured here: the same files in the same runtime
    ``load_s``             opening the model, reading its files from the device's storage included
    ``memory_share``       of what the device has for one model
    """

    device: str
    latency_ms: Mapping[str, Estimate]
    memory_bytes: int
    memory_share: float
    load_s: Estimate
    tokens_per_s: Estimate | None = None
    ttft_ms: Estimate | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "estimate": True,
            "latency_ms": {name: one.to_json() for name, one in self.latency_ms.items()},
            "memory_bytes": self.memory_bytes,
            "memory_share": self.memory_share,
            "load_s": self.load_s.to_json(),
            "tokens_per_s": self.tokens_per_s.to_json() if self.tokens_per_s else None,
            "ttft_ms": self.ttft_ms.to_json() if self.ttft_ms else None,
            "notes": list(self.notes),
        }


def estimate_on(
    profile: DeviceProfile,
    here: MachineSpeed,
    measured: Measurement,
    *,
    size_bytes: int,
    parameters: int = 0,
    precision: str = "",
    flags_here: Sequence[str] = (),
) -> DeviceEstimate:
    """``measured`` here, moved to ``profile``.

    ``parameters``  0 where that is not known: taken for a large model
    ``precision``   ``int8`` and ``int4`` care for the instructions of both machines, ``flags_here`` being this one's
    """
    slower = slowdowns(profile, here)
    low, high = min(slower.values()), max(slower.values())
    small = 0 < parameters < SMALL_PARAMETERS
    work = slower["core"] if small else slower["products"]
    notes = _notes(profile, precision, flags_here)

    def times(value: float, factor: float) -> Estimate:
        return Estimate(value * factor, value * low, value * high)

    load_s = max(measured.load_s * slower["core"], size_bytes / 1e6 / profile.storage_mb_s)
    common: dict[str, Any] = {
        "device": profile.name,
        "memory_bytes": measured.memory_bytes_peak,
        "memory_share": measured.memory_bytes_peak / 1e6 / profile.model_memory_mb,
        "load_s": Estimate(load_s, measured.load_s * low, max(load_s, measured.load_s * high)),
        "notes": notes,
    }
    if measured.ttft_ms is None or not measured.tokens_per_s:
        return DeviceEstimate(
            latency_ms={name: times(value, work) for name, value in measured.latency_ms.items()}, **common
        )
    reading = slower["core"] if small else slower["reading"]
    prompt_share = min(1.0, measured.ttft_ms["p50"] / measured.latency_ms["p50"])
    mixed = prompt_share * work + (1 - prompt_share) * reading
    tokens = measured.tokens_per_s
    return DeviceEstimate(
        latency_ms={name: times(value, mixed) for name, value in measured.latency_ms.items()},
        tokens_per_s=Estimate(tokens / reading, tokens / high, tokens / low),
        ttft_ms=times(measured.ttft_ms["p50"], work),
        **common,
    )


def slowdowns(profile: DeviceProfile, here: MachineSpeed) -> dict[str, float]:
    """How many times slower the device is than this machine: ``products``, ``core``, ``reading``. Below 1: faster."""
    return {
        "products": here.gflops / profile.gflops,
        "core": here.core_gflops / profile.core_gflops,
        "reading": here.bandwidth_gb_s / profile.bandwidth_gb_s,
    }


def _notes(profile: DeviceProfile, precision: str, flags_here: Sequence[str]) -> tuple[str, ...]:
    if precision not in ("int8", "int4"):
        return ()
    here, there = bool(DOT_PRODUCT & set(flags_here)), bool(DOT_PRODUCT & set(profile.instructions))
    if here and not there:
        return (f"{profile.name} has no instructions for products of 8 bits, this machine has: expect the slow end.",)
    if there and not here:
        return (f"{profile.name} has instructions for products of 8 bits, this machine has none: expect the fast end.",)
    return ()
