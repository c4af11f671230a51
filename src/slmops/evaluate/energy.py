"""Joules, where the machine tells them: the counters of Linux' powercap (RAPL of Intel and AMD processors).

What is counted is the whole package, other programs and idling included; readings of a quiet machine mean most. The
files belong to root on most systems: what cannot be read is said, with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyCounter:
    """``zones``: folders with ``energy_uj``; ``why_not``: empty where there are any."""

    zones: tuple[Path, ...]
    why_not: str = ""

    def read(self) -> list[int]:
        """Microjoules of each zone, since some time or other."""
        return [int((zone / "energy_uj").read_text()) for zone in self.zones]

    def joules(self, before: list[int], after: list[int]) -> float:
        """Between two readings. A counter that began anew in between is put right once."""
        total = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            wrapped = last < first
            total += last - first + (int((zone / "max_energy_range_uj").read_text()) if wrapped else 0)
        return total / 1e6


def energy_counter(root: Path = POWERCAP) -> EnergyCounter:
    """The counters of whole packages that this process may read."""
    zones = [zone for zone in sorted(root.glob("*")) if zone.name.count(":") == 1 and (zone / "energy_uj").exists()]
    if not zones:
        return EnergyCounter((), f"this machine has no energy counters below {root}")
    try:
        for zone in zones:
            int((zone / "energy_uj").read_text())
    except (OSError, ValueError) as error:
        return EnergyCounter((), f"its energy counters cannot be read: {getattr(error, 'strerror', None) or error}")
    return EnergyCounter(tuple(zones))
