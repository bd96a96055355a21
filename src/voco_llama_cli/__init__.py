"""The `voco-llama` command. Nothing here imports torch or transformers: a command does when it runs."""

from typing import Annotated

import typer

from .ask import ask
from .benchmark import benchmark
from .card import card
from .check import check
from .compress import compress
from .convert import convert
from .demo import demo
from .errors import OneLineErrors
from .evaluate import Evaluate, evaluate
from .export import app as export_app
from .index import index
from .push import push
from .serve import serve
from .store import store_app
from .train import PASS_ON, train


app = typer.Typer(
    cls=OneLineErrors,
    help="Compress an image into one or a few VoCo tokens, then ask about it many times.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(f"voco-llama {version_of('voco-llama-hf')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(ask)
app.command()(benchmark)
app.command()(card)
app.command()(check)
app.command()(compress)
app.command()(convert)
app.command()(demo)
app.command(cls=Evaluate)(evaluate)
app.add_typer(export_app, name="export")
app.command()(index)
app.command()(push)
app.command()(serve)
app.add_typer(store_app, name="store")
app.command(context_settings=PASS_ON)(train)
