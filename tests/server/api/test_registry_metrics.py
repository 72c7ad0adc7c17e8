"""What `/metrics` says of a registry that servers share."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from loraplex_server.api.app import create_app
from loraplex_server.api.services import Services
from loraplex_server.config import Config
from tests.server.api.conftest import BASE
from tests.support.adapters import make_catalog
from tests.support.fake_engine import FakeEngine


@pytest.mark.parametrize("is_shared", [True, False])
def test_the_age_of_what_is_known_is_told_where_there_is_something_to_follow(
    is_shared, tmp_path, vocabulary
):
    url = f"sqlite:///{tmp_path / 'registry'}" if is_shared else None
    shared = {"registry_url": url, "blob_url": str(tmp_path / "blobs")} if is_shared else {}
    catalog = make_catalog(tmp_path / "data", base_name=BASE, **shared)
    config = Config(data_dir=tmp_path / "data", registry_url=url)
    services = Services(config, FakeEngine(), catalog, vocabulary, base_names=(BASE,))

    async def ages() -> list[float]:
        app = httpx.ASGITransport(create_app(services))
        async with httpx.AsyncClient(transport=app, base_url="http://localhost") as client:
            page = (await client.get("/metrics")).text
        lines = [line.split() for line in page.splitlines()]
        return [float(line[1]) for line in lines if line[0] == "loraplex_registry_age_seconds"]

    try:
        found = asyncio.run(ages())
        assert len(found) == is_shared
        assert all(0 <= age < 300 for age in found)
    finally:
        catalog.close()
