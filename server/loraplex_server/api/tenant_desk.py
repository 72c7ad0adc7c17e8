"""All that keeps tenants apart, put together over one set of services."""

from __future__ import annotations

import asyncio
import logging

from loraplex_server.adapters.errors import StorageFailed
from loraplex_server.api.adapter_owners import AdapterOwners
from loraplex_server.api.services import Services
from loraplex_server.api.tenant_accounts import TenantAccounts
from loraplex_server.api.tenant_header import TenantHeader
from loraplex_server.tenants.key_ring import KeyRing
from loraplex_server.tenants.key_store import KeyStore
from loraplex_server.tenants.ledger import UsageLedger
from loraplex_server.tenants.usage_store import UsageStore

log = logging.getLogger(__name__)


class TenantDesk:
    """Made once by the application.

    Attributes:
        header: names the tenant where there are no keys, or for an admin.
        accounts: limits, and who has spent what of them.
        owners: whose new adapters are.
    """

    def __init__(self, services: Services) -> None:
        config, database = services.config, services.catalog.database
        outage_s = config.registry_outage_s if config.registry_url is not None else 0.0
        self.key_store = KeyStore(database)
        self.keys = KeyRing(self.key_store, config.api_key, outage_s=outage_s)
        self.usage = UsageStore(database, services.catalog.scope)
        self.ledger = UsageLedger(self.usage)
        self.header = TenantHeader(config.tenant_header)
        self.owners = AdapterOwners(
            self.keys, config.tenant_max_adapters, config.tenant_max_adapter_bytes
        )
        self.accounts = TenantAccounts(
            max_queued=config.max_queued_per_tenant,
            tokens_per_minute=config.tenant_tokens_per_minute,
            requests_per_minute=config.tenant_requests_per_minute,
            ledger=self.ledger,
            clock=services.clock,
        )

    async def close(self) -> None:
        """Write what is not written yet; no request may run any more."""
        await self.ledger.stop()
        try:
            await asyncio.to_thread(self.keys.write_uses)
        except StorageFailed as error:
            log.warning("when keys were used last is lost: %s", error)
