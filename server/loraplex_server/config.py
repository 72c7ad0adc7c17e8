"""Every setting of the server: its name, type, default and help, in one table.

The fields of `Config` are the table; what flags, variables and TOML keys are called derives from
their names, see `config_sources`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraplex_scheduler.policies import ADMISSIONS, EVICTIONS, ORDERS
from loraplex_server.logs import LOG_FORMATS
from loraplex_server.setting_values import (
    Parser,
    TenantLimit,
    choice_of,
    integer_of,
    or_auto,
    or_word,
    parse_folder,
    parse_header_name,
    parse_http_url,
    parse_seconds,
    parse_secret,
    parse_share,
    parse_size,
    parse_store_url,
    parse_switch,
    parse_text,
    parse_wait,
    parse_weights,
    per_tenant,
)
from loraplex_server.text.tool_format import TOOL_PARSERS


class ConfigError(Exception):
    """A setting is unknown or has an impossible value; the message names it and where it was."""


def _setting(parse: Parser, default: Any, group: str, help_text: str, shape: str = "N") -> Any:
    metadata = {"parse": parse, "group": group, "help": help_text, "shape": shape}
    if parse is parse_secret:
        return field(default=default, repr=False, metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def default_data_dir() -> Path:
    """Return `$XDG_DATA_HOME/loraplex` where that is set, else `~/.loraplex`."""
    if xdg := os.environ.get("XDG_DATA_HOME"):
        return Path(xdg) / "loraplex"
    return Path.home() / ".loraplex"


@dataclass(frozen=True)
class Config:
    """All settings, checked; None stands for `auto`."""

    model: str | None = _setting(
        parse_text,
        None,
        "model",
        "folder, GGUF file or hub id (default: SmolLM2-135M-Instruct)",
        "MODEL",
    )
    served_model_name: str | None = _setting(
        parse_text, None, "model", "the base model's name in the API (default: derived)", "NAME"
    )
    dtype: str = _setting(
        choice_of("auto", "float32", "bfloat16"), "auto", "model", "arithmetic of the model", "TYPE"
    )
    quantization: str = _setting(
        choice_of("none", "int8"),
        "none",
        "model",
        "weights of all linears, the head's too: int8 is faster on a CPU with few requests and "
        "changes answers, see docs/benchmarks/quantization.md; CPU only",
        "TYPE",
    )
    device: str = _setting(
        choice_of("auto", "cpu", "cuda"),
        "auto",
        "model",
        "where it runs; auto: a GPU if any",
        "TYPE",
    )
    max_model_len: int | None = _setting(
        or_auto(integer_of(1)), None, "model", "most tokens of prompt and answer; auto: the model's"
    )
    threads: int = _setting(integer_of(0), 0, "model", "CPU threads of the engine; 0: all cores")
    tensor_parallel: int = _setting(
        integer_of(1),
        1,
        "model",
        "processes that compute the model together, a GPU each; sizes are those of all together",
    )

    page_tokens: int | None = _setting(
        or_auto(integer_of(1, 1024)),
        None,
        "memory",
        "tokens whose keys and values fill one page; auto: 16, fewer if adapters waste too much",
    )
    pool_bytes: int | None = _setting(
        or_auto(parse_size),
        None,
        "memory",
        "size of the page pool, e.g. 512MiB; auto: by memory",
        "SIZE",
    )
    max_step_tokens: int | None = _setting(
        or_auto(integer_of(1)), None, "memory", "most tokens of one step; auto: 512, on a GPU 2048"
    )
    max_running: int | None = _setting(
        or_auto(integer_of(1)), None, "memory", "most sequences of one step; auto: 64, on a GPU 256"
    )
    host_bytes: int | None = _setting(
        or_auto(or_word("0", 0, parse_size)),
        None,
        "memory",
        "host memory that keeps adapters near the pool; auto: by memory, 0: none",
        "SIZE",
    )
    prefix_cache: bool = _setting(
        parse_switch, True, "memory", "keep the KV of prompts for others that begin alike", "ON/OFF"
    )
    isolate_prefixes: bool = _setting(
        parse_switch,
        False,
        "memory",
        "let each tenant find the KV of its own prompts only",
        "ON/OFF",
    )
    eviction: str = _setting(
        choice_of(*EVICTIONS),
        "cost",
        "memory",
        "who leaves the pool first: the cheapest to miss (cost), the least recently used (lru), or "
        "whoever has no user (unused)",
        "POLICY",
    )

    order: str = _setting(
        choice_of(*ORDERS),
        "vtc",
        "scheduling",
        "who is served next: fair shares of tenants (vtc) or adapters (vtc-adapter), first come "
        "(fcfs), last come (lcfs), earliest deadline (edf)",
        "POLICY",
    )
    admission: str = _setting(
        choice_of(*ADMISSIONS),
        "expected",
        "scheduling",
        "what to set aside for answers: their expected length, nothing (greedy), or all they may "
        "take, which never preempts (worst-case)",
        "POLICY",
    )
    cluster_wait_s: float = _setting(
        parse_wait,
        0.0,
        "scheduling",
        "how long a request may wait for company on its adapter; 0: not at all",
        "S",
    )
    ttft_slo_s: float | None = _setting(
        or_word("off", None, parse_seconds),
        None,
        "scheduling",
        "answer 429 rather than a first token later than this; default: off",
        "S",
    )

    data_dir: Path = _setting(  # noqa: RUF009 - returns a field, as dataclasses.field does
        parse_folder,
        default_data_dir,
        "adapters",
        "where adapters are stored; default: ~/.loraplex",
        "FOLDER",
    )
    max_adapter_rank: int = _setting(
        integer_of(1, 256), 256, "adapters", "refuse adapters of a higher rank"
    )
    max_upload_bytes: int = _setting(
        parse_size, 2**30, "adapters", "refuse larger uploads, e.g. 1GiB", "SIZE"
    )
    keep_versions: int = _setting(
        integer_of(1), 5, "adapters", "versions kept of each adapter, the current one included"
    )
    pinned_share: float = _setting(
        parse_share, 0.5, "adapters", "of the pool that pinned adapters may take, 0 to 1", "SHARE"
    )
    adapter_root: Path | None = _setting(  # noqa: RUF009 - as of `data_dir`
        parse_folder,
        None,
        "adapters",
        "where `file:` sources may be; default: such sources are refused",
        "FOLDER",
    )
    allow_private_sources: bool = _setting(
        parse_switch,
        False,
        "adapters",
        "let `https:` sources be on private addresses, and `http:` ones be used",
        "ON/OFF",
    )
    registry_url: str | None = _setting(
        parse_secret,
        None,
        "adapters",
        "database of names and versions that several servers share (postgresql://...)",
        "URL",
    )
    blob_url: str | None = _setting(
        parse_store_url,
        None,
        "adapters",
        "where adapter files are kept (s3://bucket/folder); default: in data_dir",
        "URL",
    )
    copies_bytes: int | None = _setting(
        parse_size,
        None,
        "adapters",
        "copies in data_dir of files that blob_url keeps elsewhere, those used last; default: as "
        "many as leave a tenth of the disk free",
        "SIZE",
    )
    registry_outage_s: float = _setting(
        parse_wait,
        60.0,
        "adapters",
        "while a shared registry does not answer, go on with the names and keys that are known for "
        "so long; 0: not at all",
        "S",
    )
    registry_wait_s: float = _setting(
        parse_wait,
        60.0,
        "adapters",
        "how long a server that starts waits for a shared registry that does not answer",
        "S",
    )

    host: str = _setting(parse_text, "127.0.0.1", "service", "address to listen on", "HOST")
    port: int = _setting(
        integer_of(0, 65535), 8000, "service", "port to listen on; 0: any free one"
    )
    api_key: str | None = _setting(
        parse_secret, None, "service", "an admin's key, beside those of `loraplex keys`", "KEY"
    )
    allow_open: bool = _setting(
        parse_switch,
        False,
        "service",
        "without any keys, listen on addresses that others can reach too",
        "ON/OFF",
    )
    metrics_open: bool = _setting(
        parse_switch, True, "service", "let /metrics be read without a key", "ON/OFF"
    )
    request_timeout_s: float = _setting(
        parse_seconds, 600.0, "service", "end a request after so many seconds", "S"
    )
    max_queued: int = _setting(
        integer_of(0), 1024, "service", "answer 429 when more sequences wait than this"
    )
    max_connections: int = _setting(
        integer_of(1), 4096, "service", "answer 503 when more connections are open"
    )
    receive_timeout_s: float = _setting(
        parse_seconds,
        30.0,
        "service",
        "answer 408 when a request's headers take longer, or its body takes longer than this and "
        "a second per KiB",
        "S",
    )
    send_timeout_s: float = _setting(
        parse_seconds,
        60.0,
        "service",
        "drop a client that takes nothing of its answer for so long",
        "S",
    )
    tenant_header: str | None = _setting(
        parse_header_name,
        None,
        "service",
        "header that names the tenant, set by a gateway you trust; default: everybody is one",
        "NAME",
    )
    tenant_weights: Mapping[str, float] = _setting(
        parse_weights,
        dict,
        "service",
        "shares under order vtc, e.g. gold=3,free=1; default: 1 for each",
        "WEIGHTS",
    )
    tenant_tokens_per_minute: TenantLimit = _setting(  # noqa: RUF009 - as of `data_dir`
        per_tenant(integer_of(0)),
        0,
        "service",
        "answer 429 when a tenant asks for more; 0: no limit; or 1000,gold=5000",
        "LIMIT",
    )
    tenant_requests_per_minute: TenantLimit = _setting(  # noqa: RUF009 - as of `data_dir`
        per_tenant(integer_of(0)), 0, "service", "the same of requests that generate", "LIMIT"
    )
    max_queued_per_tenant: TenantLimit = _setting(  # noqa: RUF009 - as of `data_dir`
        per_tenant(integer_of(0)),
        0,
        "service",
        "answer 429 when more of a tenant's sequences wait; 0: no limit but max_queued",
        "LIMIT",
    )
    tenant_max_adapters: TenantLimit = _setting(  # noqa: RUF009 - as of `data_dir`
        per_tenant(integer_of(0)),
        0,
        "service",
        "adapters that a tenant may have; 0: no limit",
        "LIMIT",
    )
    tenant_max_adapter_bytes: TenantLimit = _setting(  # noqa: RUF009 - as of `data_dir`
        per_tenant(or_word("0", 0, parse_size)),
        0,
        "service",
        "their bytes, with all versions kept, e.g. 10GiB; 0: no limit",
        "LIMIT",
    )
    shutdown_grace_s: int = _setting(
        integer_of(0), 20, "service", "let running requests finish so long when stopping", "S"
    )
    drain_delay_s: float = _setting(
        parse_wait,
        0.0,
        "service",
        "when stopping, serve as before for so long while `/ready` says 503, until load balancers "
        "have noticed",
        "S",
    )
    tool_parser: str = _setting(
        choice_of(*TOOL_PARSERS),
        "auto",
        "service",
        "how the model writes calls of tools; auto: by its chat template, none: refuse tools",
        "FORMAT",
    )
    trust_request_chat_template: bool = _setting(
        parse_switch,
        False,
        "service",
        "let requests bring a chat template, which is a program",
        "ON/OFF",
    )
    log_level: str = _setting(
        choice_of("debug", "info", "warning", "error"),
        "info",
        "service",
        "how much to log",
        "LEVEL",
    )
    log_format: str = _setting(
        choice_of(*LOG_FORMATS),
        "text",
        "service",
        "lines for people (text), or one JSON object each with the request's id (json)",
        "FORMAT",
    )
    access_log: bool = _setting(
        parse_switch, False, "service", "log one line for each HTTP request", "ON/OFF"
    )
    metrics_top_k: int = _setting(
        integer_of(1, 10_000),
        50,
        "service",
        "adapters, and tenants, that have metrics of their own; the others share one",
    )
    otlp_endpoint: str | None = _setting(
        parse_http_url,
        None,
        "service",
        "collector that traces of requests go to by OTLP/HTTP, e.g. http://localhost:4318; "
        "default: none",
        "URL",
    )
