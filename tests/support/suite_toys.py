"""Checks that end in every way a check can, for the test of `gpu_suite`."""

from __future__ import annotations

import os
import time

import torch


def _print(device):
    print("noise that must not be taken for a reply")
    assert device.type == "cpu"


def _fail(device):
    torch.testing.assert_close(torch.ones(2, device=device), torch.zeros(2, device=device))


def _crash(device):
    os._exit(7)


def _hang(device):
    time.sleep(600)


def _device_error(device):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


CHECKS = [
    ("passes", _print),
    ("fails", _fail),
    ("crashes", _crash),
    ("hangs", _hang),
    ("breaks the device", _device_error),
    ("passes after all that", _print),
]
