"""The attention kernels under the interpreter; `make test-gpu` runs the same checks compiled."""

from __future__ import annotations

import pytest
import torch

from tests.support.attention_checks import ATTENTION_CHECKS


@pytest.mark.parametrize(
    "check", [check for _, check in ATTENTION_CHECKS], ids=[name for name, _ in ATTENTION_CHECKS]
)
def test_attention(check):
    check(torch.device("cpu"))
