"""The adapters that the server keeps."""

from __future__ import annotations

import json
from pathlib import Path

from loraplex.adapter_files import default_name, find_parts
from loraplex.adapter_options import AdapterSettings, RegisterOptions
from loraplex.calls.call import Call, checked_name, list_call, segment
from loraplex.errors import UsageError
from loraplex.multipart import MultipartBody, Progress
from loraplex.types import (
    Adapter,
    AdapterDeleted,
    AdapterPage,
    AdapterPrefetch,
    AdapterValidation,
    AdapterVersions,
    Page,
)


def push_adapter(
    path: Path, name: str | None, on_progress: Progress | None, options: RegisterOptions
) -> Call[Adapter]:
    """POST /v1/adapters. Looks at the files now, reads them when it is sent."""
    parts = find_parts(path)
    # The name comes first: a server can refuse it before it reads the files.
    fields = {"name": checked_name(default_name(path) if name is None else name)}
    for field, value in options.items():
        fields[field] = value if isinstance(value, str) else json.dumps(value)
    upload = MultipartBody(fields, parts, on_progress)
    return Call("POST", "/v1/adapters", Adapter, upload=upload, is_repeatable=False)


def fetch_adapter(
    name: str, source: str, sha256: str | None, options: RegisterOptions
) -> Call[Adapter]:
    """POST /v1/adapters, for the server to fetch."""
    body = {"name": checked_name(name), "source": source, **options}
    if sha256 is not None:
        body["sha256"] = sha256
    return Call("POST", "/v1/adapters", Adapter, json=body, is_repeatable=False)


def validate_adapter(
    path: Path, check_base: bool, on_progress: Progress | None
) -> Call[AdapterValidation]:
    """POST /v1/adapters/validate."""
    fields = {"check_base": json.dumps(check_base)}
    upload = MultipartBody(fields, find_parts(path), on_progress)
    return Call("POST", "/v1/adapters/validate", AdapterValidation, upload=upload)


def list_versions(name: str, page_size: int) -> Call[Page[Adapter]]:
    """GET /v1/adapters/{name}/versions, the first page."""
    return list_call(f"/v1/adapters/{segment(name)}/versions", AdapterVersions, page_size)


def roll_back_adapter(name: str, version: int | None, adapter_id: str | None) -> Call[Adapter]:
    """POST /v1/adapters/{name}/rollback."""
    if (version is None) == (adapter_id is None):
        raise UsageError("give either the number of a version or its id")
    body = {"version": version} if adapter_id is None else {"id": adapter_id}
    return Call("POST", f"/v1/adapters/{segment(name)}/rollback", Adapter, json=body)


def change_adapter(name: str, settings: AdapterSettings) -> Call[Adapter]:
    """PATCH /v1/adapters/{name}."""
    return Call("PATCH", f"/v1/adapters/{segment(name)}", Adapter, json=dict(settings))


def list_adapters(page_size: int) -> Call[Page[Adapter]]:
    """GET /v1/adapters, the first page."""
    return list_call("/v1/adapters", AdapterPage, page_size)


def get_adapter(name: str) -> Call[Adapter]:
    """GET /v1/adapters/{name}."""
    return Call("GET", f"/v1/adapters/{segment(name)}", Adapter)


def delete_adapter(name: str, mode: str | None, timeout_s: float | None) -> Call[AdapterDeleted]:
    """DELETE /v1/adapters/{name}."""
    params: dict[str, str | int | float] = {}
    if mode is not None:
        params["mode"] = mode
    if timeout_s is not None:
        params["timeout_s"] = timeout_s
    path = f"/v1/adapters/{segment(name)}"
    return Call("DELETE", path, AdapterDeleted, params=params, is_repeatable=False)


def prefetch_adapter(name: str) -> Call[AdapterPrefetch]:
    """POST /v1/adapters/{name}/prefetch."""
    return Call("POST", f"/v1/adapters/{segment(name)}/prefetch", AdapterPrefetch)
