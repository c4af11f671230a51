"""``slmops validate``: the checklist before production, executed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from slmops.artifacts import Row
    from slmops.evaluate.served import Served
    from slmops.evaluate.validate import Validation

EPILOG = """
Examples:

  slmops validate bundle                                 all checks, on a server of its own

  slmops validate bundle --recipe recipe.yaml            and the score on the recipe's test rows

  slmops validate bundle --url http://127.0.0.1:8000     a server that runs already, on this machine or another
"""
END_LIMIT_S = 60


def validate(
    bundle: Path = typer.Argument(help="A bundle, a variant or a model folder."),
    recipe: Path | None = typer.Option(None, "--recipe", help="Score it on this recipe's test rows."),
    rows: int = typer.Option(300, "--rows", min=1, help="Rows that are scored at most."),
    requests: int = typer.Option(4000, "--requests", min=100, help="Requests of the soak."),
    only: list[str] = typer.Option([], "--only", help="One check by name; several times for several."),
    url: str | None = typer.Option(None, "--url", help="Ask this server.", show_default="one is started"),
    key_env: str = typer.Option(
        "SLMOPS_KEY", "--key-env", help="Variable that holds the server's key, if it has keys."
    ),
    out: Path = typer.Option(Path("validate.html"), "--out", help="The page."),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Tell whether a bundle is fit for production.

    Answers in domain, output format, input lengths, edge cases, invalid requests, callers at once, and memory over a
    soak, all asked over HTTP; one page has the evidence. Exit code 1: a check failed.
    """
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import UsageError
    from slmops.evaluate.machine import machine_facts
    from slmops.evaluate.validate import CHECKS, ValidateSettings
    from slmops.evaluate.validate import validate as run_checks
    from slmops.evaluate.validate_html import render_validation

    unknown = [name for name in only if name not in CHECKS]
    if unknown:
        raise UsageError(f"{', '.join(unknown)} is no check.", remedy=f"Choose among {', '.join(CHECKS)}.")
    subject = _subject(bundle)
    asked, answer_tokens = _rows(recipe, store) if recipe else ([], 256)
    settings = ValidateSettings(soak_requests=requests, rows=rows)
    with _server(bundle, url, os.environ.get(key_env)) as served, progress_bars() as progress:
        found = run_checks(
            served,
            subject,
            settings,
            machine=machine_facts(),
            rows=asked,
            answer_tokens=answer_tokens,
            only=[name for name in CHECKS if not only or name in only],
            progress=progress,
        )
    report = found.to_json()
    out.write_text(render_validation(report), "utf-8")
    if as_json:
        print_json({**report, "page": str(out)})
    else:
        for line in lines(found):
            typer.echo(line)
        typer.echo(f"The page: {out}")
    raise typer.Exit(0 if found.passed else 1)


def lines(found: Validation) -> list[str]:
    """The checks for people."""
    signs = {True: "✓", False: "✗", None: "–"}
    told = [f"{signs[check.passed]} {check.name:12} {check.found}" for check in found.checks]
    return [*told, f"{found.subject.name}: {'passed' if found.passed else 'failed'} in {found.spent_s:.0f} s"]


def _subject(bundle: Path) -> Any:
    from slmops.evaluate.validate import Subject
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription

    folder = resolve_model_folder(bundle)
    digest = check_digests(bundle) or ""
    report = bundle / "report.json"
    promised = None
    if report.is_file():
        told = json.loads(report.read_text("utf-8"))
        student = told.get("student") or {}
        promised = student.get("score") if isinstance(student, dict) else None
    description = ModelDescription.read(folder)
    return Subject(description.name or bundle.resolve().name, digest, description, promised)


def _rows(recipe: Path, store: Path) -> tuple[Sequence[Row], int]:
    """The recipe's test rows as the model is shown them, and how long an answer may be."""
    from slmops.errors import MissingExtraError
    from slmops.recipe import load_recipe
    from slmops.store import Store

    chosen = load_recipe(recipe)
    try:
        from slmops.pipeline.judge import rows_to_ask
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops validate --recipe (it needs {error.name})", "train") from None
    with Store.open(store) as opened:
        return rows_to_ask(chosen, opened), chosen.evaluate.max_new_tokens


@contextmanager
def _server(bundle: Path, url: str | None, key: str | None) -> Iterator[Served]:
    """The server to ask; one that is started here ends with the block."""
    from slmops.errors import ServeError
    from slmops.evaluate.served import Served

    if url is not None:
        yield Served(url, key=key)
        return
    command = [sys.executable, "-m", "slmops", "serve", str(bundle), "--port", "0", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "SLMOPS_KEYS"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            said = (server.communicate()[1] or "it said nothing").strip().splitlines()
            raise ServeError(f"The server did not start: {said[0].removeprefix('error: ')}")
        yield Served(json.loads(line)["url"], pid=server.pid)
    finally:
        server.terminate()
        try:
            server.communicate(timeout=END_LIMIT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()
