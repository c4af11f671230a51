"""``slmops feedback``: from what people said of answers to rows that can be learnt from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def feedback(
    bundle: Annotated[Path, typer.Argument(help="The bundle that answered.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="Write a copy of the rows to this jsonl file.")] = None,
    days: Annotated[float | None, typer.Option(min=0.0, help="Only the last so many days.", show_default="all")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(help="A model on this machine that answers what was called bad and not corrected."),
    ] = None,
    most_per_label: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rows of one label at most.", show_default="three times the median; of a new one as of the old"
        ),
    ] = None,
    near_duplicates: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Similarity from which two texts with one answer count as one.")
    ] = 0.9,
    names: Annotated[str, typer.Option(help="People's names in texts: none, cues, or module:function.")] = "none",
    all_versions: Annotated[
        bool, typer.Option("--all-versions", help="Feedback on answers of other versions too.")
    ] = False,
    store: Annotated[
        Path, typer.Option("--store", envvar="SLMOPS_STORE", help="Where artifacts and events are kept.")
    ] = Path(".slmops"),
    database: Annotated[
        str | None,
        typer.Option(envvar="SLMOPS_EVENTS", help="URL of the events' database.", show_default="a file in the store"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Turn what people said of answers into rows to learn from.

    Corrected answers, confirmed ones, and those of a teacher; redacted, without repeats, balanced. The rows have the
    columns of the bundle's recipe, so a recipe can name the file in data.train. What cannot be learnt from is in
    quarantine.jsonl beside them, with the reason. slmops trace leads from a model back to the events.
    """
    from slmops.artifacts import Bundle
    from slmops.cli.bench import write_text
    from slmops.cli.render import print_json
    from slmops.monitor.log import Window, days_ago
    from slmops.monitor.place import Place
    from slmops.pipeline.feedback import curate_feedback
    from slmops.privacy.names import recognizer
    from slmops.store import Store

    opened, named = Bundle.open(bundle), recognizer(names)
    window = Window(since=None if days is None else days_ago(days), version=None if all_versions else opened.digest)
    with Place.of(store, database=database).open() as log, Store.open(store) as kept:
        made = curate_feedback(
            opened,
            log,
            kept,
            window=window,
            teacher=teacher,
            most_per_label=most_per_label,
            near_duplicates=near_duplicates,
            recognizers=() if named is None else (named,),
        )
    if out is not None:
        write_text(out, made.rows_path.read_text("utf-8"))
    summary = made.summary
    if as_json:
        print_json({"rows": str(made.rows_path), "digest": made.digest, "summary": summary})
        return
    sources = ", ".join(f"{rows} {name}" for name, rows in summary["sources"].items())
    typer.echo(f"{summary['rows']} rows ({sources}); columns: {', '.join(summary['columns'])}.")
    for reason, rows in summary["quarantined"]["reasons"].items():
        typer.echo(f"  left out: {rows}, {reason}")
    for count, why in ((summary["duplicates_removed"], "repeats"), (summary["over_balance"], "over the balance")):
        if count:
            typer.echo(f"  left out: {count}, {why}")
    if summary["new_labels"]:
        typer.echo(f"New labels: {', '.join(summary['new_labels'])}")
    typer.echo(f"rows: {made.rows_path}")
