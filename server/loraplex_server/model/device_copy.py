"""Small tables to the device of the logits and back, without waiting for what it is doing."""

from __future__ import annotations

import torch


def copy_to(device: torch.device, host: torch.Tensor) -> torch.Tensor:
    """Return a copy of `host` on `device`, or `host` itself where that is the CPU.

    From pageable memory the copy would wait for everything enqueued before it. torch hands a pinned
    block out again only when the copies that read it are done.
    """
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def copy_from(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the host, in pinned memory if `tensor` is on another device.

    It holds nothing before an event recorded behind it on the current stream has completed.
    """
    if tensor.device.type == "cpu":
        return tensor.clone()
    return tensor.to("cpu", non_blocking=True)
