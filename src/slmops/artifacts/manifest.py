"""What an artifact says of itself: ``manifest.json``.

Unknown fields are kept on a round trip, so an older slmops does not lose what a newer one wrote. Fields are only ever
added; a reader fills what an old manifest lacks. The field ``seal`` is the digest of all the others: a flipped byte in
a metric is found like one in a weight. (It proves that nothing was damaged, not who wrote it.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.errors import ArtifactError, CorruptArtifactError
from slmops.trust import FileDigest, digest_json

MANIFEST_NAME = "manifest.json"
SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """
    ``digest``      over the contents (every file but the manifest itself)
    ``key``         digest of inputs, configuration and code version: same key, same work
    ``inputs``      role -> digest of the artifact that was read
    ``config``      the stage's configuration, as plain JSON
    ``metrics``     what the stage measured, as plain JSON
    """

    kind: str
    digest: str
    key: str
    files: Mapping[str, FileDigest]
    inputs: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    code_version: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    created_at: str = ""
    schema: int = SCHEMA
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        raw = {
            **self.extra,
            "kind": self.kind,
            "schema": self.schema,
            "digest": self.digest,
            "key": self.key,
            "inputs": dict(self.inputs),
            "config": dict(self.config),
            "metrics": dict(self.metrics),
            "code_version": self.code_version,
            "environment": dict(self.environment),
            "created_at": self.created_at,
            "files": {name: {"sha256": f.sha256, "size_bytes": f.size_bytes} for name, f in self.files.items()},
        }
        return {**raw, "seal": digest_json(raw)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Manifest:
        known = {"kind", "schema", "digest", "key", "inputs", "config", "metrics"}
        known |= {"code_version", "environment", "created_at", "files", "seal"}
        return cls(
            kind=raw["kind"],
            digest=raw["digest"],
            key=raw.get("key", ""),
            files={_inner(name): FileDigest(f["sha256"], int(f["size_bytes"])) for name, f in raw["files"].items()},
            inputs=raw.get("inputs", {}),
            config=raw.get("config", {}),
            metrics=raw.get("metrics", {}),
            code_version=raw.get("code_version", ""),
            environment=raw.get("environment", {}),
            created_at=raw.get("created_at", ""),
            schema=int(raw.get("schema", SCHEMA)),
            extra={name: value for name, value in raw.items() if name not in known},
        )

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read ``directory/manifest.json``.

        Raises:
            ArtifactError: there is no manifest.
            CorruptArtifactError: there is one, and it cannot be read as a manifest.
        """
        path = directory / MANIFEST_NAME
        try:
            raw = json.loads(path.read_text("utf-8"), parse_constant=lambda _: None)  # NaN: not JSON, reads as null
        except FileNotFoundError:
            raise ArtifactError(
                f"{directory} is not an artifact: it has no {MANIFEST_NAME}.",
                remedy="Name a directory that slmops wrote, for example one under .slmops/artifacts.",
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise CorruptArtifactError(
                f"{path} is damaged: {error}.", remedy="Delete the artifact and run again."
            ) from None
        try:
            manifest = cls.from_json(raw)
            whole = "seal" not in raw or raw["seal"] == digest_json({k: v for k, v in raw.items() if k != "seal"})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{path} is not a manifest: {type(error).__name__} {error}.",
                remedy="Delete the artifact and run again.",
            ) from None
        if not whole:
            raise CorruptArtifactError(
                f"{path} has changed: it does not match its own seal.", remedy="Delete the artifact and run again."
            )
        return manifest


def _inner(name: str) -> str:
    """``name``, if it stays inside the artifact's directory on any system: a manifest may come from elsewhere."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or "" in parts or ":" in parts[0]:
        raise ValueError(f"file name {name!r} leads out of the artifact")
    return name
