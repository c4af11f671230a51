"""``slmops run``: a recipe, end to end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from slmops.recipe import Recipe


def run(
    recipe: Path = typer.Argument(help="The recipe; write one with: slmops init"),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one key of the recipe, for example --set data.train=my.csv"
    ),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    out: Path | None = typer.Option(None, "--out", help="Where report and bundle go; default: runs/NAME in the store."),
    until: str | None = typer.Option(
        None, "--until", metavar="STAGE", help="Stop after data, teacher, answers, search, student or evaluate."
    ),
    on: str | None = typer.Option(
        None, "--on", metavar="azureml", help="Run there instead of here, and fetch the result."
    ),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = typer.Option(False, "--json", help="Print report.json on standard output."),
) -> None:
    """Teach, compress, prove and pack a small model, as RECIPE says.

    What was done before is not done again; a run that was stopped goes on where it was. Exit code 0: done and all
    gates hold; 1: a gate failed (the report says which), or the input cannot be used; 2: the recipe or the command
    line is wrong.
    """
    from slmops.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    if on is not None:
        raise typer.Exit(run_elsewhere(loaded, store, out, on, until=until, as_json=as_json))
    if until is not None:
        run_part(loaded, store, out, until, offline=offline, as_json=as_json)
        return
    raise typer.Exit(run_and_show(loaded, store, out, offline=offline, as_json=as_json))


def run_elsewhere(recipe: Recipe, store: Path, out: Path | None, on: str, *, until: str | None, as_json: bool) -> int:
    """Run ``recipe`` on Azure ML, show the result, and give the exit code."""
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError, UsageError
    from slmops.store import Store

    if on != "azureml":
        raise UsageError(f"--on is {on!r}.", remedy="The one place so far is azureml.")
    if until is not None:
        raise UsageError("--until does not go with --on.", remedy="Run the first stages here, or all of them there.")
    try:
        from slmops.pipeline.azureml import run_on_azureml
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops run (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        result = run_on_azureml(recipe, opened, out=out, progress=progress)
    if as_json:
        print_json(result.report)
    else:
        show_report(result.report, result.folder, reused=False)
    return 0 if result.passed else 1


def run_part(recipe: Recipe, store: Path, out: Path | None, until: str, *, offline: bool, as_json: bool) -> None:
    """Run ``recipe`` up to a stage, and show where what it made is."""
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError
    from slmops.store import Store

    try:
        from slmops.pipeline import run_until
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops run (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        made = run_until(recipe, opened, until, out=out, offline=offline, progress=progress)
    if as_json:
        print_json({name: {"path": str(found.path), "digest": found.digest} for name, found in made.items()})
    else:
        for name, found in made.items():
            typer.echo(f"{name}: {found.path}")


def run_and_show(recipe: Recipe, store: Path, out: Path | None, *, offline: bool, as_json: bool) -> int:
    """Run ``recipe``, show the result, and give the exit code."""
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError
    from slmops.store import Store

    try:
        from slmops.pipeline import run_recipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops run (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        result = run_recipe(recipe, opened, out=out, offline=offline, progress=progress)
    if as_json:
        print_json(result.report)
    else:
        show_report(result.report, result.folder, reused=result.reused)
    return 0 if result.passed else 1


def show_report(report: Mapping[str, Any], folder: Path, *, reused: bool) -> None:
    """The short table: who, how good, how large, how fast; the verdict; where the rest is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    title = f"{report['name']}: {report['metric']} on {report['student']['score']['rows']} test rows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", overflow="ellipsis", no_wrap=True)
    for heading in (f"{report['metric']} (95 %)", "size", "p50", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    teacher, student = report["teacher"], report["student"]
    table.add_row(
        *_model_row(f"teacher ({teacher['runtime']} {teacher['precision'] or ''})".replace(" )", ")"), teacher)
    )
    for variant in report["variants"]:
        if variant["id"] not in {teacher["id"], student["id"]}:
            table.add_row(*_model_row(variant["id"], variant), style="dim")
    table.add_row(*_model_row(f"{student['id']} *", student), style="bold")
    for name, baseline in report["baselines"].items():
        table.add_row(*_model_row(f"baseline: {name}", baseline), style="dim")
    console.print(table)
    console.print(" * in the bundle", style="dim")
    for gate in report["gates"]:
        mark = "[green]✓[/]" if gate["passed"] else "[red]✗[/]"
        sign = "≥" if gate["direction"] == "at_least" else "≤"
        note = f"  [dim]{gate['note']}[/]" if gate["note"] else ""
        console.print(f" {mark} {gate['name']}: {gate['value']:.4g} (limit {sign} {gate['limit']:.4g}){note}")
    for line in further_lines(report):
        console.print(line, markup=False)
    for sentence in report.get("closest_in_words", ()):
        console.print(sentence, markup=False)
    console.print(report["verdict"], markup=False)
    if reused:
        console.print("Everything was done before; nothing was done again.", style="dim")
    console.print(f"report: {folder / 'report.html'}", markup=False, soft_wrap=True)
    console.print(f"bundle: {folder / 'bundle'}", markup=False, soft_wrap=True)


def further_lines(report: Mapping[str, Any]) -> list[str]:
    """The user's own measures and the benchmarks, teacher and student beside each other, a line each."""
    told = [
        f" {name}: teacher {figure_in_words(one['teacher'])}, student {figure_in_words(one['student'])}"
        for name, one in (report.get("measures") or {}).items()
    ]
    shown = {"published": "published", "teacher-torch": "teacher", report["student"]["id"]: "student"}
    for name, one in (report.get("benchmarks") or {}).items():
        figures = [
            f"{word} {figure_in_words(one['models'][who])}" for who, word in shown.items() if who in one["models"]
        ]
        told.append(f" {name} ({one['metric']}): {', '.join(figures)}")
    return told


def figure_in_words(figure: Mapping[str, Any]) -> str:
    """``3.2 (2.9–3.6)``: a value with its interval where it has one."""
    ends = figure.get("ci95")
    return f"{figure['value']:.4g}" + (f" ({ends[0]:.4g}–{ends[1]:.4g})" if ends else "")


def _model_row(name: str, entry: Mapping[str, Any]) -> list[str]:
    low, high = entry["score"]["ci95"]
    p50 = entry["latency_ms"]["p50"]
    return [
        name,
        f"{entry['score']['value']:.3f} ({low:.3f}–{high:.3f})",
        bytes_in_words(entry.get("size_bytes")),
        "" if p50 is None else f"{p50:.2f} ms" if p50 < 100 else f"{p50:,.0f} ms",
        bytes_in_words(entry.get("memory_bytes_peak")),
    ]


def bytes_in_words(size_bytes: float | None) -> str:
    """Decimal units, as disks are labelled: ``2.1 MB``, ``542 MB``."""
    if size_bytes is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.{1 if size_bytes < 10 * scale else 0}f} {unit}"
    return f"{size_bytes:.0f} B"
