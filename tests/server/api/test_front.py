from __future__ import annotations

import asyncio
import threading

import pytest

from loraplex_server.adapters.lease import AdapterLease
from loraplex_server.api import front
from loraplex_server.api.job import WeightedAdapter
from loraplex_server.api.model_names import Answerer


async def test_leases_of_all_models_are_given_back_although_the_request_is_cancelled():
    gate, released, all_released = threading.Event(), [], asyncio.Event()
    loop = asyncio.get_running_loop()

    def release(lease):
        assert gate.wait(30)
        released.append(lease)
        if released == leases:
            loop.call_soon_threadsafe(all_released.set)

    leases = [AdapterLease(None, None, release) for _ in range(2)]
    answerers = [Answerer((WeightedAdapter(lease),), "x") for lease in leases]
    releasing = asyncio.create_task(front._release_all(answerers))
    await asyncio.sleep(0)
    releasing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await releasing
    gate.set()
    await asyncio.wait_for(all_released.wait(), 30)
