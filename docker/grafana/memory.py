"""Who holds the pool's pages, and what happens when they run out."""

from __future__ import annotations

from typing import Final

from dashboard import Dashboard, Panel, Query
from queries import INSTANCE, MODEL, OF_INSTANCE, OF_MODEL, one, total

MEMORY: Final = Dashboard(
    "loraplex-memory",
    "loraplex / memory",
    "Who holds the pool's pages, and what happens when they run out.",
    (INSTANCE, MODEL),
    (
        (
            "Pool",
            (
                Panel(
                    "Pages by use",
                    "prefix_idle and adapters nobody runs with leave when somebody needs pages, "
                    "so little `free` is no problem by itself.",
                    "short",
                    one(f"sum by (use) (loraplex_pool_pages{{{OF_INSTANCE}}})", "{{use}}"),
                    is_stacked=True,
                    width=16,
                ),
                Panel(
                    "In use by sequences",
                    "Share of pages that running sequences hold. At 1 the youngest give way.",
                    "percentunit",
                    one(f"loraplex:pool_in_use_ratio{{{OF_INSTANCE}}}", "{{instance}}"),
                    (0.8, 0.95),
                ),
                Panel(
                    "As routers see it",
                    "vllm:kv_cache_usage_perc: what is not available, 0 to 1.",
                    "percentunit",
                    one(f"vllm:kv_cache_usage_perc{{{OF_MODEL}}}", "{{instance}}"),
                    (0.8, 0.95),
                ),
                Panel(
                    "Preemptions",
                    "Sequences that gave back their pages and compute again. Raise pool_bytes or "
                    "lower max_running.",
                    "reqps",
                    one(total("vllm:num_preemptions_total", "instance", OF_MODEL), "{{instance}}"),
                    (0.1,),
                ),
                Panel(
                    "Pages of the pool",
                    "The size of each pool.",
                    "short",
                    one(f"loraplex:pool_pages:sum{{{OF_INSTANCE}}}", "{{instance}}"),
                    kind="stat",
                ),
            ),
        ),
        (
            "Prefix cache",
            (
                Panel(
                    "Hit ratio",
                    "Share of prompt tokens that need not be computed, 5 minutes.",
                    "percentunit",
                    one(f"loraplex:prefix_hit_ratio:rate5m{{{OF_INSTANCE}}}", "{{instance}}"),
                ),
                Panel(
                    "Tokens looked for and found",
                    "Of prompts, at their first admission.",
                    "short",
                    (
                        Query(total("vllm:prefix_cache_queries_total", "", OF_MODEL), "looked for"),
                        Query(total("vllm:prefix_cache_hits_total", "", OF_MODEL), "found"),
                    ),
                ),
                Panel(
                    "Pages given up",
                    "By the prefix cache, for somebody who needed them.",
                    "short",
                    one(total("loraplex_prefix_evictions_total", "instance"), "{{instance}}"),
                ),
            ),
        ),
        (
            "Host memory",
            (
                Panel(
                    "Arena",
                    "Host memory that packed adapters take, and what there is.",
                    "bytes",
                    (
                        Query(f"sum(loraplex_host_bytes{{{OF_INSTANCE}}})", "used"),
                        Query(f"sum(loraplex_host_capacity_bytes{{{OF_INSTANCE}}})", "capacity"),
                    ),
                ),
                Panel(
                    "Adapters in it",
                    "Loading one of them costs a copy only.",
                    "short",
                    one(f"vllm:num_cpu_loaded_lora_adapters{{{OF_MODEL}}}", "{{instance}}"),
                ),
                Panel(
                    "Loads that it served",
                    "Adapters found there when wanted, a second.",
                    "reqps",
                    one(total("loraplex_adapter_host_hits_total", "instance"), "{{instance}}"),
                ),
            ),
        ),
    ),
)
