"""``slmops improve``: a candidate out of feedback, and why it was shipped, refused, promoted or sent back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from typer import Context

    from slmops.recipe import Recipe

MAKE = "candidate"
EPILOG = """
Examples:

  slmops improve recipe.yaml --feedback corrections.jsonl    rows with the recipe's columns: what would have been right

  slmops serve .slmops/runs/NAME/bundle --candidate .slmops/runs/NAME/candidate/bundle

  slmops improve why recipe.yaml                             gates, steps and decisions with their numbers
"""


class _MakeUnlessNamed(TyperGroup):
    """``slmops improve RECIPE`` is ``slmops improve candidate RECIPE``."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:  # type: ignore[override]
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [MAKE, *args]
        return super().parse_args(ctx, args)


improve = typer.Typer(
    cls=_MakeUnlessNamed,
    help="Make a better version from feedback, and tell what was decided.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
)
STORE = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept.")
AS_JSON = typer.Option(False, "--json", help="One JSON object on standard output.")


@improve.command(MAKE)
def candidate(
    target: Path = typer.Argument(metavar="RECIPE|BUNDLE", help="The recipe, or a bundle that holds it."),
    feedback: list[Path] = typer.Option(
        ..., "--feedback", help="What slmops feedback wrote, or a file with the recipe's columns; may be repeated."
    ),
    deployed: Path | None = typer.Option(
        None, "--deployed", help="The bundle in use; default: runs/NAME/bundle in the store, or the bundle named."
    ),
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="For example improve.old_loss_points=1"),
    store: Path = STORE,
    out: Path | None = typer.Option(None, "--out", help="Default: runs/NAME/candidate in the store."),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = AS_JSON,
) -> None:
    """Make a candidate of feedback (the default word).

    The same recipe learns the old rows and the corrections, and is judged beside the version in use.

    Exit code 1: a gate does not hold, and no candidate is written.
    """
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError
    from slmops.store import Store

    recipe, used = recipe_of(target, overrides)
    try:
        from slmops.pipeline.improve import improve_recipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops improve (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        result = improve_recipe(
            recipe, opened, feedback, deployed=deployed or used, out=out, offline=offline, progress=progress
        )
    if as_json:
        print_json(result.content)
    else:
        show(result.content, result.folder)
    raise typer.Exit(0 if result.passed else 1)


@improve.command("why")
def why(
    target: Path = typer.Argument(metavar="RECIPE|FOLDER", help="The recipe, a candidate's folder, or a rollout's."),
    store: Path = STORE,
    as_json: bool = AS_JSON,
) -> None:
    """Tell what was decided of a candidate, and by which numbers.

    Its gates beside the version in use, and each step of its rollout with the time and the evidence.
    """
    from slmops.cli.render import print_json

    told = history_of(folder_of(target, store))
    if as_json:
        print_json(told)
        return
    for line in history_in_words(told):
        typer.echo(line)


def recipe_of(target: Path, overrides: Sequence[str]) -> tuple[Recipe, Path | None]:
    """The recipe, and the bundle where ``target`` is one.

    Raises:
        UsageError: the bundle's recipe names files that only its maker has.
    """
    from slmops.errors import UsageError
    from slmops.recipe import load_recipe

    if not target.is_dir():
        return load_recipe(target, overrides), None
    path = target / "recipe.yaml"
    if not path.is_file():
        raise UsageError(f"{target} holds no recipe.yaml.", remedy="Name the recipe, and the bundle by --deployed.")
    recipe = load_recipe(path, overrides)
    for key, model in (("teacher.model", recipe.teacher.model), ("student.model", recipe.student.model)):
        if model is not None and ":" not in model and not Path(model).is_dir() and not recipe.teacher.own:
            raise UsageError(
                f"The recipe in {target} names {key} {model}, a folder of the machine that made it.",
                remedy=f"Name the recipe itself with --deployed {target}, or set {key} to the folder.",
            )
    return recipe, target


def folder_of(target: Path, store: Path) -> Path:
    """Where a candidate's or a rollout's files are.

    Raises:
        ArtifactError: nothing of that kind is there.
    """
    from slmops.errors import ArtifactError
    from slmops.recipe import load_recipe
    from slmops.serve.candidate.book import ROLLOUT

    folder = target if target.is_dir() else store / "runs" / load_recipe(target, []).name / "candidate"
    known = (folder / "improvement.json", folder / "journal.jsonl", folder / ROLLOUT, folder / "state.json")
    if not any(path.exists() for path in known):
        if (folder / "candidate").is_dir():
            return folder_of(folder / "candidate", store)
        if any(folder.glob("*/journal.jsonl")):
            return folder
        raise ArtifactError(
            f"{folder} tells of no candidate.", remedy="Make one: slmops improve RECIPE --feedback FILE."
        )
    return folder


def history_of(folder: Path) -> dict[str, Any]:
    """The improvement, and every rollout below ``folder`` with its journal, the newest last."""
    import json

    from slmops.serve.candidate.book import JOURNAL, Book

    path = folder / "improvement.json"
    improvement = json.loads(path.read_text("utf-8")) if path.is_file() else None
    journals = sorted(folder.rglob(JOURNAL), key=lambda one: one.stat().st_mtime)
    rollouts = []
    for journal in journals:
        book = Book(journal.parent)
        state = book.read()
        rollouts.append(
            {
                "folder": str(journal.parent),
                "stage": None if state is None else state.stage,
                "outcome": None if state is None else state.outcome,
                "requests": None if state is None else state.tally.requests,
                "journal": book.entries(),
            }
        )
    return {"improvement": improvement, "rollouts": rollouts}


def history_in_words(told: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if (improvement := told["improvement"]) is not None:
        lines += [improvement["verdict"], *gates_in_words(improvement)]
    for rollout in told["rollouts"]:
        lines.append(f"rollout, now: {rollout['stage']}")
        lines += [line for entry in rollout["journal"] for line in entry_in_words(entry)]
    return lines


WORDS = {"further": "next step", "over": "took over", "back": "went back", "begun": "began", "resumed": "resumed"}


def entry_in_words(entry: Mapping[str, Any]) -> list[str]:
    """A line of the journal for people; the numbers of each measure below a decision."""
    why_ = f": {entry['why']}" if entry.get("why") else ""
    lines = [f" {entry['at']}  {entry.get('step', '')}: {WORDS.get(entry['event'], entry['event'])}{why_}"]
    for one in entry.get("findings", ()):
        if one["difference"] is not None:
            between = one["interval"]
            held = f", between {100 * between[0]:+.1f} and {100 * between[1]:+.1f}" if between else ""
            allowed, evidence = 100 * one["margin"], f"{one['e_harm']:.3g} of harm, {one['e_proof']:.3g} of no harm"
            shown = f"{one['measure']}: {100 * one['difference']:+.2f} points{held}; allowed -{allowed:g}"
            lines.append(f"     {shown}; e-values {evidence}")
    return lines


def gates_in_words(content: Mapping[str, Any]) -> list[str]:
    lines = []
    for gate in (*content["gates"], *content["failed_gates_of_the_run"]):
        sign = "≥" if gate["direction"] == "at_least" else "≤"
        mark = "✓" if gate["passed"] else "✗"
        lines.append(
            f" {mark} {gate['name']}: {gate['value']:.4g} (limit {sign} {gate['limit']:.4g}) {gate['note']}".rstrip()
        )
    return lines


def show(content: Mapping[str, Any], folder: Path) -> None:
    """The verdict, the gates, what became of the corrections, and what to do next."""
    typer.echo(content["verdict"])
    for line in gates_in_words(content):
        typer.echo(line)
    for reason, rows in content["corrections"]["quarantined"].items():
        typer.echo(f" {rows} corrections kept out: {reason}")
    typer.echo(f"report: {folder / 'report.html'}")
    if content["bundle"]:
        typer.echo(f"candidate: {content['bundle']}")
        typer.echo(f"try it on callers: slmops serve {content['deployed']} --candidate {content['bundle']}")
