"""A server that notes usage until it is killed: run by `test_ledger.py`.

Prints a line for each batch that is in the database, with all tokens booked by then.
"""

from __future__ import annotations

import asyncio
import sys

from loraplex_server.adapters.registry_database import open_database
from loraplex_server.tenants import ledger as ledgers
from loraplex_server.tenants.ledger import UsageLedger
from loraplex_server.tenants.usage_store import Amounts, UsageStore


class Stream:
    """A request that never ends."""

    tenant, adapter, num_tokens = "t", "a", 0

    def used(self) -> Amounts:
        return Amounts(1, 3, 1, self.num_tokens)


async def main(url: str) -> None:
    ledgers.WRITE_S = 0.02
    ledger = UsageLedger(UsageStore(open_database(url, lambda adapter_id: None), "base"))
    stream = Stream()
    ledger.open(stream)
    while True:
        stream.num_tokens += 1
        booked = stream.num_tokens
        await ledger.write()
        sys.stdout.write(f"{booked}\n")
        sys.stdout.flush()
        await asyncio.sleep(0.003)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
