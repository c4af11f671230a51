"""The typer application, and how errors become exit codes.

Exit codes: 0 done; 1 a gate or the input failed; 2 wrong use; 130 interrupted. A bug keeps its traceback.
Verbs import their libraries inside the command, so that ``slmops --help`` answers at once.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from slmops import __version__
from slmops.cli.adapters import adapters
from slmops.cli.bench import EPILOG as BENCH_EPILOG
from slmops.cli.bench import bench
from slmops.cli.chat import chat
from slmops.cli.compress import EPILOG as COMPRESS_EPILOG
from slmops.cli.compress import compress
from slmops.cli.data import data
from slmops.cli.demo import demo
from slmops.cli.deploy import deploy
from slmops.cli.distill import distill
from slmops.cli.doctor import doctor
from slmops.cli.evaluate import EPILOG as EVALUATE_EPILOG
from slmops.cli.evaluate import evaluate
from slmops.cli.feedback import feedback
from slmops.cli.improve import improve
from slmops.cli.init import init
from slmops.cli.keys import keys
from slmops.cli.monitor import monitor
from slmops.cli.run import run
from slmops.cli.serve import serve
from slmops.cli.telemetry import silence_telemetry
from slmops.cli.trace import trace
from slmops.cli.train import train
from slmops.cli.validate import EPILOG as VALIDATE_EPILOG
from slmops.cli.validate import validate
from slmops.cli.verify import verify
from slmops.errors import SlmopsError


class InOrder(TyperGroup):
    """Verbs in the order of a model's life; groups would come last."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name for name in super().list_commands(ctx) if name != "monitor"]
        names.insert(names.index("chat") + 1, "monitor")
        return names


app = typer.Typer(
    name="slmops",
    cls=InOrder,
    help="Run small language models through their whole life: teach, fit, prove, ship, watch, improve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich would take as long to import as all the rest
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"slmops {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
    ),
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show the log of every step on standard error."),
) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )


app.command()(init)
app.command()(doctor)
app.command()(data)
app.command()(distill)
app.command()(train)
app.add_typer(adapters, name="adapters")
app.command(epilog=COMPRESS_EPILOG)(compress)
app.command(epilog=EVALUATE_EPILOG)(evaluate)
app.command(epilog=BENCH_EPILOG)(bench)
app.command()(verify)
app.command(epilog=VALIDATE_EPILOG)(validate)
app.command()(serve)
app.add_typer(keys, name="keys")
app.add_typer(deploy, name="deploy")
app.command()(chat)
app.add_typer(monitor, name="monitor")
app.command()(feedback)
app.add_typer(improve, name="improve")
app.command()(trace)
app.command()(run)
app.command()(demo)


def main() -> None:
    """Entry point of the ``slmops`` command."""
    silence_telemetry()
    try:
        app()
    except SlmopsError as error:
        from slmops.cli.render import show_error

        show_error(error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
