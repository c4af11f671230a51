"""``slmops deploy``: a bundle in Foundry Local, Ollama or llama.cpp."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slmops.package.deploy import Deployed, Target

deploy = typer.Typer(
    help="Put a bundle into Foundry Local, Ollama or llama.cpp.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

BundleArgument = Annotated[Path, typer.Argument(help="A bundle, a variant or a model folder.", show_default=False)]
NameOption = Annotated[str | None, typer.Option(help="What callers name it.", show_default="the bundle's own name")]
PromptOption = Annotated[str | None, typer.Option(help="What it is asked first.", show_default="a support question")]
RequestsOption = Annotated[int, typer.Option(min=1, help="Requests of the measurement.")]
TokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="New tokens of an answer.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="Port on loopback; 0 takes any free one.")]
KeepOption = Annotated[bool, typer.Option("--keep", help="Go on serving until Ctrl-C.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@deploy.command("foundry")
def foundry(
    bundle: Annotated[
        Path | None, typer.Argument(help="A bundle, a variant or a model folder.", show_default=False)
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Make an environment of its own for it first (280 MB, package index).")
    ] = False,
    data: Annotated[Path, typer.Option(help="Where it keeps its catalog and its log.")] = Path(".slmops/foundry"),
    name: NameOption = None,
    prompt: PromptOption = None,
    requests: RequestsOption = 8,
    max_tokens: TokensOption = 64,
    port: PortOption = 0,
    keep: KeepOption = False,
    as_json: JsonOption = False,
) -> None:
    """Register a bundle in Microsoft's Foundry Local, and list, ask and measure it there.

    It runs as a supervised child process with its telemetry off; what remains is said at the end.
    """
    from slmops.errors import UsageError
    from slmops.package.deploy.foundry import foundry as opened
    from slmops.package.deploy.foundry import install_foundry

    if install:
        python = install_foundry()
        typer.echo(f"Foundry Local is installed for {python}.", err=True)
    if bundle is None:
        if install:
            return
        raise UsageError("There is no BUNDLE.", remedy="Name one, or give --install alone.")
    folder = _folder(bundle)
    with opened(folder, name=name, data=data, port=port) as target:
        _shown(target, prompt, requests, max_tokens, keep=keep, as_json=as_json)


@deploy.command("llamacpp")
def llamacpp(
    bundle: BundleArgument,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads.", show_default="its own choice")] = None,
    name: NameOption = None,
    prompt: PromptOption = None,
    requests: RequestsOption = 8,
    max_tokens: TokensOption = 64,
    port: PortOption = 0,
    keep: KeepOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a bundle's GGUF file in llama.cpp's own server, and list, ask and measure it there."""
    from slmops.package.deploy.llamacpp import llamacpp as opened

    with opened(_folder(bundle), name=name, port=port, threads=threads) as target:
        _shown(target, prompt, requests, max_tokens, keep=keep, as_json=as_json)


@deploy.command("ollama")
def ollama(
    bundle: BundleArgument,
    out: Annotated[
        Path | None, typer.Option(help="Where what Ollama needs is written.", show_default="BUNDLE-ollama")
    ] = None,
    name: NameOption = None,
    prompt: PromptOption = None,
    requests: RequestsOption = 8,
    max_tokens: TokensOption = 64,
    as_json: JsonOption = False,
) -> None:
    """Create a bundle's model in Ollama, and list, ask and measure it there.

    Without Ollama on this machine, the folder that 'ollama create' needs is written, and the command shown.
    """
    from slmops.cli.render import print_json
    from slmops.package.deploy.ollama import create_in_ollama, find_ollama, write_for_ollama
    from slmops.runtime.description import ModelDescription

    folder = _folder(bundle)
    wanted = name or ModelDescription.read(folder).name or bundle.resolve().name
    modelfile = write_for_ollama(folder, out or bundle.with_name(f"{bundle.resolve().name}-ollama"))
    program = find_ollama()
    if program is None:
        command = f"ollama create {wanted} -f {modelfile}"
        if as_json:
            print_json({"target": "Ollama", "written": str(modelfile), "command": command, "installed": False})
        else:
            typer.echo(
                f"Ollama is not on this machine. All that it needs is in {modelfile.parent}. There:\n\n  {command}"
            )
        return
    target = create_in_ollama(modelfile, wanted, program=program)
    _shown(target, prompt, requests, max_tokens, keep=False, as_json=as_json)


def _folder(bundle: Path) -> Path:
    """The model folder, its bytes compared with their digests."""
    from slmops.package import check_digests, resolve_model_folder

    folder = resolve_model_folder(bundle)
    check_digests(bundle)
    return folder


def _shown(target: Target, prompt: str | None, requests: int, max_tokens: int, *, keep: bool, as_json: bool) -> None:
    from slmops.cli.render import print_json, progress_bars
    from slmops.package.deploy import try_out
    from slmops.package.deploy.target import PROMPTS

    with progress_bars() as progress:
        found = try_out(
            target, question=prompt or PROMPTS[0], requests=requests, max_tokens=max_tokens, progress=progress
        )
    if as_json:
        print_json(found.to_json())
    else:
        for line in lines(found):
            typer.echo(line)
    if keep:
        _wait_for_the_end(f"{target.name} serves {target.model_id} at {target.base_url} (Ctrl-C ends it).")


def _wait_for_the_end(said: str) -> None:
    """Until SIGINT or SIGTERM; what was opened around this is closed afterwards."""
    ended = threading.Event()
    before = {one: signal.signal(one, lambda *_: ended.set()) for one in (signal.SIGINT, signal.SIGTERM)}
    typer.echo(said, err=True)
    ended.wait()
    for one, handler in before.items():
        signal.signal(one, handler)


def lines(found: Deployed) -> list[str]:
    """What was found, for people."""
    together = ", ".join(f"{callers} at once {rate:.0f}" for callers, rate in found.together_tokens_per_s.items())
    told = [
        f"{found.target} {found.version} has {found.model} (it lists {', '.join(found.models)})",
        f"asked: {found.question}",
        f"answered: {found.answer.strip()}",
        f"first token: {found.ttft_ms['p50']:.0f} ms (p95 {found.ttft_ms['p95']:.0f}); whole answer: "
        f"{found.latency_ms['p50']:.0f} ms (p95 {found.latency_ms['p95']:.0f}); {found.requests} requests",
        f"tokens a second: {found.tokens_per_s:.0f} alone; {together}",
    ]
    if found.memory_bytes_peak is not None:
        told.append(f"memory: {found.memory_bytes_peak / 1e6:.0f} MB at most")
    return [*told, *(f"note: {note}" for note in found.notes)]
