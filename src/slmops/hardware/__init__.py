"""What machines can do, as data: ``profiles.yaml``, typed.

Guarantees: names and figures are those of the file; reading it imports no heavy library.
Not covered: whether a figure holds for the machine in your hand. Whatever is computed from a profile is an estimate.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from slmops.errors import UsageError

PROFILES = Path(__file__).with_name("profiles.yaml")


@dataclass(frozen=True)
class DeviceProfile:
    """The fields are described at the head of ``profiles.yaml``. ``name`` is what a recipe writes."""

    name: str
    title: str
    memory_mb: float
    model_memory_mb: float
    model_storage_mb: float
    cores: int
    arch: str
    instructions: tuple[str, ...]
    bandwidth_gb_s: float
    gflops: float
    core_gflops: float
    storage_mb_s: float
    basis: str


@cache
def device_profiles() -> dict[str, DeviceProfile]:
    """Name -> profile, in the order of the file."""
    import yaml

    raw = yaml.safe_load(PROFILES.read_text("utf-8"))
    return {
        name: DeviceProfile(name=name, **{**fields, "instructions": tuple(fields["instructions"])})
        for name, fields in raw.items()
    }


def device_profile(name: str) -> DeviceProfile:
    """The profile of that name.

    Raises:
        UsageError: there is none; the known ones are named.
    """
    found = device_profiles().get(name)
    if found is None:
        raise UsageError(f"There is no device {name!r}.", remedy=known_devices(name))
    return found


def known_devices(name: str) -> str:
    """One sentence for somebody who wrote ``name``."""
    known = device_profiles()
    near = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {near[0]}? " if near else "") + f"Known devices: {', '.join(known)}."
