"""``slmops verify``: is this bundle whole, and does it answer?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def verify(
    bundle: Annotated[Path, typer.Argument(help="A bundle or a variant.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tell whether a bundle is whole and its model answers.

    Every file is compared with its digest, the model is loaded and asked one question. Exit code 1 if anything is
    wrong.
    """
    from slmops.cli.render import print_json
    from slmops.errors import ArtifactError, CorruptArtifactError
    from slmops.package import artifact_around, verify_bundle

    try:
        problems = verify_bundle(bundle)
    except CorruptArtifactError as error:
        if not as_json:
            raise
        problems = [error.message]
    if as_json:
        print_json({"bundle": str(bundle), "ok": not problems, "problems": problems})
    elif problems:
        raise ArtifactError(f"{bundle}: " + " ".join(problems), remedy="Fetch the bundle anew, or run again.")
    else:
        artifact = artifact_around(bundle)
        kind, digest = (artifact.manifest.kind, artifact.digest) if artifact else ("model", "")
        typer.echo(f"{bundle}: the {kind} is whole and its model answers. Digest {digest}.")
    if problems:
        raise typer.Exit(1)
