"""Versions of names and their contents, as the registry stores them. Data only."""

from __future__ import annotations

from dataclasses import dataclass

from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_server.adapters.registration import NameSettings


@dataclass(frozen=True)
class StoredAdapter:
    """What is known of one content, whatever it is called."""

    adapter_id: str
    spec: AdapterSpec
    size_bytes: int
    native_bytes: int
    self_test_error: float | None


@dataclass(frozen=True)
class VersionRow:
    """One version of a name, with its content and the name's settings, as stored."""

    name: str
    version: int
    is_current: bool
    adapter: StoredAdapter
    base_model: str
    created: int
    source: str
    last_used: int | None
    settings: NameSettings
    owner: str

    @property
    def adapter_id(self) -> str:
        return self.adapter.adapter_id


@dataclass(frozen=True)
class NewVersion:
    """What is to be registered."""

    name: str
    adapter: StoredAdapter
    base_model: str
    created: int
    source: str
    report: str
    owner: str = ""
