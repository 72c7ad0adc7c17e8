from __future__ import annotations

import asyncio
import os

from loraplex_server.engine import child
from loraplex_server.engine.child import EngineChild
from loraplex_server.engine.errors import EngineConfigError
from loraplex_server.engine.messages import StartFailed


def tell_environment(wake):
    raise EngineConfigError(f"{os.environ['LORAPLEX_A']} {os.environ['LORAPLEX_B']}")


async def test_the_process_has_its_environment_where_the_user_has_set_nothing(monkeypatch):
    ours = {"LORAPLEX_A": "ours", "LORAPLEX_B": "ours"}
    monkeypatch.setattr(child, "ENGINE_ENVIRONMENT", ours)
    monkeypatch.setenv("LORAPLEX_B", "the user's")
    replies = []
    engine = EngineChild(tell_environment, replies.append)
    assert "LORAPLEX_A" not in os.environ
    async with asyncio.timeout(60):
        await engine.gone.wait()
    assert replies == [StartFailed("ours the user's")]
    await engine.end()
