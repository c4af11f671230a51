"""Write a bundle: a model folder with its report, card, licences and origin.

::

    model/           the variant's, file by file
    report.json      the measurements; report.html where the run drew one
    MODEL_CARD.md    what it is, how good, out of what, under which licence, how to run it
    licenses/        one text a component
    recipe.yaml      what was asked for
    lineage.json     out of which artifacts it came, by digest
    reference/       how its test rows look, as numbers without texts: what its traffic is compared with

Guarantees: the variant's bytes are compared with its manifest before they are shipped; what the bundle adds to the
model's description (a classifier's calibration) is written beside them, never into them. Files of the model are hard
links where the file system allows it: a bundle beside its variant takes no second copy of the disk.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from slmops.artifacts import MODEL_DESCRIPTION, Draft, Variant
from slmops.errors import ArtifactError
from slmops.package.card import render_card


def build_bundle(
    *,
    variant: Variant,
    report: Mapping[str, Any],
    recipe: Mapping[str, Any],
    licenses: Mapping[str, str],
    lineage: Mapping[str, Any],
    draft: Draft,
    report_html: str | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Fill ``draft`` with a bundle of ``variant``.

    ``report``    the content of report.json
    ``licenses``  component (``base-model``, ``data``, ...) to the text of its licence
    ``calibration``  ``temperature`` and ``threshold`` for the model's description, where it is a classifier's
    ``lineage``   role (``dataset``, ``teacher``, ...) to a digest, or to an object that says more

    Raises:
        CorruptArtifactError: a file of the variant has changed since it was written.
        ArtifactError: a licence's name cannot be a file name.
    """
    variant.verify()
    root = draft.path
    link_tree(variant.model_path, root / "model")
    if calibration is not None:
        _describe(root / "model" / MODEL_DESCRIPTION, calibration)
    _write_json(root / "report.json", report)
    if report_html is not None:
        (root / "report.html").write_text(report_html, "utf-8")
    card = render_card(
        variant.description, report, recipe=recipe, licenses=licenses, lineage=lineage, model_bytes=variant.model_bytes
    )
    (root / "MODEL_CARD.md").write_text(card, "utf-8")
    (root / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True), "utf-8")
    _write_json(root / "lineage.json", {**lineage, "variant": variant.digest})
    (root / "licenses").mkdir()
    for name, text in licenses.items():
        (root / "licenses" / f"{_file_name(name)}.txt").write_text(text, "utf-8")
    draft.metrics["model_bytes"] = variant.model_bytes


def link_tree(source: Path, destination: Path) -> None:
    """The files below ``source`` again below ``destination``: hard links, or copies across file systems."""
    for path in sorted(source.rglob("*")):
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, target)
        except OSError:  # another device, or a file system without hard links; a full disk fails again below
            shutil.copyfile(path, target)


def _describe(path: Path, calibration: Mapping[str, Any]) -> None:
    """Put the calibration into the model's description, in a file of its own: the one beside it is the variant's."""
    description = json.loads(path.read_text("utf-8"))
    path.unlink()
    kept = {key: calibration[key] for key in ("temperature", "threshold") if calibration.get(key) is not None}
    _write_json(path, {**description, "calibration": kept})


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def _file_name(name: str) -> str:
    if not name or name.startswith(".") or any(character in '/\\:*?"<>|' or character < " " for character in name):
        raise ArtifactError(f"{name!r} cannot be the name of a licence file.", remedy="Use letters, digits, - and _.")
    return name
