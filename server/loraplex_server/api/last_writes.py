"""What a server writes last, to its clients and its database: the end waits no longer for it.

A database that is frozen breaks no connection, and answers nothing. Whoever stops the server has
promised to wait for so long and not for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable
from typing import Final

log = logging.getLogger(__name__)

#: Of each: the last events of streams, usage and uses of keys, uses of adapters.
LAST_WRITES_S: Final = 5


async def in_last_writes_time(writing: Awaitable[None]) -> None:
    """Wait for the database to take what it does not know yet; what it does not is lost.

    A thread that hangs in it goes on.
    """
    try:
        async with asyncio.timeout(LAST_WRITES_S):
            await writing
    except TimeoutError:
        log.warning(
            "the database has not answered for %d s: what was used in the last seconds, or since "
            "it stopped to answer, is not written down",
            LAST_WRITES_S,
        )
