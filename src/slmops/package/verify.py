"""Check a bundle on arrival: its bytes, its parts, and that its model answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np

from slmops.artifacts import Bundle, Message
from slmops.errors import ArtifactError, SlmopsError
from slmops.package.resolve import artifact_around, resolve_model_folder
from slmops.runtime.base import Classifier, GenerationRequest, Generator
from slmops.runtime.description import ModelDescription
from slmops.runtime.device import open_device_model

PROBE = "Hello, can you help me?"


def verify_bundle(path: Path | str, *, threads: int | None = None) -> list[str]:
    """What is wrong with the bundle (or variant) at ``path``: sentences, none where all is well.

    Every byte is compared with the manifest first; only then is the model loaded and asked one question.

    Raises:
        CorruptArtifactError: bytes differ from the manifest; names the file.
        ArtifactError: no bundle or variant.
    """
    folder = resolve_model_folder(path)
    artifact = artifact_around(path)
    if artifact is None:
        raise ArtifactError(
            f"{path} is a bare model folder: it has no manifest to be compared with.", remedy="Name a bundle."
        )
    artifact.verify()
    problems = missing_parts(artifact.path) if isinstance(artifact, Bundle) else []
    return problems + problems_of_model(folder, threads=threads)


def missing_parts(root: Path) -> list[str]:
    """What a bundle should have beside its model, and has not."""
    problems = [f"{name} is missing." for name in ("report.json", "MODEL_CARD.md") if not (root / name).is_file()]
    if not any((root / "licenses").glob("*")):
        problems.append("licenses/ is missing or empty: nobody may pass this on.")
    try:
        if (root / "report.json").is_file() and not isinstance(json.loads((root / "report.json").read_bytes()), dict):
            problems.append("report.json holds no object.")
    except ValueError as error:
        problems.append(f"report.json cannot be read: {error}.")
    return problems


def problems_of_model(folder: Path, *, threads: int | None = None) -> list[str]:
    """Load the model folder and ask it one question."""
    try:
        description = ModelDescription.read(folder)
        model = open_device_model(folder, threads=threads)
    except SlmopsError as error:
        return [error.message]
    try:
        if description.form == "classifier":
            return _problems_of_labels(cast("Classifier", model))
        return _problems_of_text(cast("Generator", model), description)
    except SlmopsError as error:
        return [f"The model does not answer: {error.message}"]
    finally:
        model.close()


def _problems_of_labels(model: Classifier) -> list[str]:
    probabilities = model.probabilities([PROBE])
    if probabilities.shape != (1, len(model.labels)):
        return [f"The model gives {probabilities.shape[-1]} probabilities for {len(model.labels)} labels."]
    if not np.isfinite(probabilities).all() or abs(float(probabilities.sum()) - 1) > 1e-3:
        return ["The model's probabilities are not numbers that sum to 1."]
    return []


def _problems_of_text(model: Generator, description: ModelDescription) -> list[str]:
    messages = description.conversation([Message("user", PROBE)])
    (answer,) = model.generate([GenerationRequest(messages, max_tokens=4)])
    if answer.prompt_tokens == 0:
        return ["The model read nothing of the question."]
    return []
