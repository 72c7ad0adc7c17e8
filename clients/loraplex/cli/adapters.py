"""`loraplex adapters`: push, list, show, validate, prefetch, rm."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from loraplex.adapter_files import default_name
from loraplex.adapter_options import RegisterOptions
from loraplex.cli.models import AsJson
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stderr, stdout, write, write_json, write_table
from loraplex.errors import UsageError
from loraplex.types import Adapter

app = typer.Typer(help="The adapters that the server keeps.", no_args_is_help=True)

#: What a server may fetch. A Windows drive is one letter.
_SOURCE = re.compile(r"[a-z0-9]{2,}:", re.IGNORECASE)

_TIERS = {
    "resident": "it is in the pool already",
    "loading": "it is on its way into the pool",
    "host": "it is in host memory already",
    "disk": "it is on disk, and will be brought nearer",
}

Name = Annotated[str, typer.Argument(help="The adapter's name.", metavar="NAME")]


SkipBaseCheck = Annotated[
    bool,
    typer.Option(
        "--skip-base-check",
        help="Take an adapter whose config names another base: it is the same, renamed.",
    ),
]


@app.command("upload", hidden=True)
@app.command()
def push(
    ctx: typer.Context,
    path: Annotated[
        str,
        typer.Argument(
            help="A PEFT folder, a .zip or .tar(.gz) of it, or a URL for the server to fetch.",
            metavar="PATH",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="What requests will call it; default: the folder's name.")
    ] = None,
    skip_base_check: SkipBaseCheck = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make it a new version of the name.")
    ] = False,
    expected_id: Annotated[
        str | None, typer.Option(help="With --replace: only if the name stands for this id.")
    ] = None,
    sha256: Annotated[
        str | None, typer.Option(help="Of what a URL gives; other content is refused.")
    ] = None,
) -> None:
    """Upload an adapter; requests can use it at once."""
    options = RegisterOptions(check_base=not skip_base_check, replace=replace)
    if expected_id is not None:
        options["expected_id"] = expected_id
    if _SOURCE.match(path):
        if name is None:
            raise UsageError("name an adapter that the server is to fetch: --name NAME")
        with open_client(ctx) as client:
            adapter = client.adapters.fetch(name, path, sha256=sha256, **options)
    else:
        if sha256 is not None:
            raise UsageError("--sha256 is for URLs; what is uploaded comes as it is here")
        name = default_name(Path(path)) if name is None else name
        with open_client(ctx) as client, _upload_progress() as progress:
            show = _shown_in(progress, name)
            adapter = client.adapters.push(path, name=name, on_progress=show, **options)
    write(stdout(), f"pushed {adapter.name}: {_summary(adapter)}")
    write(stderr(), f"try it: loraplex chat --model {shlex.quote(adapter.name)}", style="dim")


@app.command()
def validate(
    ctx: typer.Context,
    path: Annotated[Path, typer.Argument(help="A PEFT folder, or an archive.", metavar="PATH")],
    skip_base_check: SkipBaseCheck = False,
    as_json: AsJson = False,
) -> None:
    """Tell what the server would make of an adapter; exit with 1 if it would refuse it."""
    with open_client(ctx) as client, _upload_progress() as progress:
        found = client.adapters.validate(
            path, check_base=not skip_base_check, on_progress=_shown_in(progress, path.name)
        )
    if as_json:
        write_json(found)
    else:
        write(stdout(), "it would be registered" if found.valid else "it would be refused")
        for reason in found.reasons:
            write(stdout(), f"  - {reason}")
        write_table(
            ("VERDICT", "SUBJECT", "DETAIL"),
            [(entry.verdict, entry.subject, entry.detail) for entry in found.report],
        )
    if not found.valid:
        raise typer.Exit(1)


@app.command("list")
def list_adapters(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the adapters that the server keeps."""
    with open_client(ctx) as client:
        found = list(client.adapters.list())
    if as_json:
        write_json(found)
        return
    rows = [
        (a.name, a.state, a.rank_max, decimal(a.size_bytes), a.pool_pages, time_of(a.created))
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
        ("created", time_of(adapter.created)),
        ("version", adapter.version),
        ("source", adapter.source),
        ("last used", "never" if adapter.last_used is None else time_of(adapter.last_used)),
        ("pinned", "yes" if adapter.pinned else "no"),
        ("expires", _expiry(adapter)),
        ("owner", adapter.owner or "nobody"),
        ("readers", "all" if "*" in adapter.readers else ", ".join(adapter.readers) or "none"),
    ]
    if adapter.defaults:
        rows.append(("defaults", json.dumps(adapter.defaults)))
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


@app.command("delete", hidden=True)
@app.command()
def rm(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="Its name, or name@sha256:...", metavar="NAME")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="End the requests that use it, do not wait.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(help="How many seconds to wait for them.", metavar="S")
    ] = None,
) -> None:
    """Remove an adapter with all its versions, or one version; requests that use it finish."""
    with open_client(ctx) as client:
        if not yes:
            adapter = client.adapters.get(name)
            typer.confirm(f"Remove {name} ({_summary(adapter)})?", abort=True, err=True)
        deleted = client.adapters.delete(name, mode="cancel" if cancel else None, timeout_s=timeout)
    freed = deleted.freed
    write(stdout(), f"removed {deleted.name}")
    write(
        stderr(),
        f"freed {decimal(freed.pool_bytes)} of the pool, {decimal(freed.host_bytes)} of host "
        f"memory, {decimal(freed.disk_bytes)} on disk",
        style="dim",
    )


def _shown_in(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Return what shows how much of an upload was sent."""
    task = progress.add_task(name, total=None)

    def show(sent_bytes: int, total_bytes: int) -> None:
        label = f"{name}: checking" if sent_bytes == total_bytes else name
        progress.update(task, completed=sent_bytes, total=total_bytes, description=label)

    return show


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


def _expiry(adapter: Adapter) -> str:
    if adapter.ttl_s is None:
        return "never"
    expiry = f"{adapter.ttl_s} s after its last use"
    return f"never while pinned, else {expiry}" if adapter.pinned else expiry


def time_of(unix_s: int) -> str:
    """Return a time as the commands show it."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M")
