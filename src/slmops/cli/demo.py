"""``slmops demo``: the main job on the sample data, served and asked once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

QUESTION = "hi, my parcel was due on tuesday and there is still no sign of it, where is it?"


def demo(
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    offline: bool = typer.Option(False, "--offline", help="Use the model that is on this machine already."),
) -> None:
    """Run the whole way once on the sample data, then serve and ask.

    A teacher is adapted, it teaches a student, which is compressed, measured, packed, served and asked one question.
    Nothing is needed but the installation and, the first time, the package index that holds the base model. The
    second time everything is found done.
    """
    from slmops.cli.run import run_and_show
    from slmops.cli.served_once import ask_served
    from slmops.recipe import parse_recipe

    recipe = parse_recipe(DEMO_RECIPE)
    code = run_and_show(recipe, store, None, offline=offline, as_json=False)
    answer = ask_served(store / "runs" / recipe.name / "bundle", QUESTION)
    typer.echo(f"\nserved it and asked: {QUESTION}\nanswer over HTTP:    {answer['choices'][0]['message']['content']}")
    typer.echo(f"ask it yourself:     slmops chat {store / 'runs' / recipe.name / 'bundle'}")
    raise typer.Exit(code)


DEMO_RECIPE: dict[str, Any] = {
    "name": "support-intents",
    "task": "classification",
    "data": {"train": "sample:support", "input": "{text}", "target": "{intent}"},
    # Some 1,100 training rows: more passes over fewer trained layers, and fewer of the teacher's forms to compare with.
    "teacher": {"adapt_epochs": 4, "frozen_share": 0.5},
    "compress": {"teacher_precisions": ["int8"]},
    "gates": {"retention": 0.7},
}
