"""What a forward pass leaves before the head, for those who want more of it than a next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from loraplex_kernels.collectives import Collectives
from loraplex_server.model.adapter_edits import AdapterEdits
from loraplex_server.model.linear import Linear


class FinalStates(Protocol):
    """Final hidden states behind the last norm; valid until the model's next step.

    Attributes:
        x: `[N, H]` of the model's dtype, one row for each that was asked for.
    """

    @property
    def x(self) -> torch.Tensor: ...

    def logits(self, first: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits of the rows `[first, stop)`, float32 `[stop - first, V]`.

        A row's are those that `Transformer.forward` returns for it.
        """


@dataclass(frozen=True)
class HeadInput:
    """Implements `FinalStates` with plain torch operations, on any device.

    Attributes:
        head: of several ranks, the rank's share of the tokens' rows.
        vocab_size: tokens that there are.
        group: the ranks; each gets all logits.
    """

    x: torch.Tensor
    head: Linear
    vocab_size: int
    edits: AdapterEdits | None
    group: Collectives | None = None

    def logits(self, first: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """See `FinalStates`."""
        x = self.x[first:stop]
        logits = self.head(x)
        if self.group is not None:
            # [ranks, rows, tokens of one] -> [rows, tokens], without those that pad the last share
            shares = self.group.all_gather(logits, "head")
            logits = shares.transpose(0, 1).flatten(1)[:, : self.vocab_size]
        logits = logits.float() if out is None else out.copy_(logits)
        if self.edits is not None:
            self.edits.head(logits, x, None if len(x) == len(self.x) else first)
        return logits
