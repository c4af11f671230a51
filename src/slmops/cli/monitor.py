"""``slmops monitor``: what a served model does, from the events on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from slmops.monitor.ledger import Prices
    from slmops.monitor.log import EventLog, Window
    from slmops.monitor.place import Place
    from slmops.monitor.reference import Reference

monitor = typer.Typer(
    help="Watch a served model: figures, drift, alerts, cost.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog="Events are recorded by: slmops serve BUNDLE --monitor off|sampled|full|POLICY.yaml",
)

Store = Annotated[Path, typer.Option("--store", envvar="SLMOPS_STORE", help="Where artifacts and events are kept.")]
Database = Annotated[
    str | None,
    typer.Option(envvar="SLMOPS_EVENTS", help="URL of the events' database.", show_default="a file in the store"),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Days = Annotated[float | None, typer.Option(min=0.0, help="Only the last so many days.", show_default="all")]
OptionalBundle = Annotated[
    Path | None, typer.Argument(help="The bundle that is served: its version alone, against its own reference.")
]
Model = Annotated[str | None, typer.Option(help="Only the model that callers name so.", show_default="all")]
Slice = Annotated[str | None, typer.Option("--slice", metavar="KEY=VALUE", help="Only requests of this slice.")]
Alpha = Annotated[float, typer.Option(min=0.0001, max=0.5, help="Chance of a false alarm in one check.")]
Rows = Annotated[int, typer.Option(min=50, help="Newest requests that are compared.")]
STORE = Path(".slmops")


@monitor.command("status")
def status(store: Store = STORE, database: Database = None, as_json: AsJson = False) -> None:
    """Tell what is recorded, by which servers, and what is missing."""
    place = place_of(store, database)
    with place.open() as log:
        found: dict[str, Any] = {
            "place": log.place,
            **log.counts(),
            "versions": log.versions(),
            "sessions": log.sessions()[-20:],
            "gaps": log.gaps(),
        }
    if as_json:
        print_json(found)
        return
    from slmops.monitor.page import moment

    typer.echo(f"{found['place']}: {found['events']:,} events, {found['feedback']:,} with feedback.")
    for one in found["versions"]:
        name = " ".join(part for part in (one["model"] or "(no name)", one["version"][:12], one["adapter"]) if part)
        typer.echo(f"  {name}: {one['events']:,} events, {moment(one['first_at'])} to {moment(one['last_at'])} UTC")
    running = [one for one in found["sessions"] if one["closed_at"] is None]
    typer.echo(f"{len(running)} of the last {len(found['sessions'])} servers still record, or ended without a word.")
    for gap in found["gaps"]:
        lost = "an unknown number of" if gap["lost"] is None else f"{gap['lost']:,}"
        typer.echo(
            f"  missing: {lost} events, {moment(gap['from_at'])} to {moment(gap['until_at'])} UTC: {gap['reason']}"
        )


@monitor.command("report")
def report(
    bundle: OptionalBundle = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.")] = None,
    days: Days = None,
    model: Model = None,
    slice_: Slice = None,
    alpha: Alpha = 0.01,
    rows: Rows = 500,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Show figures, groups, drift and gaps."""
    chosen = Chosen.of(bundle, days, model, slice_)
    with place_of(store, database).open() as log:
        content = content_of(log, chosen, alpha, rows)
        cost = cost_of(log, chosen, bundle)
    if html is not None:
        from slmops.cli.bench import write_text
        from slmops.monitor.page import render_page

        write_text(html, render_page(content, title=chosen.title(content), ledger=cost))
    if as_json:
        print_json(content)
        return
    show_report(content)
    if html is not None:
        typer.echo(f"Written: {html}")


