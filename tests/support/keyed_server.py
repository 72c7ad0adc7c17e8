"""A running server with keys, and clients of its tenants."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from loraplex_server.adapters.audit_log import Actor
from loraplex_server.tenants.api_key import KeyWish
from loraplex_server.tenants.principal import Role
from tests.server.api.conftest import Running, running_server

#: Who there is: a name, a role, a tenant.
PEOPLE = (
    ("root", Role.ADMIN, ""),
    ("acme-up", Role.UPLOADER, "acme"),
    ("acme-app", Role.USER, "acme"),
    ("zeta-up", Role.UPLOADER, "zeta"),
    ("zeta-app", Role.USER, "zeta"),
)


@dataclass
class Keyed:
    """A server, and a client of it for each of `PEOPLE`."""

    server: Running
    clients: dict[str, httpx.Client]
    key_ids: dict[str, str]

    def __getitem__(self, person: str) -> httpx.Client:
        return self.clients[person]

    def upload(self, person: str, name: str, folder: Path, **fields: str) -> httpx.Response:
        files = [("files", (path.name, path.read_bytes())) for path in sorted(folder.iterdir())]
        data = {"name": name, **fields}
        return self[person].post("/v1/adapters", data=data, files=files)

    def generate(self, person: str, model: str, **fields: object) -> httpx.Response:
        body = {"model": model, "prompt": "abcdef", "max_tokens": 4, **fields}
        return self[person].post("/v1/completions", json=body)


@contextlib.contextmanager
def keyed_server(data_dir: Path, vocabulary, **settings) -> Iterator[Keyed]:
    with (
        running_server(data_dir, vocabulary, **settings) as server,
        contextlib.ExitStack() as stack,
    ):
        store, clients, key_ids = server.app.state.tenants.key_store, {}, {}
        for name, role, tenant in PEOPLE:
            key, secret = store.create(KeyWish(name, role, tenant), Actor())
            headers = {"authorization": f"Bearer {secret}"}
            client = httpx.Client(base_url=server.url, headers=headers, timeout=20)
            clients[name], key_ids[name] = stack.enter_context(client), key.key_id
        yield Keyed(server, clients, key_ids)
