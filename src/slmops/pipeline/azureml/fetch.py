"""What a finished job made, into this store: nothing is taken whose bytes differ from its manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slmops.artifacts import MANIFEST_NAME, Artifact, Bundle
from slmops.errors import ArtifactError
from slmops.store import Store


def take_artifacts(source: Path, store: Store) -> int:
    """Copy the whole artifacts of the store at ``source`` that are not here yet; how many those are.

    Raises:
        CorruptArtifactError: one that was damaged on its way; names the file.
    """
    taken = 0
    for manifest in sorted((source / "artifacts").glob(f"*/*/{MANIFEST_NAME}")):
        place = store.root / "artifacts" / manifest.parent.relative_to(source / "artifacts")
        if place.exists() or manifest.parent.name.startswith("."):
            continue
        Artifact.open(manifest.parent).verify()
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f".{place.name}.fetched.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(manifest.parent, temporary)
        temporary.rename(place)
        taken += 1
    if taken:
        store.rebuild_index()
    return taken


def take_result(source: Path, place: Path) -> Mapping[str, Any]:
    """Copy report and bundle to where a person finds them; the report.

    Raises:
        ArtifactError: the job left no report.
        CorruptArtifactError: the bundle was damaged on its way.
    """
    if not (source / "report.json").is_file():
        raise ArtifactError("The job ended without a report.", remedy="Look at its logs in the workspace.")
    Bundle.open(source / "bundle").verify()
    place.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        target = place / path.name
        if path.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(path, target)
        else:
            shutil.copyfile(path, target)
    report = {**json.loads((place / "report.json").read_text("utf-8")), "bundle": str(place / "bundle")}
    (place / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return report
