"""The command tree, its global options, and the one place where errors become lines."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from loraplex.base_client import DEFAULT_BASE_URL
from loraplex.cli import (
    adapter_settings,
    adapter_versions,
    adapters,
    chat,
    check,
    keys,
    models,
    pool,
    serve,
    simulate,
)
from loraplex.cli.problems import explain
from loraplex.cli.settings import Settings
from loraplex.cli.terminal import stderr
from loraplex.errors import LoraplexError
from loraplex.version import installed_version


class ErrorBoundary(TyperGroup):
    """A command group whose commands end, on an SDK error, with one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LoraplexError as error:
            stderr().print("[bold red]error:[/]", end=" ")
            stderr().print(explain(error), markup=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="loraplex",
    cls=ErrorBoundary,
    help="Serve thousands of LoRA adapters of one language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command("serve", cls=serve.PassThrough, add_help_option=False)(serve.serve)
app.command("simulate", cls=serve.PassThrough, add_help_option=False)(simulate.simulate)
app.command("keys", cls=serve.PassThrough, add_help_option=False)(keys.keys)
app.command("chat")(chat.chat)
app.command("models")(models.models)
app.command("pool")(pool.pool)
adapters.app.command("versions")(adapter_versions.versions)
adapters.app.command("rollback")(adapter_versions.rollback)
adapters.app.command("pin")(adapter_settings.pin)
adapters.app.command("unpin")(adapter_settings.unpin)
adapters.app.command("set")(adapter_settings.set_adapter)
adapters.app.command("check", cls=serve.PassThrough, add_help_option=False)(check.check)
app.add_typer(adapters.app, name="adapters")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"loraplex {installed_version()}")
        raise typer.Exit


@app.callback()
def connect(
    ctx: typer.Context,
    base_url: Annotated[
        str, typer.Option(envvar="LORAPLEX_BASE_URL", help="Where the server is.")
    ] = DEFAULT_BASE_URL,
    api_key: Annotated[
        str | None, typer.Option(envvar="LORAPLEX_API_KEY", help="Sent as a bearer token.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Keep what every command needs to reach the server."""
    ctx.obj = Settings(base_url=base_url, api_key=api_key)
