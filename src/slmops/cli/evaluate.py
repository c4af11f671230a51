"""``slmops evaluate``: a model on a recipe's test rows, and whether a step changed it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from slmops.evaluate.gates import Gate
    from slmops.pipeline.judge import Judgement

EPILOG = """
Examples:

  slmops evaluate recipe.yaml bundle                              its score, with an interval

  slmops evaluate recipe.yaml merged --against base-and-adapter --step merged

  slmops evaluate recipe.yaml int4 --against fp32 --step quantized
"""


def evaluate(
    recipe: Path = typer.Argument(help="The recipe; its test rows are asked."),
    model: Path = typer.Argument(help="A bundle, a variant, a model folder or a checkpoint."),
    against: Path | None = typer.Option(None, "--against", help="The form before: compare with it."),
    step: str = typer.Option(
        "converted", "--step", help="converted, merged, pruned or quantized: whose limits of gates.drift hold."
    ),
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="For example gates.drift.rows=200"),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Score MODEL on the test rows of RECIPE. With --against, compare it with the form that it was made from: tokens of
    both runtimes, distributions, greedy answers, and the score by a paired test. Exit code 1: a gate does not hold.
    """
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError, UsageError
    from slmops.recipe import load_recipe
    from slmops.store import Store

    chosen = load_recipe(recipe, overrides)
    try:
        from slmops.evaluate.parity import STEPS
        from slmops.pipeline.judge import judge_model
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops evaluate (it needs {error.name})", "train") from None
    kind = next((one for one in STEPS if one == step), None)
    if kind is None:
        raise UsageError(f"--step is {step!r}.", remedy=f"Choose one of {', '.join(STEPS)}.")
    with Store.open(store) as opened, progress_bars() as progress:
        found = judge_model(chosen, opened, model, against=against, step=kind, offline=offline, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        for line in lines(found):
            typer.echo(line)
    raise typer.Exit(0 if found.passed else 1)


def gate_line(gate: Gate) -> str:
    sign = "≥" if gate.direction == "at_least" else "≤"
    return f"{'✓' if gate.passed else '✗'} {gate.name}: {gate.value:.4g} (limit {sign} {gate.limit:.4g})"


def lines(found: Judgement) -> list[str]:
    """The judgement for people."""
    from slmops.cli.run import figure_in_words

    low, high = found.scores.ci95
    told = [f"{found.scores.metric} {found.scores.value:.3f} ({low:.3f}–{high:.3f}) on {found.scores.rows} rows"]
    told += [f"{name}: {figure_in_words(one.to_json())}" for name, one in found.scores.measures.items()]
    if found.parity is None or found.against is None:
        return told + [gate_line(gate) for gate in found.gates]
    told.append(f"before: {found.against.value:.3f}")
    logits, answers = found.parity.logits, found.parity.answers
    told.append(f"same tokens: {100 * found.parity.tokens.share:.1f} % of {found.parity.tokens.texts} texts")
    if logits is not None:
        told.append(
            f"KL {logits.kl_mean:.3g} nats (p95 {logits.kl_p95:.3g}, worst row {logits.worst_row}), likeliest the same "
            f"at {100 * logits.top1_agreement:.1f} % of {logits.positions} positions"
        )
    else:
        told.append(f"distributions: not compared, {found.parity.why_no_logits}")
    if answers is not None:
        first = f"; first other one in row {answers.first['row']}" if answers.first else ""
        told.append(f"same answers: {answers.equal} of {answers.rows}{first}")
    if found.parity.layers is not None:
        told.append(found.parity.layers.sentence)
    told += [gate_line(gate) for gate in found.gates]
    if not found.passed:
        from slmops.evaluate.parity import advice

        told.append(advice(found.parity))
    return told
