"""A word at the start to whoever points a server at a registry of another base model.

Names are kept apart by base model, so nothing goes wrong but that requests for them get 404 here.
"""

from __future__ import annotations

import logging

from sqlalchemy import Connection, func, select

from loraplex_server.adapters.registry_tables import names

_log = logging.getLogger(__name__)


def warn_of_other_bases(connection: Connection, scope: str) -> None:
    """Log that all names are of other base models than `scope`, if they are."""
    counts = select(names.c.scope, func.count()).group_by(names.c.scope)
    by_scope = {row[0]: row[1] for row in connection.execute(counts)}
    if by_scope and scope not in by_scope:
        _log.warning(
            "the registry has %d adapters, all of other base models: none is served here. Where "
            "servers share it, check that their --model is the same, file by file",
            sum(by_scope.values()),
        )
