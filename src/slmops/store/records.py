"""What the index holds: small frozen rows without a database behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slmops.artifacts import Artifact


@dataclass(frozen=True)
class Input:
    """The ``role`` of an input in its stage, its content digest, and the key of the artifact, if it was one."""

    role: str
    digest: str
    key: str = ""


@dataclass(frozen=True)
class Entry:
    """One artifact. ``path`` is relative to the store, with ``/``."""

    path: str
    kind: str
    name: str
    digest: str
    key: str
    created_at: str
    wall_s: float
    size_bytes: int
    inputs: tuple[Input, ...] = field(default=())


@dataclass(frozen=True)
class Run:
    """One run of a recipe. Times are UTC, ISO 8601. ``outcome`` is one word, such as ``done`` or ``failed``."""

    name: str
    started_at: str
    finished_at: str
    outcome: str
    report_digest: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Run:
        return cls(raw["name"], raw["started_at"], raw["finished_at"], raw["outcome"], raw.get("report_digest"))


def stage_name(artifact: Artifact) -> str:
    return str(artifact.manifest.extra.get("name", ""))


def wall_seconds(artifact: Artifact) -> float:
    """Seconds that the artifact took to build; 0 where its manifest does not tell."""
    value = artifact.manifest.extra.get("wall_s", 0.0)
    return float(value) if isinstance(value, int | float) else 0.0


def inputs_of(artifact: Artifact) -> tuple[Input, ...]:
    keys = artifact.manifest.extra.get("input_keys", {})
    return tuple(
        Input(role, digest, str(keys.get(role, "")) if isinstance(keys, Mapping) else "")
        for role, digest in artifact.manifest.inputs.items()
    )


def entry_of(artifact: Artifact, path: str) -> Entry:
    manifest = artifact.manifest
    return Entry(
        path=path,
        kind=manifest.kind,
        name=stage_name(artifact),
        digest=manifest.digest,
        key=manifest.key,
        created_at=manifest.created_at,
        wall_s=wall_seconds(artifact),
        size_bytes=artifact.size_bytes,
        inputs=inputs_of(artifact),
    )
