"""``slmops train``: fine-tune a model on a recipe's gold answers or running text, without a teacher."""

from __future__ import annotations

from pathlib import Path

import typer


def train(
    recipe: Path = typer.Argument(help="The recipe; its train section says how."),
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="For example train.method=qlora"),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    out: Path | None = typer.Option(None, "--out", help="Also copy the trained model to this folder."),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Fine-tune a model on the rows or the running text of RECIPE.

    Rows teach their gold answers, running text (data.text) every token of it. The model is student.model, or the
    teacher's where none is named; train.method chooses full, lora, qlora or bottleneck. A training that was stopped
    goes on where it was.
    """
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError, UsageError
    from slmops.recipe import load_recipe
    from slmops.store import Store

    chosen = load_recipe(recipe, overrides)
    if out is not None and out.exists() and any(out.iterdir()):
        raise UsageError(f"There is something at {out} already.", remedy="Choose another --out, or delete it.")
    try:
        from slmops.pipeline.tune import train_recipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops train (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        result = train_recipe(chosen, opened, offline=offline, progress=progress)
    path = result.checkpoint.path
    if out is not None:
        import shutil

        shutil.copytree(path, out, dirs_exist_ok=True)
    if as_json:
        place = {"path": str(path), "digest": result.checkpoint.digest, "reused": result.reused}
        print_json({"name": chosen.name, "task": chosen.task, **place, "metrics": dict(result.metrics)})
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for name, value in result.metrics.items():
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        console.print(f" {name}: {shown}", markup=False)
    console.print(f"{'Found done' if result.reused else 'Written'}: {out or path}", markup=False)
