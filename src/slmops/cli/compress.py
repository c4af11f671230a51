"""``slmops compress``: the forms that a student can be shipped in, measured, and which one meets the budget."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from slmops.recipe import Recipe

SHOWN = ("student", "unpruned")
"""What the ids of the student's forms begin with."""
EPILOG = """
In the recipe:

  compress: {precisions: [fp32, int8, int4]}           what is made and measured

  compress: {formats: [gguf:q4_k_m, openvino:int8]}    for other engines, and olive:FILE for Olive's own passes

  compress: {quantize: [gptq, awq, {size_mb: 40}]}     4 bits by other algorithms; see also bits, block_size,
  symmetric, activations, recover, and compress.calibration for the rows that they look at

  compress: {prune: {depth: 0.25, channels: 0.5}}      what is removed before, and trained again; see also heads,
  hidden, parameters, vocabulary, sparsity, recover

  budget: {device: raspberry-pi-5, size_mb: 20}        what the device can hold; see also memory_mb, latency_ms_p95,
  tokens_per_s

  gates: {retention: 0.95, parity: 0.02}               what quality must stay

Examples:

  slmops compress recipe.yaml                          the table, and which one meets the budget

  slmops compress recipe.yaml --set budget.size_mb=5   the same models, judged by another budget

  slmops compress recipe.yaml --out small              the chosen model, copied to a folder that slmops chat opens

  slmops bench small                                   what it costs here, in more detail
"""


def compress(
    recipe: Path = typer.Argument(help="The recipe; its compress, budget and gates say what is wanted."),
    overrides: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="For example budget.size_mb=10"),
    store: Path = typer.Option(Path(".slmops"), "--store", envvar="SLMOPS_STORE", help="Where artifacts are kept."),
    out: Path | None = typer.Option(None, "--out", help="Copy the chosen model to this folder."),
    offline: bool = typer.Option(False, "--offline", help="Use models and data that are on this machine already."),
    as_json: bool = typer.Option(False, "--json", help="One JSON object on standard output."),
) -> None:
    """Make the student of RECIPE small, and choose the form.

    Every form is converted, compared with the form before, scored on the test rows and measured; the table says which
    meet the budget, and the one that costs the device least is chosen.

    Data, teacher and student are found done, or made first. Where nothing passes, the closest are shown with what each
    would have to give up, and the exit code is 1.
    """
    from slmops.cli.render import print_json
    from slmops.errors import UsageError
    from slmops.recipe import load_recipe

    if out is not None and out.exists() and any(out.iterdir()):
        raise UsageError(f"There is something at {out} already.", remedy="Choose another --out, or delete it.")
    content, chosen = compressed(load_recipe(recipe, overrides), store, offline=offline)
    if out is not None:
        import shutil

        shutil.copytree(chosen, out, dirs_exist_ok=True)
    if as_json:
        print_json({**summary(content), "model": str(out or chosen)})
    else:
        show(content, out or chosen)
    raise typer.Exit(0 if content["passed"] else 1)


def compressed(recipe: Recipe, store: Path, *, offline: bool) -> tuple[dict[str, Any], Path]:
    """The report's content, and the chosen form's model folder."""
    from slmops.artifacts import Report, Variant
    from slmops.cli.render import progress_bars
    from slmops.errors import MissingExtraError
    from slmops.store import Store

    try:
        from slmops.pipeline import run_until
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"slmops compress (it needs {error.name})", "train") from None
    with Store.open(store) as opened, progress_bars() as progress:
        made = run_until(recipe, opened, "evaluate", offline=offline, progress=progress)
        content = Report.open(made["report"].path).content
        return content, Variant.open(opened.find(content["student"]["artifact"]).path).model_path


def summary(content: Mapping[str, Any]) -> dict[str, Any]:
    """What the verb answers to machines: the student's forms, and what was decided."""
    keys = (
        "name",
        "task",
        "metric",
        "machine",
        "budget",
        "candidates",
        "drift",
        "closest",
        "gates",
        "passed",
        "verdict",
    )
    forms = [variant for variant in content["variants"] if variant["id"].startswith(SHOWN)]
    pruned = {"pruned": content["pruned"]} if "pruned" in content else {}
    return {**{key: content[key] for key in keys}, **pruned, "variants": forms, "chosen": content["student"]["id"]}


