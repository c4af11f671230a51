"""The form as trained: the checkpoint itself, run by torch in fp32. A teacher is measured through it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Literal

from slmops.artifacts import MODEL_DESCRIPTION, Draft
from slmops.artifacts.manifest import MANIFEST_NAME
from slmops.compress.folder import (
    check_files,
    count_parameters,
    model_folder,
    pad_token_id,
    read_json,
    read_labels,
    write_description,
)
from slmops.models.folder import BOTTLENECK_FOLDER as BOTTLENECKS
from slmops.progress import Progress, ProgressSink, ignore

LEFT_OUT = frozenset({MANIFEST_NAME, MODEL_DESCRIPTION, "history.json"})
"""Files of a checkpoint that no runtime reads."""


def torch_variant(
    checkpoint_folder: Path,
    draft: Draft,
    *,
    form: Literal["classifier", "generator"],
    task: str,
    name: str,
    max_tokens: int,
    system: str | None = None,
    progress: ProgressSink = ignore,
) -> None:
    """Fill ``draft`` with the checkpoint at ``checkpoint_folder``, by hard links where the file system has them.

    Raises:
        ModelError: the folder is not a model of that form.
    """
    config = read_json(checkpoint_folder / "config.json")
    labels = read_labels(checkpoint_folder) if form == "classifier" else None
    parameters = count_parameters(checkpoint_folder)
    folder = model_folder(draft)
    files = sorted(path for path in checkpoint_folder.iterdir() if path.is_file() and path.name not in LEFT_OUT)
    for done, path in enumerate(files):
        progress(Progress("compress as trained", done, len(files), "files", path.name))
        _link_or_copy(path, folder / path.name)
    if (checkpoint_folder / BOTTLENECKS).is_dir():
        shutil.copytree(checkpoint_folder / BOTTLENECKS, folder / BOTTLENECKS)
    progress(Progress("compress as trained", len(files), len(files), "files"))
    check_files(folder, ["config.json", "tokenizer.json"], "Copying the checkpoint", "Train or fetch the model again.")
    write_description(
        folder,
        runtime="torch",
        form=form,
        precision="fp32",
        parameters=parameters,
        labels=labels,
        max_tokens=max_tokens,
        task=task,
        name=name,
        system=system,
        pad_token_id=pad_token_id(config),
    )
    draft.metrics |= {"precision": "fp32", "parameters": parameters}


def _link_or_copy(source: Path, destination: Path) -> None:
    """Artifacts are never changed in place, so two may share a file's bytes."""
    try:
        os.link(source.resolve(), destination)
    except OSError:
        shutil.copyfile(source, destination)
