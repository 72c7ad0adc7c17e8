"""Whether a request could run here at all, and what of its adapter the scheduler must know."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from loraplex_memory.adapter_layout import AdapterLayout
from loraplex_memory.adapter_manifest import AdapterManifest
from loraplex_memory.adapter_spec import AdapterSpec
from loraplex_memory.layout import PoolLayout
from loraplex_scheduler.errors import RequestRefused
from loraplex_scheduler.limits import SchedulerLimits
from loraplex_scheduler.plan import Request

#: Layouts remembered; one takes some 10 kB on an 8B model.
_MAX_LAYOUTS: Final = 512


class AdapterLayouts:
    """Owned by the scheduler. Offsets follow from the spec, so adapters of equal specs share them;
    the least recently used are forgotten.
    """

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._layouts: OrderedDict[AdapterSpec, AdapterLayout] = OrderedDict()

    def of(self, manifest: AdapterManifest) -> AdapterLayout:
        """Return where the adapter's matrices lie inside its pages."""
        layout = self._layouts.get(manifest.spec)
        if layout is None:
            layout = self._layouts[manifest.spec] = AdapterLayout(self._layout, manifest.spec)
            if len(self._layouts) > _MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        else:
            self._layouts.move_to_end(manifest.spec)
        return layout


def prefix_of(request: Request) -> tuple[str | None, int]:
    """Return whose prefixes its prompt shares (None: the base's), and up to which token.

    Up to its start an activated LoRA computes what the base does. What comes of the same tokens
    behind that depends on where it is, too. So does what a mixture or a weighted adapter computes
    on more than one adapter's id.
    """
    adapter = request.adapter
    if adapter is None:
        return None, sys.maxsize
    if adapter.spec.invocation_token_ids:
        return None, request.adapter_start
    if request.more_adapters or request.adapter_weight != 1.0:
        return None, 0  # nobody is likely to ask for the same mixture with the same weights
    return adapter.adapter_id, sys.maxsize


def check_mixture(request: Request) -> None:
    """Refuse weights and mixtures of adapters that do more than add to linears.

    Raises:
        RequestRefused: naming the adapter.
    """
    chosen = request.adapters
    ids = [manifest.adapter_id for manifest, _ in chosen]
    if request.more_adapters and not chosen:
        raise RequestRefused(reason="the base model has no adapter to mix with", param="adapters")
    if len(set(ids)) < len(ids):
        raise RequestRefused(reason="the adapters of a mixture must differ", param="adapters")
    if not request.more_adapters and request.adapter_weight == 1.0:
        return
    for manifest, weight in chosen:
        if not manifest.spec.is_additive:
            raise RequestRefused(
                reason=f"adapter {manifest.adapter_id} does more than add to linears, so it can "
                "be neither weighted nor mixed with others",
                param="adapters",
            )
        if not math.isfinite(weight):
            raise RequestRefused(reason=f"the weight {weight} is not finite", param="adapters")


def fitting_len(
    request: Request,
    adapter_layouts: Sequence[AdapterLayout],
    limits: SchedulerLimits,
    layout: PoolLayout,
    num_pages: int,
) -> int:
    """Return the most tokens its sequence may have: the model's limit, or what the pool of
    `num_pages` holds beside its adapters.

    Raises:
        RequestRefused: there is no room for the prompt and one token.
    """
    num_prompt, num_virtual = len(request.prompt_token_ids), request.num_virtual
    num_adapter = sum(layout.num_pages for layout in adapter_layouts)
    in_pool = (num_pages - num_adapter) * layout.page_tokens
    max_len = min(limits.max_model_len, in_pool)
    if num_prompt == num_virtual:
        raise RequestRefused(reason="the prompt is empty", param="prompt")
    if num_prompt < max_len:
        return max_len
    limit = f"the model's limit is {limits.max_model_len}"
    if in_pool < limits.max_model_len:
        limit = (
            f"the pool of {num_pages} pages holds {max(0, in_pool)} beside "
            f"the {num_adapter} pages of adapters: serve with a larger pool"
        )
    tokens = f"{num_prompt - num_virtual} tokens"
    if num_virtual:
        tokens += f" behind {num_virtual} virtual tokens of the adapter"
    raise RequestRefused(
        reason=f"the prompt has {tokens} and needs room for one more; {limit}",
        param="prompt",
    )
