"""The sampling kernel under the interpreter; `make test-gpu` runs the same checks compiled."""

from __future__ import annotations

import pytest
import torch

from tests.support.sampling_checks import SAMPLING_CHECKS

CHECKS = dict(SAMPLING_CHECKS)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
def test_sampling(check):
    check(torch.device("cpu"))
