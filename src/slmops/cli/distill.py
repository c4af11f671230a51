"""``slmops distill``: rows, a teacher, its answers; or what they would cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from slmops.distill import Estimate
    from slmops.recipe import Recipe


def distill(
    recipe: Path = typer.Argument(help="The recipe."),
    overrides: list[str] = typer.Option(
        [], "--set", metavar="KEY=VALUE", help="Change one key of the recipe, for example --set teacher.samples=3"
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Ask nobody; say how much asking would take."),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Ask the teacher, check its answers, keep the good ones.

    Answers are kept as they come: a run that was stopped asks for the rest, and slmops run finds what was done.
    """
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError
    from slmops.recipe import load_recipe
    from slmops.store import Store

    try:
        from slmops.pipeline import distill_recipe, estimate_recipe
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops distill (it needs {error.name})", "train") from None
    chosen = load_recipe(recipe, overrides)
    told: dict[str, Any] = {"name": chosen.name, "task": chosen.task, "teacher": chosen.teacher.model}
    if dry_run:
        with Store.open(store) as opened, progress_bars() as progress:
            estimated = estimate_recipe(chosen, opened, offline=offline, progress=progress)
        if as_json:
            print_json({**told, "dry_run": True, "estimate": None if estimated is None else estimated.to_json()})
        else:
            _say(estimate_lines(chosen, estimated))
        return
    with Store.open(store) as opened, progress_bars() as progress:
        answers, reused = distill_recipe(chosen, opened, offline=offline, progress=progress)
    summary = answers.summary["teacher"]
    if as_json:
        place = {"path": str(answers.path), "digest": answers.digest, "reused": reused}
        print_json({**told, "dry_run": False, **place, "summary": summary})
    else:
        _say([*answer_lines(summary), f"{'Found done' if reused else 'Written'}: {answers.path}"])


def estimate_lines(recipe: Recipe, estimated: Estimate | None) -> list[str]:
    """The estimate in sentences."""
    teacher = recipe.teacher
    if estimated is None:
        return [f"{teacher.model} gives its distribution over the labels on this machine: no request, no cost."]
    lines = [
        f"Teacher: {teacher.model}. {estimated.rows:,} rows, {estimated.requests:,} requests to ask, "
        f"{estimated.known:,} answered before.",
        f"Tokens in:  about {estimated.prompt_tokens:,}, at most {estimated.prompt_tokens_most:,}.",
        f"Tokens out: about {estimated.completion_tokens:,}, at most {estimated.completion_tokens_most:,}.",
    ]
    if not teacher.remote and estimated.money == 0:
        lines.append("Money:      none, it runs on this machine.")
    elif estimated.money is None:
        lines.append("Money:      not known; give teacher.prices.")
    else:
        most = f"at most {estimated.money_most:.4f}"
        lines.append(f"Money:      about {estimated.money:.4f}, {most} {estimated.currency or ''}".rstrip() + ".")
    if teacher.remote:
        lines.append(f"Time:       about {_duration(estimated.time_s)} at 40 tokens/s, {teacher.concurrency} at once.")
    if not estimated.fits:
        lines.append(
            "This may not fit in teacher.budget_tokens, budget_money or time_limit_s: the run would stop there."
        )
    return lines


def answer_lines(summary: Mapping[str, Any]) -> list[str]:
    """What came of asking, in sentences."""
    if "accepted" not in summary:
        shares = ", ".join(
            f"{share:.1%} on {split}" for split, share in summary["agreement_with_gold"].items() if share is not None
        )
        return [f"Asked: {summary['asked']:,} texts.", *([f"Agrees with gold: {shares}."] if shares else [])]
    lines = [f"Asked: {summary['asked']:,} rows, {summary['accepted']:,} good ({summary['success_ratio']:.1%})."]
    bad = {**summary["rejected"], **{f"failed: {kind}": count for kind, count in summary["failures"].items()}}
    lines += [f"  {count:,} × {reason.replace('_', ' ')}" for reason, count in bad.items()]
    if (new := summary.get("new_prompts")) is not None:
        lines.append(
            f"New texts: {new['kept']:,} kept of {new.get('written', 0):,}, {new['accepted']:,} answered well."
        )
    if (balance := summary.get("balance")) is not None:
        missing = f"; nobody has {', '.join(balance['missing'][:5])}" if balance["missing"] else ""
        lines.append(f"Balance of labels: {balance['evenness']:.2f} of 1{missing}.")
    if (spread := summary.get("answer_diversity")) is not None:
        lines.append(f"Answers: {spread['distinct_texts']:,} different of {spread['texts']:,}.")
    spent = summary["spent"]
    cost = f", {spent['money']:.4f} {spent['currency']}" if "money" in spent else ""
    lines.append(f"Tokens: {spent['prompt_tokens']:,} in, {spent['completion_tokens']:,} out{cost}.")
    return lines


def _say(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
