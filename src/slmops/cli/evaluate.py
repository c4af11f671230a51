"""``slmops evaluate``: a model on a recipe's test rows and on benchmarks, and whether a step changed it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from slmops.evaluate.gates import Gate
    from slmops.evaluate.ratings import RatingResult
    from slmops.pipeline.judge import Judgement

EPILOG = """
Examples:

  slmops evaluate recipe.yaml bundle                              its score, with an interval

  slmops evaluate recipe.yaml merged --against base-and-adapter --step merged

  slmops evaluate recipe.yaml int4 --against fp32 --step quantized

  slmops evaluate bundle --benchmark boolq.yaml --benchmark arc_easy --against base

  slmops evaluate recipe.yaml student --against teacher --rate form.html      a form for people

  slmops evaluate --ratings ratings-ann.json --ratings ratings-bo.json        what they said
"""


def evaluate(
    recipe: Path | None = typer.Argument(
        None, help="The recipe; its test rows are asked. Left out: MODEL comes first, and benchmarks are asked alone."
    ),
    model: Path | None = typer.Argument(None, help="A bundle, a variant, a model folder or a checkpoint."),
    against: Path | None = typer.Option(None, "--against", help="The form before: compare with it."),
    step: str = typer.Option(
        "converted", "--step", help="converted, merged, pruned or quantized: whose limits of gates.drift hold."
    ),
    benchmarks: list[str] = typer.Option(
        [],
        "--benchmark",
        metavar="NAME|FILE.yaml",
        help="Ask this, too: a file with a section as in evaluate.benchmarks, or a task of lm-evaluation-harness.",
    ),
    rate: Path | None = typer.Option(
        None, "--rate", metavar="FORM.html", help="Write a form on which people rate answers, blind; ask nothing else."
    ),
    rate_as: str | None = typer.Option(
        None,
        "--rate-as",
        metavar="pairs|scores",
        help="Side by side, or from 1 to 5; pairs where there are two models.",
    ),
    rate_rows: int = typer.Option(
        30, "--rate-rows", min=1, help="Test rows on the form, drawn with the recipe's seed."
    ),
    ratings: list[Path] = typer.Option(
        [], "--ratings", metavar="FILE", help="A filled form (json, csv or jsonl); again for each rater."
    ),
    key: Path | None = typer.Option(None, "--key", help="The form's key; default: the one beside the first --ratings."),
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="For example gates.drift.rows=200"),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Score MODEL on the test rows of RECIPE, and on benchmarks. With --against, compare it with the form that it was
    made from: tokens of both runtimes, distributions, greedy answers, and the scores by paired tests. With --rate,
    write a form for people; with --ratings, tell what they said. Exit code 1: a gate does not hold.
    """
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import MissingExtraError, UsageError
    from slmops.store import Store

    try:
        from slmops.evaluate.parity import STEPS
        from slmops.pipeline.judge import judge_by_benchmarks, judge_model
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops evaluate (it needs {error.name})", "train") from None
    kind = next((one for one in STEPS if one == step), None)
    if kind is None:
        raise UsageError(f"--step is {step!r}.", remedy=f"Choose one of {', '.join(STEPS)}.")
    if ratings:
        raise typer.Exit(show_ratings(ratings, key, as_json=as_json))
    if recipe is None:
        raise UsageError("Nothing was named.", remedy="Name a recipe and a model, or a model and a --benchmark.")
    asked = benchmark_sections(benchmarks)
    chosen = None if model is None else chosen_recipe(recipe, overrides, asked)
    if chosen is None and not asked:
        raise UsageError(
            f"{recipe} is all that was named.",
            remedy="Name a recipe and a model, or a model and a --benchmark.",
        )
    if rate is not None:
        if chosen is None or model is None:
            raise UsageError("--rate asks a recipe's test rows.", remedy="Name the recipe before the model.")
        raise typer.Exit(
            write_form(chosen, store, model, rate, against, rate_as, rate_rows, offline=offline, as_json=as_json)
        )
    with Store.open(store) as opened, progress_bars() as progress:
        if chosen is None or model is None:
            found = judge_by_benchmarks(asked, opened, recipe, against=against, offline=offline, progress=progress)
        else:
            found = judge_model(chosen, opened, model, against=against, step=kind, offline=offline, progress=progress)
    if as_json:
        print_json(found.to_json())
    else:
        for line in lines(found):
            typer.echo(line)
    raise typer.Exit(0 if found.passed else 1)


def write_form(
    recipe: Any,
    store: Path,
    model: Path,
    page: Path,
    against: Path | None,
    kind: str | None,
    rows: int,
    *,
    offline: bool,
    as_json: bool,
) -> int:
    """Write the form for people and say what to do with it."""
    from slmops.cli.render import print_json, progress_bars
    from slmops.errors import UsageError
    from slmops.evaluate.rating_form import FORM_KINDS
    from slmops.pipeline.ratings import write_rating_form
    from slmops.store import Store

    wanted = next((one for one in FORM_KINDS if one == kind), None)
    if kind is not None and wanted is None:
        raise UsageError(f"--rate-as is {kind!r}.", remedy=f"Choose {' or '.join(FORM_KINDS)}.")
    with Store.open(store) as opened, progress_bars() as progress:
        form, files = write_rating_form(
            recipe, opened, model, page, against=against, kind=wanted, rows=rows, offline=offline, progress=progress
        )
    if as_json:
        print_json({"form": form.id, "kind": form.kind, "items": len(form.items), "files": [str(one) for one in files]})
        return 0
    page, table, lines_file, secret = files
    typer.echo(f"{len(form.items)} {'pairs' if form.kind == 'pairs' else 'answers'} to rate: {page}")
    typer.echo(f"the same for a spreadsheet: {table}, {lines_file}")
    typer.echo(f"whose answers they are, not for raters: {secret}")
    typer.echo(f"then: slmops evaluate --ratings FILE --key {secret}")
    return 0


