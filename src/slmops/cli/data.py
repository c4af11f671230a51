"""``slmops data``: read, check, clean and split the rows of a recipe, and show what became of them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from slmops.artifacts import Row

SAMPLE_ROWS = 3
SAMPLE_CHARS = 160
LABELS_SHOWN = 100


def data(
    recipe: Path = typer.Argument(help="The recipe."),
    overrides: list[str] = typer.Option([], "--set", help="KEY=VALUE, for example data.train=my.csv"),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Read, check, clean and split the rows of a recipe."""
    from slmops.artifacts import Dataset
    from slmops.cli.render import print_json, progress_bars
    from slmops.data import prepare, source_digests, stage_config
    from slmops.recipe import load_recipe
    from slmops.store import Store, code_version

    chosen = load_recipe(recipe, overrides)
    fetched: dict[tuple[str, str | None], Path] = {}

    def fetch_hub(name: str, revision: str | None) -> Path:
        from slmops.models.hub import fetch_hub_dataset

        if (name, revision) not in fetched:
            fetched[name, revision] = fetch_hub_dataset(name, revision)
        return fetched[name, revision]

    with Store.open(store) as opened, progress_bars() as progress:
        result = opened.stage(
            "data",
            Dataset,
            inputs=source_digests(chosen.data, fetch_hub=fetch_hub),
            config=stage_config(chosen.data, chosen.task, chosen.seed),
            code_version=code_version("slmops.data"),
            build=lambda draft: prepare(
                chosen.data, chosen.task, chosen.seed, draft, fetch_hub=fetch_hub, progress=progress
            ),
        )
    dataset = result.artifact
    summary = dataset.summary
    if as_json:
        place = {"path": str(dataset.path), "digest": dataset.digest, "reused": result.reused}
        print_json({"name": chosen.name, "task": chosen.task, **place, "summary": summary})
        return
    _show(summary, list(islice(dataset.rows("train"), SAMPLE_ROWS)), dataset.path, reused=result.reused)


def _show(summary: dict[str, Any], rows: list[Row], path: Path, *, reused: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(balance_table(summary))
    for line in summary_lines(summary):
        console.print(Text(line))
    console.print()
    for row in rows:
        console.print(
            Text.assemble((row.id, "cyan"), "  ", _clip(row.text), ("  →  ", "dim"), _clip(row.target or "—"))
        )
    for warning in summary["warnings"]:
        console.print(Text.assemble(("warning: ", "bold yellow"), warning))
    console.print(Text(f"{'Found done' if reused else 'Written'}: {path}"), soft_wrap=True)


def balance_table(summary: dict[str, Any]) -> Table:
    """Rows by split, and by label where the labels are a closed set."""
    from rich.table import Table
    from rich.text import Text

    splits = [*summary["rows"]]
    table = Table("", *splits, "all")
    for column in table.columns[1:]:
        column.justify = "right"
    balance: dict[str, dict[str, int]] = summary["balance"] or {}
    for label, counts in islice(balance.items(), LABELS_SHOWN):
        table.add_row(Text(_clip(label)), *(f"{counts[split]:,}" for split in splits), f"{sum(counts.values()):,}")
    if len(balance) > LABELS_SHOWN:
        table.add_row(f"and {len(balance) - LABELS_SHOWN:,} more labels")
    table.add_section()
    total = sum(summary["rows"].values())
    table.add_row("all rows", *(f"{summary['rows'][split]:,}" for split in splits), f"{total:,}", style="bold")
    return table


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """What was read, taken out and why, in sentences."""
    duplicates, overlap, quarantined = (
        summary[key] for key in ("duplicates_removed", "overlap_removed", "quarantined")
    )
    lines = [
        "Read: " + ", ".join(f"{rows:,} rows for {role}" for role, rows in summary["read"].items()) + ".",
        f"Duplicates removed: {duplicates['exact']:,} exact, {duplicates['near']:,} near ({duplicates['why']}).",
    ]
    if len(summary["read"]) > 1:
        lines.append(f"Overlap removed: {overlap['exact']:,} exact, {overlap['near']:,} near ({overlap['why']}).")
    if summary["kept_together"]:
        lines.append(f"Nearly the same, but kept, and in one split with their like: {summary['kept_together']:,} rows.")
    if summary["over_limit"]:
        lines.append(f"Left out by data.limit: {summary['over_limit']:,} rows.")
    reasons = "".join(f"\n  {count:,} × {reason}" for reason, count in quarantined["reasons"].items())
    lines.append(f"Quarantined: {quarantined['total']:,} rows{':' + reasons if reasons else '.'}")
    characters = summary["lengths"]["characters"]
    lines.append(
        f"Length: half of the texts up to {characters['p50']:,} characters, 95 % up to {characters['p95']:,}, "
        f"the longest {characters['max']:,}."
    )
    return lines


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_CHARS else line[: SAMPLE_CHARS - 1] + "…"
