"""Size of the device installation beside the training one, and how soon ``slmops --help`` answers.

Sizes are those of the files that the installed packages list, requirements of requirements included, in the environment
that runs this. Nothing is installed or fetched.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.common import spread

SIZES: dict[str, set[str]] = {"device": set(), "serve": {"serve"}, "train": {"train"}}
LARGEST_DEVICE_MB = 400
HELP_LIMIT_S = 0.3
STARTS, QUICK_STARTS = 20, 5


def run(options: argparse.Namespace) -> dict[str, Any]:
    packages = {size: packages_of("slmops", extras) for size, extras in SIZES.items()}
    megabytes = {size: sum(map(size_bytes, names)) / 1e6 for size, names in packages.items()}
    cpu_s, wall_s = help_times(QUICK_STARTS if options.quick else STARTS)
    torch_free = "torch" not in packages["device"]
    return {
        "ours": megabytes["device"],
        "peer": {size: value for size, value in megabytes.items() if size != "device"},
        "ratio": megabytes["device"] / megabytes["train"],
        "spread": [megabytes["device"]] * 2,
        "target": LARGEST_DEVICE_MB,
        "passed": megabytes["device"] <= LARGEST_DEVICE_MB and torch_free and min(cpu_s) < HELP_LIMIT_S,
        "unit": "MB",
        "packages": {size: len(names) for size, names in packages.items()},
        "help": {
            "cpu_s": spread(cpu_s),
            "wall_s": spread(wall_s),
            "target_s": HELP_LIMIT_S,
            "note": "wall is the machine's, with whatever else it does; cpu is ours",
        },
    }


def packages_of(name: str, extras: Iterable[str]) -> set[str]:
    """``name`` and everything that it requires, by normalized name; what is not installed is left out."""
    seen: dict[str, set[str]] = {}
    waiting = [(_normalized(name), set(extras))]
    while waiting:
        package, wanted = waiting.pop()
        if package in seen and wanted <= seen[package]:
            continue
        try:
            requirements = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue
        wanted = seen[package] = seen.get(package, set()) | wanted
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                waiting.append((_normalized(requirement.name), set(requirement.extras)))
    return set(seen)


def size_bytes(package: str) -> int:
    """Bytes of the files that an installed package lists, without what is not there any more."""
    paths = [Path(str(file.locate())) for file in metadata.distribution(package).files or ()]
    return sum(path.stat().st_size for path in paths if path.is_file())


def help_times(starts: int) -> tuple[list[float], list[float]]:
    """Processor and wall seconds of so many ``slmops --help``, after one that warms the disk's cache."""
    cpu_s, wall_s = [], []
    for _ in range(starts + 1):
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run([sys.executable, "-m", "slmops", "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall_s.append(time.perf_counter() - started)
        cpu_s.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return cpu_s[1:], wall_s[1:]


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
