"""The command line: options only. What they mean is in the modules that the commands call."""

from __future__ import annotations

from typing import Annotated

import typer

from surgery.commands import auto, compare, delta, demo, diff, edit, sweep, train
from surgery.provenance import VERSION

app = typer.Typer(
    name="surgery",
    help="Undo the forgetting of a fine-tuned model: edit its task vector (ft − pre), tensor by tensor.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"surgery {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


auto.register(app)
diff.register(app)
edit.register(app)
delta.register(app)
compare.register(app)
sweep.register(app)
demo.register(app)
train.register(app)
