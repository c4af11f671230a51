"""``slmops doctor``: is this machine fit for the work? Runs on the smallest installation: nothing but the standard
library is asked."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import typer

from slmops.cli.telemetry import SWITCHES

Status = Literal["ok", "warn", "fail"]
_Installed = Callable[[str], str | None]

MIN_PYTHON = (3, 11)
LOW_MEMORY_BYTES = 1 << 30
LOW_DISK_BYTES, NO_DISK_BYTES = 5 << 30, 200 << 20
FAST_FLAGS = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "amx": ("amx_tile",),
    "neon": ("asimd", "neon"),
    "dotprod": ("asimddp",),
    "i8mm": ("i8mm",),
}
"""What int8 and int4 kernels look for -> the names that the system gives it."""

VERBS = {
    "": ("doctor", "verify", "chat", "bench", "deploy"),
    "serve": ("serve", "keys", "validate", "monitor", "feedback"),
    "train": (
        "init",
        "data",
        "distill",
        "train",
        "adapters",
        "compress",
        "evaluate",
        "improve",
        "trace",
        "run",
        "demo",
    ),
}
"""Extra ("" is the device size) -> the verbs that need it."""

_OFF = {"0", "", "false", "no", "off"}


@dataclass(frozen=True)
class Check:
    """One line of the answer. ``remedy`` is there when something can be done."""

    name: str
    status: Status
    detail: str
    remedy: str | None = None

    def to_json(self) -> dict[str, str | None]:
        return dict(vars(self))


def doctor(
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Tell whether this machine is fit for the work. Where it is not, tell what to do about it."""
    checks = examine(store)
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        from slmops.cli.render import print_json

        print_json({"ok": not failed, "checks": [check.to_json() for check in checks]})
    else:
        _show(checks)
    if failed:
        raise typer.Exit(1)


def examine(store: Path, environment: Mapping[str, str] = os.environ) -> list[Check]:
    """All checks, in the order in which they are shown."""
    return [
        check_python(sys.version_info[:2], platform.python_version()),
        check_cores(available_cores()),
        check_memory(free_memory_bytes(_read(Path("/proc/meminfo")), _memory_left_in_group())),
        check_disk(store, shutil.disk_usage(_nearest(store)).free),
        check_store(store),
        check_flags(cpu_flags(_read(Path("/proc/cpuinfo")), platform.machine())),
        *check_installation(),
        check_telemetry(environment),
        check_offline(environment),
    ]


# --- decisions --------------------------------------------------------------------------------------------------


def check_python(version: tuple[int, ...], text: str) -> Check:
    if version < MIN_PYTHON:
        return Check("python", "fail", text, "Install Python 3.11 or newer.")
    return Check("python", "ok", text)


def check_cores(cores: int) -> Check:
    if cores < 2:
        return Check("cores", "warn", f"{cores}", "Serving a small model works; training will be slow.")
    return Check("cores", "ok", f"{cores}")


def check_memory(free_bytes: int | None) -> Check:
    if free_bytes is None:
        return Check("memory", "warn", "the system does not tell", "See for yourself that at least 1 GB is free.")
    detail = f"{free_bytes / 1e9:.1f} GB free"
    if free_bytes < LOW_MEMORY_BYTES:
        return Check("memory", "warn", detail, "Close other programs; training the demo takes about 2 GB.")
    return Check("memory", "ok", detail)


def check_disk(store: Path, free_bytes: int) -> Check:
    detail = f"{free_bytes / 1e9:.1f} GB free for {store}"
    if free_bytes < NO_DISK_BYTES:
        return Check("disk", "fail", detail, "Free some space, or choose another --store.")
    if free_bytes < LOW_DISK_BYTES:
        return Check("disk", "warn", detail, "A run keeps several models: free some space, or choose another --store.")
    return Check("disk", "ok", detail)


def check_store(store: Path) -> Check:
    place = _nearest(store)
    if not place.is_dir():
        return Check("store", "fail", f"{place} is a file", "Choose a directory for --store.")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Check("store", "fail", f"{place} cannot be written to: {error.strerror}", "Choose a writable --store.")
    return Check("store", "ok", f"{store} is writable" if store.is_dir() else f"{store} will be made by the first run")


def check_flags(flags: tuple[str, ...] | None) -> Check:
    if flags is None:
        detail = f"{platform.machine()}, the system does not tell its instructions"
        return Check("cpu", "warn", detail, "Measure before you rely on its speed: the report of slmops run tells it.")
    detail = f"{platform.machine()}: {', '.join(flags) or 'none of ' + ', '.join(FAST_FLAGS)}"
    if not {"avx2", "neon"} & set(flags):
        return Check("cpu", "warn", detail, "Models run, but slowly: kernels are made for avx2 or neon.")
    return Check("cpu", "ok", detail)


