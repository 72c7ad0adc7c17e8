"""The LoRA kernels under the interpreter; `make test-gpu` runs the same checks compiled."""

from __future__ import annotations

import pytest
import torch

from tests.support.lora_checks import LORA_CHECKS


@pytest.mark.parametrize(
    "check", [check for _, check in LORA_CHECKS], ids=[name for name, _ in LORA_CHECKS]
)
def test_lora(check):
    check(torch.device("cpu"))