@monitor.command("drift")
def drift(
    bundle: OptionalBundle = None,
    days: Days = None,
    model: Model = None,
    slice_: Slice = None,
    alpha: Alpha = 0.01,
    rows: Rows = 500,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Tell whether traffic still looks like the rows the model was judged on.

    Exit code 1 where it does not. Without a bundle, or with one that has no reference, the newest requests are compared
    with the first ones.
    """
    chosen = Chosen.of(bundle, days, model, slice_)
    with place_of(store, database).open() as log:
        found = content_of(log, chosen, alpha, rows)["drift"]
    if as_json:
        print_json(found or {"alarm": False, "sentence": NOTHING, "rows": 0, "views": []})
    else:
        show_drift(found)
    if found and found["alarm"]:
        raise typer.Exit(1)


@monitor.command("alerts")
def alerts(
    rules: Annotated[Path, typer.Argument(help="A YAML file: rules, window_hours, webhook.")],
    bundle: OptionalBundle = None,
    every: Annotated[float | None, typer.Option(min=1, help="Check again after so many seconds, for ever.")] = None,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Check rules on the figures, and tell a webhook what has changed.

    Exit code 1 where a rule fires. Nothing is sent unless the file names a webhook; what is sent holds no text.
    """
    import time

    from slmops.monitor.alerts import load_rules

    told = load_rules(rules)
    place = place_of(store, database)
    while True:
        firing = check_rules(told, place, bundle)
        if as_json:
            print_json({"firing": firing})
        else:
            for one in firing:
                typer.echo(f"{one['rule']}: {one['value']:.4g} ({one['rows']:,} rows)")
            if not firing:
                typer.echo(f"None of {len(told.rules)} rules fires.")
        if every is None:
            break
        time.sleep(every)
    if firing:
        raise typer.Exit(1)


@monitor.command("judge")
def judge(
    recipe: Annotated[Path, typer.Argument(help="A recipe: its teacher.judge or teacher is asked, as privacy allows.")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the answers whose texts were kept.")] = 0.05,
    most: Annotated[int, typer.Option(min=1, help="Answers at most.")] = 200,
    names: Annotated[str, typer.Option(help="People's names: none, cues, or module:function.")] = "none",
    days: Days = None,
    model: Model = None,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Let a teacher score a share of the answers, from 1 to 5."""
    from slmops.cli.render import progress_bars
    from slmops.pipeline.judging import judge_answers
    from slmops.privacy.names import recognizer
    from slmops.recipe import load_recipe

    named = recognizer(names)
    with place_of(store, database).open() as log, progress_bars() as progress:
        judged = judge_answers(
            load_recipe(recipe),
            log,
            window=window_of(days, model, None),
            share=share,
            most=most,
            recognizers=() if named is None else (named,),
            progress=progress,
        )
    if as_json:
        print_json(judged.to_json())
        return
    mean = "" if judged.mean is None else f", {judged.mean:.2f} of 5 on the mean"
    typer.echo(f"{judged.judge} scored {judged.scored} of {judged.asked} answers{mean}.")


@monitor.command("export")
def export(
    out: Annotated[Path, typer.Argument(help="Folder for events, feedback and judgements as Parquet files.")],
    days: Days = None,
    model: Model = None,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Write events to Parquet files. What is exported is out of reach of forget and prune."""
    from slmops.monitor.export import export_parquet

    with place_of(store, database).open() as log:
        written = export_parquet(log, out, window_of(days, model, None))
    if as_json:
        print_json({"folder": str(out), **written})
        return
    typer.echo(f"Written to {out}: " + ", ".join(f"{rows:,} {name}" for name, rows in written.items()))


@monitor.command("forget")
def forget(
    subject: Annotated[str, typer.Argument(help="The person, as callers named them in user or X-Slmops-Subject.")],
    key: Annotated[
        Path | None, typer.Option(help="File with the key of subjects' hashes.", show_default="the store's")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Delete all that is kept of a person, from the file too.

    Events, feedback, scores, and rows made of them by slmops feedback. Data sets and models that were made of such rows
    are named, and stay: retrain without them. Exports and backups are out of reach.
    """
    from slmops.errors import UsageError
    from slmops.pipeline.feedback import remove_derived
    from slmops.privacy import SubjectKey

    place = place_of(store, database)
    path = key or place.folder / "subject.key"
    with place.open() as log:
        if not path.exists():
            raise UsageError(f"There is no {path}, so nobody can be found.", remedy="Name the key with --key.")
        hashed = SubjectKey.at(path).hash(subject)
        ids = log.ids_of(hashed)
        if not (yes or as_json):
            typer.confirm(f"Delete {len(ids)} events of this person and all that belongs to them?", abort=True)
        derived, later = remove_derived(store, [*ids, *(one["event"] for one in log.said_by(hashed))])
        removed = log.forget(hashed)
    found = {**removed.to_json(), "derived": derived, "made_from_them": later}
    if as_json:
        print_json(found)
        return
    typer.echo(
        f"Deleted: {removed.events} events, {removed.feedback} feedback, {removed.judgements} scores, "
        f"{len(derived)} sets of rows made of them."
    )
    for name in later:
        typer.echo(f"  made from them and still there: {name}", err=True)


@monitor.command("prune")
def prune(
    days: Annotated[float, typer.Option(min=0.0, help="Delete what is older.")] = 30,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Delete old events now, and give their room back. A server that records prunes by its policy each hour."""
    from slmops.monitor.log import days_ago

    with place_of(store, database).open() as log:
        removed = log.prune(days_ago(days), compact=True)
    if as_json:
        print_json(removed.to_json())
        return
    typer.echo(f"Deleted: {removed.events} events, {removed.feedback} feedback, {removed.judgements} scores.")


@monitor.command("ledger")
def ledger(
    bundle: OptionalBundle = None,
    teacher_input: Annotated[
        float | None,
        typer.Option(min=0.0, help="Teacher's price of a million tokens read.", show_default="the recipe's"),
    ] = None,
    teacher_output: Annotated[float | None, typer.Option(min=0.0, help="The same for tokens written.")] = None,
    machine_hour: Annotated[float, typer.Option(min=0.0, help="Price of an hour of the serving machine.")] = 0.0,
    training_hour: Annotated[float, typer.Option(min=0.0, help="Price of an hour of training.")] = 0.0,
    training_hours: Annotated[
        float | None, typer.Option(min=0.0, help="Hours it took.", show_default="the run's report.json")
    ] = None,
    kwh: Annotated[float, typer.Option(min=0.0, help="Price of a kilowatt hour, where the machine tells them.")] = 0.0,
    currency: Annotated[str | None, typer.Option(help="What the prices are in.", show_default="the recipe's")] = None,
    days: Days = None,
    model: Model = None,
    store: Store = STORE,
    database: Database = None,
    as_json: AsJson = False,
) -> None:
    """Tell what was served, what it cost, what the teacher would have cost, and when training is paid for."""
    from slmops.monitor.ledger import Prices

    known = known_prices(bundle)
    prices = Prices(
        teacher_input=known.get("input_per_million") if teacher_input is None else teacher_input,
        teacher_output=known.get("output_per_million") if teacher_output is None else teacher_output,
        machine_hour=machine_hour,
        training_hour=training_hour,
        training_s=training_seconds(bundle) if training_hours is None else 3600 * training_hours,
        kwh=kwh,
        currency=currency or str(known.get("currency") or ""),
    )
    chosen = Chosen.of(bundle, days, model, None)
    with place_of(store, database).open() as log:
        found = ledger_of(log, chosen, prices)
    if as_json:
        print_json(found)
        return
    show_ledger(found)


# --- what the verbs share -----------------------------------------------------------------------------------------

NOTHING = "There is nothing to compare this traffic with yet."


def print_json(value: Any) -> None:
    from slmops.cli.render import print_json as out

    out(value)


def place_of(store: Path, database: str | None) -> Place:
    from slmops.monitor.place import Place

    return Place.of(store, database=database)


def window_of(days: float | None, model: str | None, slice_: str | None, version: str | None = None) -> Window:
    from slmops.errors import UsageError
    from slmops.monitor.log import Window, days_ago

    key, separator, value = (slice_ or "").partition("=")
    if slice_ and not separator:
        raise UsageError(f"--slice {slice_} is no KEY=VALUE.", remedy="For example --slice tenant=acme")
    since = None if days is None else days_ago(days)
    return Window(since=since, model=model, version=version, slice=(key, value) if slice_ else None)


@dataclass(frozen=True)
class Chosen:
    """What is looked at, and what it is compared with."""

    window: Window
    reference: Reference | None
    name: str

    @classmethod
    def of(cls, bundle: Path | None, days: float | None, model: str | None, slice_: str | None) -> Chosen:
        if bundle is None:
            return cls(window_of(days, model, slice_), None, "")
        from slmops.monitor.reference import read_reference
        from slmops.package.resolve import artifact_around, resolve_model_folder
        from slmops.runtime.description import ModelDescription

        name = ModelDescription.read(resolve_model_folder(bundle)).name
        artifact = artifact_around(bundle)
        window = window_of(days, model, slice_, artifact.digest if artifact else None)
        return cls(window, read_reference(artifact.path) if artifact else None, name)

    def title(self, content: Mapping[str, Any]) -> str:
        return self.name or ", ".join(content["window"]["models"]) or "Nothing served yet"


def content_of(log: EventLog, chosen: Chosen, alpha: float, rows: int) -> dict[str, Any]:
    from slmops.monitor.summary import watched

    return watched(log, chosen.window, reference=chosen.reference, alpha=alpha, drift_rows=rows)


def check_rules(rules: Any, place: Place, bundle: Path | None) -> list[dict[str, Any]]:
    """The rules that fire now; a webhook has heard of what has changed since the last time."""
    import json

    from slmops.monitor.alerts import changes, firing, send
    from slmops.monitor.summary import measured

    chosen = Chosen.of(bundle, rules.window_hours / 24, None, None)
    with place.open() as log:
        content = content_of(log, chosen, 0.01, 500)
    now = firing(rules.rules, measured(content))
    memory = place.folder / "alerts.json"
    before = json.loads(memory.read_text("utf-8")) if memory.exists() else []
    begun, ended = changes(before, now)
    if rules.webhook is not None and (begun or ended):
        sentence = content["drift"]["sentence"] if content["drift"] else ""
        body = {"source": "slmops", "model": chosen.title(content), "firing": [one.to_json() for one in begun]}
        send(rules.webhook, {**body, "ended": ended, "drift": sentence})
    memory.parent.mkdir(parents=True, exist_ok=True)
    memory.write_text(json.dumps([one.rule for one in now]), "utf-8")
    return [one.to_json() for one in now]


def ledger_of(log: EventLog, chosen: Chosen, prices: Prices) -> dict[str, Any]:
    from slmops.monitor.ledger import ledger as computed
    from slmops.monitor.ledger import use_of

    columns = ("at", "status", "latency_ms", "prompt_tokens", "completion_tokens")
    return computed(use_of(log.events(chosen.window, *columns), log.sessions()), prices)


def cost_of(log: EventLog, chosen: Chosen, bundle: Path | None) -> dict[str, Any] | None:
    """The ledger by the prices in a bundle's recipe; None where it has none."""
    from slmops.monitor.ledger import Prices

    known = known_prices(bundle)
    if not known:
        return None
    teacher = known["input_per_million"], known["output_per_million"]
    return ledger_of(log, chosen, Prices(*teacher, currency=str(known.get("currency") or "")))


def known_prices(bundle: Path | None) -> Mapping[str, Any]:
    """The teacher's prices in the recipe of a bundle; nothing where it has none."""
    import yaml

    path = None if bundle is None else bundle / "recipe.yaml"
    if path is None or not path.is_file():
        return {}
    teacher = (yaml.safe_load(path.read_text("utf-8")) or {}).get("teacher")
    prices = teacher.get("prices") if isinstance(teacher, dict) else None
    return prices if isinstance(prices, dict) else {}


def training_seconds(bundle: Path | None) -> float:
    """What the run took that made a bundle, by the report beside it; 0 where there is none."""
    import json

    path = None if bundle is None else bundle.resolve().parent / "report.json"
    if path is None or not path.is_file():
        return 0.0
    return float(sum((json.loads(path.read_text("utf-8")).get("wall_s") or {}).values()))


# --- for people ---------------------------------------------------------------------------------------------------


def show_report(content: Mapping[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from slmops.monitor.page import NAMES, figure

    console = Console(highlight=False)
    groups = {"all": content["figures"], **content["groups"]}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in groups:
        table.add_column(name[:28], justify="right")
    for key, told in NAMES.items():
        table.add_row(told, *(figure(one[key], key) for one in groups.values()))
    console.print(table)
    show_drift(content["drift"])
    for gap in content["gaps"]:
        console.print(f"Missing: {gap['reason']}.", markup=False)


def show_drift(found: Mapping[str, Any] | None) -> None:
    if found is None:
        typer.echo(NOTHING)
        return
    typer.echo(found["sentence"])
    for view in found["views"]:
        sign = "▲" if view["alarm"] else " "
        typer.echo(
            f" {sign} {view['name']:<10} p {view['p_value']:.4f}, adjusted {view['adjusted']:.4f}: {view['words']}"
        )
    if found["untested"]:
        typer.echo(f"   not tested, for lack of rows: {', '.join(found['untested'])}")


def show_ledger(found: Mapping[str, Any]) -> None:
    from slmops.monitor.page import amount, moment

    unit = found["currency"]
    typer.echo(
        f"{found['requests']:,} requests in {found['days']:.2f} days: {found['prompt_tokens']:,} tokens read, "
        f"{found['completion_tokens']:,} written, {found['busy_s']:,.1f} s of work."
    )
    for name, cost, thousand in (
        ("here", "student_cost", "student_per_1000"),
        ("teacher", "teacher_cost", "teacher_per_1000"),
    ):
        typer.echo(f"  {name:<9} {amount(found[cost])} {unit} ({amount(found[thousand])} for 1,000)")
    typer.echo(f"  training  {amount(found['training_cost'])} {unit}")
    energy = "not told by this machine" if found["energy_kwh"] is None else f"{amount(found['energy_kwh'])} kWh"
    typer.echo(f"  energy    {energy}")
    if found["break_even"]:
        even = found["break_even"]
        typer.echo(f"Paid for after {even['days']:.1f} days at this pace: {moment(even['at'])} UTC.")
    elif found["teacher_cost"] is None:
        typer.echo("Give --teacher-input and --teacher-output to compare with the teacher.")
    else:
        typer.echo("At this pace it never pays for itself: serving costs more than the teacher would.")
