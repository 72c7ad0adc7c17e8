"""The elementwise kernels under the interpreter; `make test-gpu` runs the same checks compiled."""

from __future__ import annotations

import pytest
import torch

from tests.support.elementwise_checks import ELEMENTWISE_CHECKS


@pytest.mark.parametrize(
    "check",
    [check for _, check in ELEMENTWISE_CHECKS],
    ids=[name for name, _ in ELEMENTWISE_CHECKS],
)
def test_elementwise(check):
    check(torch.device("cpu"))
