"""The scatter kernel under the interpreter; `make test-gpu` runs the same checks compiled."""

from __future__ import annotations

import pytest
import torch

from tests.support.scatter_checks import GPU_ONLY, SCATTER_CHECKS

CHECKS = {name: check for name, check in SCATTER_CHECKS if name not in GPU_ONLY}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_scatter(check):
    check(torch.device("cpu"))
