"""One rank's part of a checkpoint: Megatron's cut (arXiv 1909.08053) of every tensor, by its name.

Outputs of q, k, v, gate and up and the tokens of embedding and head are cut over the ranks; so are
the inputs of o and down, whose outputs then are summands. Their biases belong to rank 0 alone.
Norms are whole on each rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from loraplex_memory.layout import PROJECTIONS, SITES, Projection
from loraplex_memory.partition import ROW_PARALLEL, Cut, Partition, even_cut
from loraplex_memory.sharding import take
from loraplex_server.model.spec import ModelSpec


@dataclass(frozen=True)
class ModelShard:
    """The part of `rank` of `partition`."""

    partition: Partition
    rank: int

    def spec(self, spec: ModelSpec) -> ModelSpec:
        """Return the spec whose parameters have the shapes of the part."""
        tokens = even_cut(spec.vocab_size, self.partition.num_ranks, self.rank)
        return replace(spec, geometry=self.partition.shard, vocab_size=tokens.width)

    def own(self, name: str, tensor: torch.Tensor, spec: ModelSpec) -> torch.Tensor:
        """Return the part of the tensor called `name`; anything of another shape comes back whole.

        Whoever puts it in its place refuses it there.

        Args:
            spec: of the whole model.
        """
        if self.partition.num_ranks == 1:
            return tensor
        if name.startswith(("model.embed_tokens.", "lm_head.")):
            return self._own_tokens(tensor, spec.vocab_size)
        module, _, kind = name.rpartition(".")
        names = _PROJECTIONS.get(module.rpartition(".")[2])
        if names is None:
            return tensor
        if names[0] in ROW_PARALLEL:
            return self._own_inputs(tensor, names[0], kind)
        geometry = self.partition.geometry
        widths = [geometry.out_features(p) for p in names]
        if tensor.shape[0] != sum(widths):
            return tensor
        cuts = [self.partition.outputs(p, self.rank) for p in names]
        pieces = zip(torch.split(tensor, widths), cuts, strict=True)
        return torch.cat([_take(piece, cut, dim=0) for piece, cut in pieces])

    def _own_tokens(self, tensor: torch.Tensor, vocab_size: int) -> torch.Tensor:
        if tensor.dim() != 2 or tensor.shape[0] != vocab_size:
            return tensor
        return take(tensor, even_cut(vocab_size, self.partition.num_ranks, self.rank), dim=0)

    def _own_inputs(self, tensor: torch.Tensor, projection: Projection, kind: str) -> torch.Tensor:
        if kind == "bias":
            return tensor if self.rank == 0 else torch.zeros_like(tensor)
        if tensor.dim() != 2 or tensor.shape[1] != self.partition.geometry.in_features(projection):
            return tensor
        return take(tensor, self.partition.inputs(projection, self.rank), dim=1)


#: What linears hold, by the last part of a checkpoint's module name; fused ones in their order.
_PROJECTIONS: dict[str, tuple[Projection, ...]] = {
    **{f"{projection}_proj": (projection,) for projection in PROJECTIONS},
    **{f"{site}_proj": projections for site, projections in SITES.items()},
}


def _take(tensor: torch.Tensor, cut: Cut, *, dim: int) -> torch.Tensor:
    """Return the cut of a matrix, or of a vector."""
    if tensor.dim() == 2:
        return take(tensor, cut, dim=dim)
    return take(tensor[:, None], cut, dim=dim)[:, 0]
