"""A process held to what a device has: so much memory, so many cores.

Memory is limited by a control group (version 2) where this process may make one: its limit is over resident pages,
swap switched off. Elsewhere by ``RLIMIT_DATA``: its limit is over writable private memory that was reserved, used or
not, so it is a little stricter. Cores are those of ``sched_setaffinity``.

Guarantees: what could not be limited is said, never assumed. Not covered: the speed of a core, memory bandwidth.
Imports nothing heavy: the measured process reads this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Limits:
    """None: as the machine is."""

    memory_bytes: int | None = None
    cores: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextlib.contextmanager
def control_group(memory_bytes: int | None, root: Path = CGROUPS, proc: Path = Path("/proc")) -> Iterator[Path | None]:
    """A fresh control group below this process's own, limited to ``memory_bytes``; None where that is not allowed."""
    group = None if memory_bytes is None else _make_group(memory_bytes, root, proc)
    try:
        yield group
    finally:
        if group is not None:
            with contextlib.suppress(OSError):  # a process that is not gone yet keeps it; an empty group is no harm
                group.rmdir()


def _make_group(memory_bytes: int, root: Path, proc: Path) -> Path | None:
    try:
        own = next(line[3:] for line in (proc / "self/cgroup").read_text().splitlines() if line.startswith("0::"))
        parent = root / own.strip().lstrip("/")
        if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
            return None
        group = parent / f"slmops-{os.getpid()}-{os.urandom(3).hex()}"
        group.mkdir()
    except (OSError, StopIteration):
        return None
    try:
        (group / "memory.max").write_text(str(memory_bytes))
        if (group / "memory.swap.max").exists():
            (group / "memory.swap.max").write_text("0")
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        return None
    return group


def apply_limits(limits: Limits, group: Path | None) -> dict[str, Any]:
    """Hold this process to ``limits``; what came of it: ``{"memory_bytes", "memory_by", "cores"}``.

    ``memory_by``: ``cgroup``, ``rlimit``, or None where memory is not limited.
    """
    cores = pin_cores(limits.cores)
    by = None
    if limits.memory_bytes is not None:
        by = "cgroup" if group is not None and _join(group) else "rlimit" if _rlimit(limits.memory_bytes) else None
    return {"memory_bytes": limits.memory_bytes if by else None, "memory_by": by, "cores": cores}


def pin_cores(cores: int | None) -> int | None:
    """Keep this process on the first ``cores`` of those that it may use; how many those are, None where unknown."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    if cores is not None and cores < len(usable):
        os.sched_setaffinity(0, usable[:cores])
    return len(os.sched_getaffinity(0))


def _join(group: Path) -> bool:
    try:
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        return False
    return True


def _rlimit(memory_bytes: int) -> bool:
    try:
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        held = memory_bytes if most == resource.RLIM_INFINITY else min(memory_bytes, most)
        resource.setrlimit(resource.RLIMIT_DATA, (held, most))
    except (ImportError, OSError, ValueError):  # no such limit on this system
        return False
    return True
