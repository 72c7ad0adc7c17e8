"""`loraplex adapters`: push, list, show, prefetch, rm."""

from __future__ import annotations

import shlex
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loraplex.adapter_files import default_name
from loraplex.cli.models import AsJson
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stderr, stdout, write, write_json, write_table
from loraplex.types import Adapter

app = typer.Typer(help="Push, list, show, prefetch and remove adapters.", no_args_is_help=True)

_TIERS = {
    "resident": "it is in the pool already",
    "loading": "it is on its way into the pool",
    "host": "it is in host memory already",
    "disk": "it is on disk, and will be brought nearer",
}

Name = Annotated[str, typer.Argument(help="The adapter's name.", metavar="NAME")]


@app.command()
def push(
    ctx: typer.Context,
    path: Annotated[
        Path, typer.Argument(help="A PEFT folder, or a .zip or .tar(.gz) of it.", metavar="PATH")
    ],
    name: Annotated[
        str | None, typer.Option(help="What requests will call it; default: the folder's name.")
    ] = None,
    skip_base_check: Annotated[
        bool,
        typer.Option(
            "--skip-base-check",
            help="Take an adapter whose config names another base: it is the same, renamed.",
        ),
    ] = False,
) -> None:
    """Upload an adapter; requests can use it at once."""
    name = default_name(path) if name is None else name
    with open_client(ctx) as client, _upload_progress() as progress:
        task = progress.add_task(name, total=None)

        def show(sent_bytes: int, total_bytes: int) -> None:
            label = f"{name}: checking" if sent_bytes == total_bytes else name
            progress.update(task, completed=sent_bytes, total=total_bytes, description=label)

        adapter = client.adapters.push(
            path, name=name, check_base=not skip_base_check, on_progress=show
        )
    write(stdout(), f"pushed {adapter.name}: {_summary(adapter)}")
    write(stderr(), f"try it: loraplex chat --model {shlex.quote(adapter.name)}", style="dim")


@app.command("list")
def list_adapters(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the adapters that the server keeps."""
    with open_client(ctx) as client:
        found = list(client.adapters.list())
    if as_json:
        write_json(found)
        return
    rows = [
        (a.name, a.state, a.rank_max, decimal(a.size_bytes), a.pool_pages, _time(a.created))
        for a in found
    ]
    write_table(("NAME", "STATE", "RANK", "SIZE", "PAGES", "CREATED"), rows)


@app.command()
def show(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show one adapter."""
    with open_client(ctx) as client:
        adapter = client.adapters.get(name)
    if as_json:
        write_json(adapter)
        return
    rows: list[tuple[str, object]] = [
        ("name", adapter.name),
        ("id", adapter.id),
        ("base model", adapter.base_model),
        ("state", adapter.state),
        ("largest rank", adapter.rank_max),
        ("modules", ", ".join(adapter.target_modules)),
        ("size", decimal(adapter.size_bytes)),
        ("pool pages", adapter.pool_pages),
        ("created", _time(adapter.created)),
    ]
    for label, value in rows:
        write(stdout(), f"{label:<13} {value}")


@app.command()
def prefetch(ctx: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Tell the server that requests for an adapter will come soon."""
    with open_client(ctx) as client:
        asked = client.adapters.prefetch(name)
    if as_json:
        write_json(asked)
    else:
        write(stdout(), f"asked for {asked.name}: {_TIERS.get(asked.tier, asked.tier)}")


@app.command()
def rm(
    ctx: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove an adapter; requests that are using it finish."""
    with open_client(ctx) as client:
        if not yes:
            adapter = client.adapters.get(name)
            typer.confirm(f"Remove {name} ({_summary(adapter)})?", abort=True, err=True)
        deleted = client.adapters.delete(name)
    write(stdout(), f"removed {deleted.name}")


def _upload_progress() -> Progress:
    console = stderr()
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _summary(adapter: Adapter) -> str:
    modules = ", ".join(adapter.target_modules)
    return f"rank {adapter.rank_max}, {decimal(adapter.size_bytes)}, on {modules}"


def _time(unix_s: int) -> str:
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")
