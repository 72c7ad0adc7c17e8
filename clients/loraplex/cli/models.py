"""`loraplex models`, and finding a model by the name someone typed."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

import typer

from loraplex.cli.settings import open_client
from loraplex.cli.terminal import write_json, write_table
from loraplex.client import Client
from loraplex.errors import BadRequestError, NotFoundError, UsageError

AsJson = Annotated[bool, typer.Option("--json", help="Write the server's answer as JSON.")]


def models(ctx: typer.Context, as_json: AsJson = False) -> None:
    """List the names that requests can use: the base model and its adapters."""
    with open_client(ctx) as client:
        found = client.models.list()
    if as_json:
        write_json(found)
    else:
        write_table(("NAME", "BASE"), [(model.id, model.parent or "-") for model in found])


def pick_model(client: Client, name: str | None) -> str:
    """Return the model of a name; without one, the base.

    Raises:
        UsageError: No such model; the message holds the closest names.
    """
    known = client.models.list()
    if name is None:
        bases = [model.id for model in known if model.parent is None]
        if not bases:
            raise UsageError("the server lists no base model; name one with --model")
        return bases[0]
    names = [model.id for model in known]
    if name in names or has_model(client, name):
        return name
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(close)}?" if close else "`loraplex models` lists them"
    raise UsageError(f"no model {name!r}; {advice}")


def has_model(client: Client, name: str) -> bool:
    """Ask the server for a name: a tenant's short ones, and versions, are on no list."""
    try:
        client.models.retrieve(name)
    except (BadRequestError, NotFoundError):
        return False
    return True
