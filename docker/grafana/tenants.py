"""Who uses the service, who is limited, and whether shares are fair."""

from __future__ import annotations

from typing import Final

from by_name import by_name
from dashboard import Dashboard, Panel, Variable
from queries import INSTANCE, OF_INSTANCE, one, total

_TENANT: Final = Variable("tenant", "tenant", "loraplex_tenant_requests_total")
_T: Final = OF_INSTANCE + ', tenant=~"$tenant"'

TENANTS: Final = Dashboard(
    "loraplex-tenants",
    "loraplex / tenants",
    "Who uses the service, who is limited, and whether shares are fair.",
    (INSTANCE, _TENANT),
    (
        ("By tenant", by_name("tenant", _T)),
        (
            "Fairness",
            (
                Panel(
                    "Spread of service",
                    "Weighted tokens between the most and the least served tenant that waits. "
                    "Bounded while all have work (theorem 4.4 of the VTC paper); growth without "
                    "end would be a bug.",
                    "short",
                    one(f"loraplex_fair_service_spread{{{OF_INSTANCE}}}", "{{instance}}"),
                ),
                Panel(
                    "Tenants that wait",
                    "Clients of the fair queue with something in it.",
                    "short",
                    one(f"loraplex_fair_clients{{{OF_INSTANCE}}}", "{{instance}}"),
                ),
                Panel(
                    "Limited",
                    "429s of tenants' own limits: raise them or talk to the tenant.",
                    "reqps",
                    one(
                        total(
                            "loraplex_requests_rejected_total",
                            "reason",
                            OF_INSTANCE + ', reason=~"tenant_queue_full|quota_exceeded"',
                        ),
                        "{{reason}}",
                    ),
                ),
            ),
        ),
    ),
)
