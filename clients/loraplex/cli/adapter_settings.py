"""`loraplex adapters pin`, `unpin` and `set`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from loraplex.adapter_options import AdapterSettings
from loraplex.cli.adapters import Name
from loraplex.cli.settings import open_client
from loraplex.cli.terminal import stdout, write
from loraplex.errors import UsageError


def pin(ctx: typer.Context, name: Name) -> None:
    """Keep an adapter in the pool, idle or not."""
    with open_client(ctx) as client:
        adapter = client.adapters.pin(name)
    write(stdout(), f"pinned {adapter.name}: {adapter.pool_pages} pages")


def unpin(ctx: typer.Context, name: Name) -> None:
    """Let an adapter leave the pool again."""
    with open_client(ctx) as client:
        adapter = client.adapters.unpin(name)
    write(stdout(), f"unpinned {adapter.name}")


def set_adapter(
    ctx: typer.Context,
    name: Name,
    ttl: Annotated[
        str | None,
        typer.Option(help="Delete it so many seconds after its last use; or never.", metavar="S"),
    ] = None,
    defaults: Annotated[
        Path | None,
        typer.Option(help="A JSON file: chat_template, system_prompt, max_context, generation."),
    ] = None,
    readers: Annotated[
        str | None,
        typer.Option(help="Other tenants that may use it: a,b; * for all, - for none."),
    ] = None,
) -> None:
    """Set when an adapter expires, who may use it, and what its requests get by default."""
    settings = AdapterSettings()
    if ttl is not None:
        settings["ttl_s"] = _ttl_of(ttl)
    if defaults is not None:
        settings["defaults"] = _read_json(defaults)
    if readers is not None:
        settings["readers"] = _readers_of(readers)
    if not settings:
        raise UsageError("nothing to set: give --ttl, --defaults or --readers")
    with open_client(ctx) as client:
        adapter = client.adapters.change(name, **settings)
    write(stdout(), f"changed {adapter.name}")


def _ttl_of(text: str) -> int | None:
    if text == "never":
        return None
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"--ttl is a number of seconds, or never, not {text!r}")
    return int(text)


def _readers_of(text: str) -> list[str]:
    # No words for all and none: tenants may be called so.
    return [] if text == "-" else text.split(",")


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no JSON object")
    return content
