"""``slmops keys``: who may ask a server, and how much."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from slmops.serve.keys import Key, Scope

keys = typer.Typer(
    help="Make, list and revoke the keys of a server.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

KeysOption = Annotated[Path, typer.Option("--keys", envvar="SLMOPS_KEYS", help="The file of keys.")]
DEFAULT = Path("keys.json")
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@keys.command("make")
def make(
    name: Annotated[str, typer.Argument(help="Whose it is.", show_default=False)],
    scope: Annotated[
        list[str],
        typer.Option(
            help="infer, feedback, metrics or admin; several times for several.", show_default="infer feedback"
        ),
    ] = [],  # noqa: B006 (typer's own)
    per_minute: Annotated[int | None, typer.Option(min=1, help="Requests a minute at most.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Tokens a minute at most.")] = None,
    days: Annotated[int | None, typer.Option(min=1, help="How long it is good for.", show_default="for ever")] = None,
    file: KeysOption = DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it once: the file keeps a keyed hash.

    A running server knows it within a second. Callers send it as 'Authorization: Bearer KEY'.
    """
    from slmops.cli.render import print_json
    from slmops.serve.keys import KeyFile

    scopes = cast("list[Scope]", scope or ["infer", "feedback"])
    made, text = KeyFile(file).make(name, scopes, per_minute=per_minute, tokens_per_minute=tokens_per_minute, days=days)
    if as_json:
        print_json({**made.told(), "key": text})
        return
    typer.echo(text)
    typer.echo(f"This is all that will ever be seen of it. {file} keeps a hash, under {file}.secret.", err=True)


@keys.command("list")
def list_keys(file: KeysOption = DEFAULT, as_json: JsonOption = False) -> None:
    """Show the keys: names, scopes, limits; nothing that lets anybody in."""
    from slmops.cli.render import print_json
    from slmops.serve.keys import KeyFile

    found = KeyFile(file).read()
    if as_json:
        print_json({"keys": [key.told() for key in found]})
        return
    for key in found:
        typer.echo(line(key))
    if not found:
        typer.echo("There are no keys: nobody may ask.")


@keys.command("revoke")
def revoke(
    which: Annotated[str, typer.Argument(help="A key's id or name.", show_default=False)],
    file: KeysOption = DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Take a key away. A running server refuses it within a second."""
    from slmops.cli.render import print_json
    from slmops.serve.keys import KeyFile

    gone = KeyFile(file).revoke(which)
    if as_json:
        print_json({"revoked": gone.told()})
    else:
        typer.echo(f"{gone.name} ({gone.id}) may not ask any more.")


def line(key: Key) -> str:
    """One key for people."""
    limits: list[tuple[Any, str]] = [(key.per_minute, "requests/min"), (key.tokens_per_minute, "tokens/min")]
    told = [f"{limit:,} {what}" for limit, what in limits if limit is not None] or ["no limit"]
    until = "" if key.expires is None else f", until {time.strftime('%Y-%m-%d', time.gmtime(key.expires))}"
    return f"{key.id}  {key.name}: {' '.join(key.scopes)}; {', '.join(told)}{until}"
