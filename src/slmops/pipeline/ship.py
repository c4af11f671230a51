"""Bundle, and the folder where a person finds report and bundle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from slmops.artifacts import Bundle, Checkpoint, Dataset, Draft, Report, Variant
from slmops.errors import StorageError
from slmops.monitor.reference import FOLDER as REFERENCE
from slmops.monitor.reference import write_reference
from slmops.package import build_bundle
from slmops.pipeline.context import Context
from slmops.pipeline.watch import reference_of
from slmops.recipe import Recipe, portable_recipe


def package(context: Context, report: Report, data: Dataset, teacher: Checkpoint | None, student: Checkpoint) -> Bundle:
    recipe = context.recipe
    content = report.content
    variant = Variant.open(context.store.find(content["student"]["artifact"]).path)
    lineage = {"dataset": data.digest, "student": student.digest, "report": report.digest}
    if teacher is not None:
        lineage["teacher"] = teacher.digest

    def build(draft: Draft) -> None:
        build_bundle(
            variant=variant,
            report=content,
            recipe=portable_recipe(recipe),
            licenses=_licenses(context),
            lineage=lineage,
            draft=draft,
            report_html=(report.path / "report.html").read_text("utf-8"),
            calibration=content.get("calibration"),
        )
        reference = reference_of(context, content["student"]["id"], variant, data)
        if reference is not None:
            write_reference(reference, draft.path / REFERENCE)

    return context.stage(
        "bundle",
        Bundle,
        {"variant": variant, "report": report},
        {"recipe": portable_recipe(recipe)},
        ["slmops.package", "slmops.monitor.reference", "slmops.pipeline.watch"],
        build,
    )


def make_place(out: Path) -> None:
    """The folder for report and bundle, made before any work is done.

    Raises:
        StorageError: it cannot be.
    """
    with _at(out):
        out.mkdir(parents=True, exist_ok=True)


def write_recipe(recipe: Recipe, path: Path) -> None:
    """``recipe`` as a file that ``slmops run`` takes; what is at its default is left out.

    Raises:
        StorageError: the disk would not take it.
    """
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    with _at(path.parent):
        replace_text(path, yaml.safe_dump(raw, sort_keys=False, allow_unicode=True))


def publish(context: Context, out: Path, report: Report, bundle: Bundle) -> None:
    """Put report and bundle where a person looks for them. Whatever stands there is whole at every moment.

    Raises:
        StorageError: the disk would not take them.
        ArtifactError: what stands in the bundle's place is no bundle.
    """
    put_bundle(bundle, out)
    with _at(out):
        content = {**report.content, "bundle": str(out / "bundle"), "wall_s": context.wall_s}
        replace_text(out / "report.html", (report.path / "report.html").read_text("utf-8"))
        replace_text(out / "report.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def put_bundle(bundle: Bundle, out: Path) -> None:
    """Make ``out/bundle`` a copy of ``bundle``.

    Raises:
        StorageError, ArtifactError: as :func:`publish`.
    """
    shipped, fresh, old = out / "bundle", out / ".bundle.tmp", out / ".bundle.old"
    with _at(out):
        shutil.rmtree(old, ignore_errors=True)
        if not shipped.exists() or Bundle.open(shipped).digest != bundle.digest:
            shutil.rmtree(fresh, ignore_errors=True)
            _copy_tree(bundle.path, fresh)
            if shipped.exists():
                shipped.rename(old)
            fresh.rename(shipped)
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _at(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"Could not put report and bundle into {out}: {error.strerror or error}.",
            remedy="Free some space there, or choose another --out.",
        ) from error


def _copy_tree(source: Path, destination: Path) -> None:
    destination.mkdir()
    for path in sorted(source.rglob("*")):
        target = destination / path.relative_to(source)
        if path.is_dir():
            target.mkdir()
        else:
            shutil.copyfile(path, target)


def _licenses(context: Context) -> dict[str, str]:
    """What is known of the licences: a line that says whose, and the texts that lie beside the model and the data."""
    model = context.named_student or context.base
    data = Path(context.recipe.data.train)
    stated = model.license or "no licence stated; ask whoever published it"
    return {
        "base-model": f"{model.source}: {stated}\n{_licence_texts(model.path)}",
        "data": f"{data.name}: as stated by whoever gave it; slmops has not checked it\n{_licence_texts(data.parent)}",
    }


def _licence_texts(folder: Path) -> str:
    """The files ``LICENSE*``, ``LICENCE*`` and ``NOTICE*`` of ``folder``, each after a blank line."""
    names = ("license", "licence", "notice")
    found = (path for path in sorted(folder.glob("*")) if path.name.lower().startswith(names) and path.is_file())
    return "".join(f"\n{path.read_text('utf-8', errors='replace').rstrip()}\n" for path in found)


def replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)
