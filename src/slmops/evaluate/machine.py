"""Facts about the machine that a number was measured on. No host name, no user, no address.

On Linux they come from ``/proc`` and the control group; elsewhere only what Python itself knows is told.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

SPEED_FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Instructions that decide how fast small precisions run."""


def machine_facts(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> dict[str, Any]:
    """``{"cpu", "cores", "memory_bytes", "os", "arch", "python", "cpu_flags", "load_1min", "gpus"}``.

    ``cores`` are those this process may use; ``memory_bytes`` is the lower of what is installed and what the control
    group allows (None where neither is known).
    """
    cpu_text = _read(proc / "cpuinfo")
    return {
        "cpu": cpu_model(cpu_text)
        or _read(proc / "device-tree/model").strip("\0 \n")
        or platform.processor()
        or "unknown",
        "cores": usable_cores(),
        "memory_bytes": memory_limit_bytes(_read(proc / "meminfo"), _read(cgroup / "memory.max")),
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "python": platform.python_version(),
        "cpu_flags": speed_flags(cpu_text),
        "load_1min": load_1min(_read(proc / "loadavg")),
        "gpus": gpus(proc),
    }


def gpus(proc: Path = Path("/proc")) -> list[str]:
    """Names of the NVIDIA devices that the driver has; of other makers' nothing is known."""
    cards = sorted((proc / "driver/nvidia/gpus").glob("*/information"))
    named = [line.partition(":")[2].strip() for card in cards for line in _read(card).splitlines() if "Model:" in line]
    return [name for name in named if name]


def usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_model(cpuinfo: str) -> str:
    """The processor's name out of ``/proc/cpuinfo``; empty where it has none (many ARM boards)."""
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())}
    return found.get("model name") or found.get("Model") or found.get("Hardware") or ""


def speed_flags(cpuinfo: str) -> list[str]:
    """Which of :data:`SPEED_FLAGS` the processor has."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            has = set(value.split())
            return [flag for flag in SPEED_FLAGS if flag in has]
    return []


def memory_limit_bytes(meminfo: str, cgroup_max: str) -> int | None:
    """The lower of installed memory (``MemTotal``, in kB) and the control group's limit (bytes, or ``max``)."""
    limits = [int(line.split()[1]) * 1024 for line in meminfo.splitlines() if line.startswith("MemTotal:")]
    if cgroup_max.strip().isdigit():
        limits.append(int(cgroup_max))
    return min(limits, default=None)


def load_1min(loadavg: str) -> float | None:
    """Mean number of processes that wanted a core in the last minute: above ``cores``, timings are not quiet."""
    return float(loadavg.split()[0]) if loadavg.split() else None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""