def show(content: Mapping[str, Any], model: Path) -> None:
    """The table of forms; what fails; what was chosen and why."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from slmops.cli.run import bytes_in_words

    console = Console(highlight=False)
    judged = {one["id"]: one for one in content["candidates"]}
    drift = {step["after"]: step for step in content["drift"]}
    title = f"{content['name']}: {content['metric']} on {content['student']['score']['rows']} test rows"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("form", no_wrap=True)
    for heading in ("size", content["metric"], "p50 / p95 ms", "memory", "KL", "top-1", "gates"):
        table.add_column(heading, justify="right", overflow="fold")
    for entry in content["variants"]:
        if not entry["id"].startswith(SHOWN):
            continue
        logits = (drift.get(entry["id"]) or {}).get("logits")
        failed = [gate for gate in judged.get(entry["id"], {}).get("gates", ()) if not gate["passed"]]
        chosen = entry["id"] == content["student"]["id"]
        table.add_row(
            entry["id"].removeprefix("student-") + (" *" if chosen else ""),
            bytes_in_words(entry["size_bytes"]),
            f"{entry['score']['value']:.3f}",
            f"{entry['latency_ms']['p50']:.3g} / {entry['latency_ms']['p95']:.3g}",
            bytes_in_words(entry["memory_bytes_peak"]),
            nats(logits["kl_mean"]) if logits else "",
            f"{100 * logits['top1_agreement']:.1f} %" if logits else "",
            "" if entry["id"] not in judged else f"✗ {len(failed)}" if failed else "✓",
            style="bold" if chosen else None,
        )
    console.print(table)
    for line in removed(content):
        console.print(line, markup=False)
    for one in content["candidates"]:
        for gate in one["gates"]:
            if not gate["passed"]:
                sign = "≥" if gate["direction"] == "at_least" else "≤"
                console.print(
                    f" ✗ {one['id']}: {gate['name']} is {gate['value']:.4g}, limit {sign} {gate['limit']:.4g}. "
                    f"{gate['note']}",
                    markup=False,
                )
    for step in content["drift"]:
        if step["advice"]:
            console.print(f" {step['before']} → {step['after']}: {step['where']} {step['advice']}", markup=False)
    for line in estimates(content):
        console.print(line, markup=False)
    for sentence in content["closest_in_words"]:
        console.print(sentence, markup=False)
    console.print(why(content), markup=False)
    console.print(f"model: {model}", markup=False, soft_wrap=True)


def removed(content: Mapping[str, Any]) -> list[str]:
    """What was pruned, in words; nothing where nothing was."""
    pruned = content.get("pruned")
    if pruned is None:
        return []
    shape = (
        f"{pruned['layers']} layers, {pruned['heads']} heads in {pruned['groups']} groups, "
        f"{pruned['channels']} channels, hidden size {pruned['hidden']}, {pruned['tokens']:,} tokens"
    )
    lines = [f" pruned: {100 * pruned['removed']:.0f} % of the parameters are gone; {shape}."]
    if pruned.get("zeros"):
        lines.append(f" {100 * pruned['zeros']:.0f} % of the layers' weights are zero. {' '.join(pruned['notes'])}")
    return lines


def nats(value: float) -> str:
    return "0" if value < 1e-6 else f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"


def estimates(content: Mapping[str, Any]) -> list[str]:
    """A line a form for the budget's device; none where it names none."""
    lines = []
    for entry in content["variants"]:
        there = entry.get("on_device")
        if there and entry["id"].startswith("student-") and entry["id"] != "student-torch":
            p95, tokens = there["latency_ms"]["p95"], there["tokens_per_s"]
            speed = f", {tokens['value']:.3g} tokens/s ({tokens['low']:.3g}–{tokens['high']:.3g})" if tokens else ""
            lines.append(
                f" ≈ {entry['id']} on {there['device']}, an estimate: p95 {p95['value']:.3g} ms "
                f"({p95['low']:.3g}–{p95['high']:.3g}){speed}, {100 * there['memory_share']:.0f} % of its memory"
            )
    return lines


def why(content: Mapping[str, Any]) -> str:
    """One sentence about the choice."""
    chosen = content["student"]["id"]
    passing = [one["id"] for one in content["candidates"] if one["passed"]]
    if not passing:
        return f"{chosen} is packed by slmops run all the same: it fails the fewest gates."
    if len(passing) == 1:
        return f"{chosen} is the one form that passes all gates."
    return f"{chosen} is chosen of {len(passing)} forms that pass all gates: its bytes times its p50 are the least."
