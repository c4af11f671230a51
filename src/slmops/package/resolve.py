"""From what a person names to the folder that a runtime opens."""

from __future__ import annotations

from pathlib import Path

from slmops.artifacts import MANIFEST_NAME, MODEL_DESCRIPTION, Artifact, Bundle, Variant, open_artifact
from slmops.errors import ArtifactError, ModelNotFoundError


def resolve_model_folder(path: Path | str) -> Path:
    """The model folder of a bundle, of a variant, or ``path`` itself where it is one. Reads no weights.

    Raises:
        ModelNotFoundError: there is no such folder, or no model in it.
        ArtifactError: an artifact of a kind that holds no model, or one that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ModelNotFoundError(f"{folder} {what}.", remedy="Name a bundle, a variant or a model folder.")
    if not (folder / MANIFEST_NAME).exists():
        if (folder / MODEL_DESCRIPTION).exists():
            return folder
        raise ModelNotFoundError(
            f"{folder} holds no model: neither {MANIFEST_NAME} nor {MODEL_DESCRIPTION} is there.",
            remedy="Name a bundle, a variant or a model folder.",
        )
    artifact = open_artifact(folder)
    if not isinstance(artifact, Bundle | Variant):
        raise ArtifactError(
            f"{folder} is a {artifact.manifest.kind}, which cannot be run.", remedy="Name a bundle or a variant."
        )
    return artifact.model_path


def artifact_around(path: Path | str) -> Artifact | None:
    """The artifact at ``path``, or the one whose ``model/`` it is; None for a bare model folder."""
    folder = Path(path).resolve()
    for candidate in (folder, folder.parent) if folder.name == "model" else (folder,):
        if (candidate / MANIFEST_NAME).exists():
            return open_artifact(candidate)
    return None


def check_digests(path: Path | str) -> str | None:
    """Compare every file of a bundle or variant with its manifest; its digest, or None for a bare model folder, which
    has nothing to compare with. A folder ``model/`` inside an artifact is checked as a part of that artifact.

    Raises:
        CorruptArtifactError: names the first file that differs.
    """
    artifact = artifact_around(path)
    if artifact is None:
        return None
    artifact.verify()
    return artifact.digest
