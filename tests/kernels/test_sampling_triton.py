"""The sampling kernel under the interpreter; `make test-gpu` runs the same checks compiled."""

from __future__ import annotations

import pytest
import torch

from tests.support.sampling_checks import SAMPLING_CHECKS


@pytest.mark.parametrize(
    "check", [check for _, check in SAMPLING_CHECKS], ids=[name for name, _ in SAMPLING_CHECKS]
)
def test_sampling(check):
    check(torch.device("cpu"))