def check_telemetry(environment: Mapping[str, str]) -> Check:
    on = [name for name in SWITCHES if environment.get(name, "").lower() in _OFF]
    if on:
        return Check("telemetry", "warn", f"not off: {', '.join(on)}", f"Set them: export {on[0]}=1")
    return Check("telemetry", "ok", f"off ({', '.join(SWITCHES)})")


def check_offline(environment: Mapping[str, str]) -> Check:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    on = [name for name in names if environment.get(name, "").lower() not in _OFF]
    detail = f"on ({', '.join(on)}): hf: models come from the cache alone" if on else "off: hf: models may be fetched"
    return Check("offline", "ok", detail)


def check_installation() -> list[Check]:
    """One line for each size of installation: what is there, and which verbs wait for what is not."""
    from importlib import metadata

    try:
        requirements = metadata.requires("slmops") or []
    except metadata.PackageNotFoundError:
        return [Check("install", "warn", "slmops is not installed as a package", "Install it: pip install slmops")]
    return [check_extra(extra, requirements_of(extra, requirements), _installed_version) for extra in VERBS]


def check_extra(extra: str, wanted: Mapping[str, str], installed: _Installed) -> Check:
    """``wanted``: package -> lowest version."""
    found = {name: installed(name) for name in wanted}
    missing = [name for name, version in found.items() if version is None]
    old = [
        f"{name} {version} (needs {wanted[name]})"
        for name, version in found.items()
        if version is not None and _numbers(version) < _numbers(wanted[name])
    ]
    title = f"slmops[{extra}]" if extra else "slmops"
    if missing or old:
        verbs = ", ".join(VERBS.get(extra, ()))
        detail = "; ".join(
            part
            for part in (
                f"missing: {', '.join(missing)}" if missing else "",
                f"too old: {', '.join(old)}" if old else "",
                f"needed by: {verbs}",
            )
            if part
        )
        return Check(title, "warn" if extra else "fail", detail, f"Install it: pip install '{title}'")
    return Check(title, "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


# --- what the system says ---------------------------------------------------------------------------------------


def requirements_of(extra: str, requirements: list[str]) -> dict[str, str]:
    """Package -> lowest version for one extra ("": what is always there), from lines such as
    ``"torch>=2.9; extra == 'train'"``. An extra that names slmops itself is left out."""
    wanted = {}
    for line in requirements:
        text, _, marker = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        parsed = re.match(r"\s*([A-Za-z0-9._-]+)", text)
        if parsed and (named.group(1) if named else "") == extra and parsed.group(1) != "slmops":
            lowest = re.search(r">=\s*([0-9][0-9.]*)", text)
            wanted[parsed.group(1)] = lowest.group(1) if lowest else "0"
    return wanted


def cpu_flags(cpuinfo: str, machine: str) -> tuple[str, ...] | None:
    """Those of :data:`FAST_FLAGS` that the processor has; None where the system does not tell."""
    line = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    if line is None:
        return ("neon",) if machine in {"arm64", "aarch64"} else None
    has = set(line.group(1).split())
    return tuple(name for name, names in FAST_FLAGS.items() if has & set(names))


def free_memory_bytes(meminfo: str, left_in_group: int | None) -> int | None:
    """Memory that a new program may take: what the system has available, or what a container's limit leaves."""
    line = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo, re.MULTILINE)
    known = [value for value in (int(line.group(1)) << 10 if line else None, left_in_group) if value is not None]
    return min(known) if known else _free_pages_bytes()


def available_cores() -> int:
    """Cores that this process may use: its affinity, and a container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(_read(Path("/sys/fs/cgroup/cpu.max")))
    return max(1, min(cores, quota)) if quota else cores


def cpu_quota(cpu_max: str) -> int | None:
    """Whole cores out of cgroup's ``"200000 100000"``; None for ``"max 100000"`` or nothing."""
    match cpu_max.split():
        case [quota, period] if quota.isdigit() and int(period):
            return max(1, int(quota) // int(period))
    return None


def _memory_left_in_group() -> int | None:
    base = Path("/sys/fs/cgroup")
    limit, used = _read(base / "memory.max").strip(), _read(base / "memory.current").strip()
    return max(0, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else None


def _free_pages_bytes() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


def _nearest(path: Path) -> Path:
    """The path itself, or the first of its parents that is there."""
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")
    except OSError:
        return ""


def _installed_version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """``"2.13.0+cpu"`` -> ``(2, 13)``; zeros at the end do not count."""
    release = re.match(r"[0-9.]*", version)
    numbers = [int(part) for part in (release.group() if release else "").split(".") if part]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# --- for people -------------------------------------------------------------------------------------------------


def _show(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    width = max(len(check.name) for check in checks)
    for check in checks:
        colour = colours[check.status]
        console.print(f"[{colour}]{check.status:<4}[/] {escape(check.name.ljust(width))}  {escape(check.detail)}")
        if check.remedy:
            console.print(f"     {' ' * width}  [bold]try:[/] {escape(check.remedy)}")
