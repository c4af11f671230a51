"""``slmops bench``: what a model costs on this machine. Needs the device size of the installation alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slmops.evaluate.bench import BenchSettings, Subject

EPILOG = """
Examples:

  slmops bench bundle                                  a table for people

  slmops bench bundle --out pi.json                    a file to be sent back from a device

  slmops bench bundle --device raspberry-pi-5          held to its cores and memory here, with estimates for it

  slmops bench bundle --memory-mb 300 --cores 1        does it run in that?

  slmops bench int8 int4 --html bench.html             two models by turns, and a page with plots

  slmops bench bundle --peer llama.cpp=model.gguf      another engine beside it

  slmops bench bundle --peer foundry-local=bundle      the same files in Foundry Local

  slmops bench --compare here.json pi.json             two reports side by side
"""


def bench(
    models: Annotated[list[Path], typer.Argument(help="Bundles, variants or model folders; with --compare: reports.")],
    compare: Annotated[bool, typer.Option("--compare", help="Show reports side by side; measure nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Write the report to this JSON file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with plots to this file.")] = None,
    requests: Annotated[int, typer.Option(min=3, help="Single requests.")] = 30,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens of an answer at most.")] = 64,
    at_once: Annotated[str, typer.Option(help="Requests handed over together.")] = "1,4,8",
    lengths: Annotated[str, typer.Option(help="Input lengths, in words.")] = "16,64,256",
    prompts: Annotated[Path | None, typer.Option(help="Ask these instead: one a line.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of one forward pass.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Hold the model to this device's cores and memory, and estimate its speed there.")
    ] = None,
    cores: Annotated[int | None, typer.Option(min=1, help="Cores that the measured process may use.")] = None,
    memory_mb: Annotated[float | None, typer.Option(min=1, help="Memory that it may take.")] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer", metavar="NAME=PATH", help="transformers=FOLDER, llama.cpp=FILE.gguf or foundry-local=BUNDLE."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less work, for a look.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report on standard output.")] = False,
) -> None:
    """Measure what models cost on this machine.

    Time to the first text, per token and of whole answers; tokens a second by requests at once and by input length;
    memory, processor time, energy, loading, size on disk.

    Each model runs in a fresh process and they take turns. The report names neither host, user nor prompts. Estimates
    for a device are marked as such; run this on the device to know.
    """
    from slmops.cli.render import print_json

    reports = read_reports(models) if compare else [measure(models, locals())]
    if out is not None and not compare:
        write_report(reports[0], out)
    if html is not None:
        from slmops.evaluate.bench_html import render_bench

        write_text(html, render_bench(reports))
    if as_json:
        print_json(reports if compare else reports[0])
        return
    show(reports)
    for place in (None if compare else out, html):
        if place is not None:
            typer.echo(f"Written: {place}")


def read_reports(paths: Sequence[Path]) -> list[dict[str, Any]]:
    from slmops.errors import UsageError
    from slmops.evaluate.bench import read_bench

    if len(paths) < 2:
        raise UsageError(f"--compare needs two reports, and {len(paths)} was named.", remedy="Name them one by one.")
    return [read_bench(path) for path in paths]


def measure(models: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Run the benchmark as the command line says."""
    from slmops.cli.render import progress_bars
    from slmops.evaluate.bench import PROMPTS, bench
    from slmops.hardware import device_profile

    for place in (options["out"], options["html"]):
        check_writable(place)
    profile = device_profile(options["device"]) if options["device"] else None
    settings = settings_of(options)
    asked = read_prompts(options["prompts"]) if options["prompts"] else PROMPTS
    with progress_bars() as progress:
        return bench(
            subjects_of(models, options["peers"] or ()), settings, prompts=asked, device=profile, progress=progress
        )


