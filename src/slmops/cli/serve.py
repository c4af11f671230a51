"""``slmops serve``: an OpenAI-compatible server over a bundle."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from slmops.errors import MissingExtraError


def serve(
    bundle: Annotated[Path, typer.Argument(help="A bundle, a variant, or a model folder.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any free one.")] = 8000,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of one forward pass.", show_default="chosen by the model's size")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What callers name the model.", show_default="the bundle's own name")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON object.")] = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does. Its files are compared with their digests first."""
    if any(find_spec(library) is None for library in ("fastapi", "uvicorn")):
        raise MissingExtraError("slmops serve", "serve")
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription
    from slmops.serve.app import create_app
    from slmops.serve.engine import Engine
    from slmops.serve.server import bind, run

    folder = resolve_model_folder(bundle)
    digest = check_digests(bundle)
    description = ModelDescription.read(folder)
    model = name or description.name or bundle.resolve().name
    with bind(host, port) as listening:
        app = create_app(folder, name=model, engine=Engine.open(folder, threads=threads))

        def ready(url: str) -> None:
            if as_json:
                typer.echo(json.dumps({"url": url, "model": model, "form": description.form, "digest": digest}))
                return
            typer.echo(
                f"Serving {model} at {url}/v1 (Ctrl-C ends it). Try:\n\n  {example(url, model, description.form)}\n"
            )

        run(app, listening, on_ready=ready)


def example(url: str, model: str, form: str) -> str:
    """One line for a terminal that gets an answer."""
    question = "Where is my card?"
    path, body = "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": question}]}
    if form == "classifier":
        path, body = "/v1/classify", {"input": question}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {url}{path} -H 'Content-Type: application/json' -d '{quoted}'"