def show_ratings(files: list[Path], key: Path | None, *, as_json: bool) -> int:
    """Tell what people said."""
    from slmops.cli.render import print_json
    from slmops.pipeline.ratings import read_rating_forms

    found = read_rating_forms(files, key=key)
    if as_json:
        print_json(found.to_json())
        return 0
    for line in rating_lines(found):
        typer.echo(line)
    return 0


def rating_lines(found: RatingResult) -> list[str]:
    """Ratings for people."""
    from slmops.evaluate.gates import p_in_words

    pairs = found.kind == "pairs"
    told = [f"{found.items} items rated by {len(found.raters)}: {', '.join(found.raters)}; {found.unrated} by nobody"]
    for name, mean, (low, high) in zip(found.models, found.means, found.intervals, strict=True):
        figure = (
            f"preferred in {100 * mean:.1f} % ({100 * low:.1f}–{100 * high:.1f})"
            if pairs
            else (f"{mean:.2f} of 5 ({low:.2f}–{high:.2f})")
        )
        told.append(f"{name}: {figure}")
    if pairs:
        told.append(f"first {found.counts['first']}, alike {found.counts['same']}, second {found.counts['second']}")
    if found.test is not None:
        noise = "beyond noise" if found.test.significant else "within noise"
        told.append(f"The difference is {noise} ({p_in_words(found.test.p_value)}, paired bootstrap over items).")
    kappa = (
        "not known: no two raters rated the same items in different ways"
        if found.kappa is None
        else (f"kappa {found.kappa:.2f}")
    )
    told.append(f"agreement of the raters: {kappa}")
    return told + [f"{one.rater} on {one.item}: {one.comment}" for one in found.comments]


def benchmark_sections(named: list[str]) -> list[Any]:
    """What was named, files looked for where the command runs."""
    from slmops.recipe import anchored_benchmark

    return [anchored_benchmark(one, Path.cwd()) for one in named]


def chosen_recipe(path: Path, overrides: list[str], benchmarks: list[Any]) -> Any:
    """The recipe at ``path``, asking ``benchmarks`` besides its own."""
    from slmops.recipe import load_recipe, recipe_json, with_values

    loaded = load_recipe(path, overrides)
    if not benchmarks:
        return loaded
    return with_values(loaded, {"evaluate.benchmarks": [*recipe_json(loaded)["evaluate"]["benchmarks"], *benchmarks]})


def gate_line(gate: Gate) -> str:
    sign = "≥" if gate.direction == "at_least" else "≤"
    return f"{'✓' if gate.passed else '✗'} {gate.name}: {gate.value:.4g} (limit {sign} {gate.limit:.4g})"


def lines(found: Judgement) -> list[str]:
    """The judgement for people."""
    told = [*score_lines(found), *benchmark_lines(found.benchmarks), *parity_lines(found)]
    told += [gate_line(gate) for gate in found.gates]
    if not found.passed and found.parity is not None:
        from slmops.evaluate.parity import advice

        told.append(advice(found.parity))
    return told


def score_lines(found: Judgement) -> list[str]:
    """The task's score, the user's own measures, and the score of the form before."""
    from slmops.cli.run import figure_in_words

    if found.scores is None:
        return []
    low, high = found.scores.ci95
    told = [f"{found.scores.metric} {found.scores.value:.3f} ({low:.3f}–{high:.3f}) on {found.scores.rows} rows"]
    told += [f"{name}: {figure_in_words(one.to_json())}" for name, one in found.scores.measures.items()]
    return told if found.against is None else [*told, f"before: {found.against.value:.3f}"]


def benchmark_lines(benchmarks: Mapping[str, Any]) -> list[str]:
    """A line a benchmark, and a line below for each model beside it."""
    from slmops.cli.run import figure_in_words
    from slmops.evaluate.gates import p_in_words

    told = []
    for name, one in benchmarks.items():
        ours, *others = one["models"].items()
        told.append(f"{name}: {one['metric']} {figure_in_words(ours[1])} on {ours[1]['rows']} questions")
        for who, score in others:
            test = one["tests"][who]
            noise = "beyond noise" if test["significant"] else "within noise"
            told.append(f"  {who}: {figure_in_words(score)}, {noise} ({p_in_words(test['p_value'])})")
    return told


def parity_lines(found: Judgement) -> list[str]:
    """How far the step moved the model."""
    if found.parity is None:
        return []
    logits, answers = found.parity.logits, found.parity.answers
    told = [f"same tokens: {100 * found.parity.tokens.share:.1f} % of {found.parity.tokens.texts} texts"]
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
    return told
