"""Foundry Local with the bundle in its local catalog."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from slmops.errors import ServeError, UsageError
from slmops.runtime.foundry import REMAINS, REQUIREMENT, FoundryServer, environment_folder, find_foundry

NAME = "Foundry Local"


@dataclass(frozen=True)
class FoundryTarget:
    """A :class:`~slmops.package.deploy.target.Target`."""

    server: FoundryServer
    name: str = NAME
    notes: Sequence[str] = REMAINS

    @property
    def version(self) -> str:
        return self.server.version

    @property
    def base_url(self) -> str:
        return self.server.base_url

    @property
    def model_id(self) -> str:
        return self.server.model_id

    @property
    def models(self) -> Sequence[str]:
        return self.server.models

    @property
    def pid(self) -> int:
        return self.server.pid


@contextmanager
def foundry(
    folder: Path, *, name: str | None = None, data: Path | None = None, port: int = 0
) -> Iterator[FoundryTarget]:
    """The model folder registered and served while the block runs; raises as :meth:`FoundryServer.start`."""
    with FoundryServer.start(folder, name=name, data=data, port=port) as server:
        yield FoundryTarget(server)


def install_foundry(folder: Path | None = None) -> Path:
    """Make an environment of its own for Foundry Local, beside ours, and its interpreter: the SDK demands one exact
    version of onnxruntime, which need not be the one that slmops runs with. Asks the package index; does nothing where
    the environment is there.

    Raises:
        ServeError: the environment cannot be made, or the packages cannot be had.
    """
    place = folder or environment_folder()
    if folder is None:
        with suppress(UsageError):  # not there yet
            return find_foundry()
    python = place / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", REQUIREMENT],
    ):
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            said = (ran.stderr.strip() or ran.stdout.strip() or "it said nothing").splitlines()[-1]
            raise ServeError(
                f"Foundry Local cannot be installed in {place}: {said}", remedy="It needs a package index and 280 MB."
            )
    return python
