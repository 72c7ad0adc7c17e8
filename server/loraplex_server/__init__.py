"""The serving process: HTTP, engine loop, base model, adapter catalogue.

`Engine` (see `offline`) runs the same engine without a server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraplex_server.offline import Completion, Engine

__all__ = ["Completion", "Engine"]


def __getattr__(name: str) -> Any:
    # On first use: importing a module of this package must not import torch.
    if name in __all__:
        from loraplex_server import offline

        return getattr(offline, name)
    raise AttributeError(name)
