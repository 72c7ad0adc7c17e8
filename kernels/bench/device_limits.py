"""What this device can do at best: copy bandwidth, matrix rate, and the cost of a launch.

Everything else is given as a share of these, measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from device_clock import DeviceClock


@triton.jit
def _empty_kernel(x):  # noqa: ANN001, ANN202  Triton types a kernel at its launch
    pass


@dataclass(frozen=True)
class DeviceLimits:
    """Measured ceilings.

    Attributes:
        copy_gb_s: device to device, bytes read plus bytes written.
        gemm_tflop_s: bfloat16, 8192 cubed, random data.
        node_us: one more node in a chain of a CUDA graph: an empty kernel of one program.
        wide_node_us: the same with a grid of 1056 programs.
    """

    copy_gb_s: float
    gemm_tflop_s: float
    node_us: float
    wide_node_us: float

    @property
    def bytes_per_us(self) -> float:
        return self.copy_gb_s * 1e3


def measure_limits(clock: DeviceClock) -> DeviceLimits:
    """Measure; about ten seconds on a GPU."""
    copy_us, copy_bytes = _time_copy(clock)
    gemm_us, flops = _time_gemm(clock)
    return DeviceLimits(
        copy_gb_s=copy_bytes / copy_us / 1e3,
        gemm_tflop_s=flops / gemm_us / 1e6,
        node_us=_time_node(clock, 1),
        wide_node_us=_time_node(clock, 1056 if clock.is_cuda else 2),
    )


def _time_copy(clock: DeviceClock) -> tuple[float, int]:
    num_bytes = 2 << 30 if clock.is_cuda else 1 << 16
    source = torch.randint(0, 255, (num_bytes,), dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy_us = clock.compare_us({"copy": [lambda: target.copy_(source)]})["copy"]
    return copy_us, 2 * num_bytes


def _time_gemm(clock: DeviceClock) -> tuple[float, int]:
    n = 8192 if clock.is_cuda else 32
    a, b = (torch.randn(n, n, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    gemm_us = clock.compare_us({"gemm": [lambda: torch.mm(a, b, out=out)] * 3})["gemm"]
    return gemm_us, 2 * n**3


def _time_node(clock: DeviceClock, num_programs: int) -> float:
    x = torch.zeros(16, device=clock.device)
    calls = [lambda: _empty_kernel[(num_programs,)](x)] * (1000 if clock.is_cuda else 3)
    return clock.compare_us({"node": calls})["node"]
