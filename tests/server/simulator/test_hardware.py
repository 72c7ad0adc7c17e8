from __future__ import annotations

import pytest

from loraplex_server.simulator.errors import SimulationError
from loraplex_server.simulator.hardware import all_hardware, find_hardware
from loraplex_server.simulator.models import find_setting


def test_every_device_names_its_source():
    for device in all_hardware().values():
        assert "data sheet" in device.source
        assert device.flops > device.bandwidth > device.host_link > device.disk > 1e9


def test_an_unknown_device_is_answered_with_those_there_are():
    with pytest.raises(SimulationError, match="a100-80g"):
        find_hardware("abacus")


def test_an_unknown_setting_is_answered_with_those_there_are():
    with pytest.raises(SimulationError, match="S1, S2"):
        find_setting("S9")