def settings_of(options: Mapping[str, Any]) -> BenchSettings:
    from slmops.evaluate.bench import BenchSettings
    from slmops.evaluate.limits import Limits
    from slmops.hardware import device_profile

    profile = device_profile(options["device"]) if options["device"] else None
    memory_mb = options["memory_mb"] or (profile.model_memory_mb if profile else None)
    settings = BenchSettings(
        requests=options["requests"],
        max_tokens=options["max_tokens"],
        at_once=whole_numbers("--at-once", options["at_once"]),
        lengths=whole_numbers("--lengths", options["lengths"]),
        threads=options["threads"],
        limits=Limits(
            int(memory_mb * 1e6) if memory_mb else None, options["cores"] or (profile.cores if profile else None)
        ),
    )
    return settings.quick() if options["quick"] else settings


def whole_numbers(option: str, text: str) -> tuple[int, ...]:
    from slmops.errors import UsageError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text} is not a list of whole numbers.", remedy=f"For example {option} 1,4,8")
    return tuple(int(part) for part in parts)


def subjects_of(models: Sequence[Path], peers: Sequence[str]) -> list[Subject]:
    """What is measured, each with a name of its own."""
    from slmops.evaluate.bench import Subject
    from slmops.evaluate.peers import FOUNDRY, parse_peer
    from slmops.package.resolve import artifact_around, resolve_model_folder
    from slmops.runtime.description import ModelDescription

    found: list[Subject] = []
    for path in models:
        folder = resolve_model_folder(path)
        description = ModelDescription.read(folder)
        artifact = artifact_around(path)
        name = " ".join(part for part in (description.name or "model", description.precision) if part)
        found.append(Subject(unlike(name, found), folder, digest=artifact.digest if artifact else ""))
    for text in peers:
        engine, path = parse_peer(text)
        if engine == FOUNDRY:
            path = resolve_model_folder(path)
        found.append(Subject(unlike(engine, found), path, engine=engine))
    return found


def unlike(name: str, others: Sequence[Subject]) -> str:
    """``name``, with a number where another has it."""
    taken = {other.name for other in others}
    return next(one for one in (name, *(f"{name} ({n})" for n in range(2, len(taken) + 3))) if one not in taken)


def read_prompts(path: Path) -> list[str]:
    from slmops.errors import DataError

    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not lines:
        raise DataError(f"{path} holds no prompts.", remedy="Write one a line.")
    return lines


def check_writable(path: Path | None) -> None:
    """Before minutes of measuring: can the result be kept?"""
    from slmops.errors import UsageError

    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UsageError(f"{path} cannot be written: it is a folder, or in one that is not there.")


def write_report(report: Mapping[str, Any], path: Path) -> None:
    import json

    write_text(path, json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    from slmops.errors import StorageError

    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise StorageError.from_os_error(error, "write", path) from None


# --- for people ---------------------------------------------------------------------------------------------------


def show(reports: Sequence[Mapping[str, Any]]) -> None:
    """One column a model; the reports' machines first where there are several."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from slmops.evaluate.bench import held_in_words, machine_in_words, table_rows

    console = Console(highlight=False)
    columns = [(number, model) for number, report in enumerate(reports) for model in report["models"]]
    for number, report in enumerate(reports):
        prefix = f"[{number + 1}] " if len(reports) > 1 else ""
        held = held_in_words(report["settings"].get("limits") or {})
        console.print(f"{prefix}{machine_in_words(report['machine'])}{held}", markup=False)
        load, cores = report["machine"].get("load_1min"), report["machine"]["cores"]
        if load is not None and load > cores:
            console.print(f"{prefix}The machine was busy (load {load:.1f}): timings are too long.", style="yellow")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for number, model in columns:
        prefix = f"[{number + 1}] " if len(reports) > 1 else ""
        table.add_column(f"{prefix}{model['name']}", justify="right")
    for label, cells in table_rows([model for _, model in columns]):
        table.add_row(label, *cells)
    console.print(table)
    for _, model in columns:
        for note in (model.get("on_device") or {}).get("notes", ()):
            console.print(note, markup=False)
    if any(model.get("on_device") for _, model in columns):
        console.print("Lines with ≈ are estimates for the device, not measurements.", style="dim")
