from __future__ import annotations

import asyncio
import threading

import pytest

from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.api import front
from loraplex_server.api.job import WeightedAdapter
from loraplex_server.api.model_names import Answerer


async def test_leases_of_all_models_are_given_back_although_the_request_is_cancelled():
    gate, released = threading.Event(), []

    def release(lease):
        assert gate.wait(30)
        released.append(lease)

    leases = [AdapterLease(None, None, release) for _ in range(2)]
    answerers = [Answerer((WeightedAdapter(lease),), "x") for lease in leases]
    releasing = asyncio.create_task(front._release_all(answerers))
    await asyncio.sleep(0)
    releasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await releasing
    gate.set()
    async with asyncio.timeout(30):
        while released != leases:
            await asyncio.sleep(0.01)
