"""Everything about an adapter but its numbers: what the engine must know before it reads a tensor.

An adapter is LoRA pairs, at true ranks, and *parts*: whatever else it brings, each a matrix of some
rows. A part belongs to layers (a bias, a norm, the keys and values of a prefix) or to the model as
a whole (embedding rows, a head). This file names every part there is; what each does is written at
its name, and `loraplex_server.model.adapter_edits` does it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from loraplex_memory.layout import PROJECTIONS, SITES, ModelGeometry, Projection, Site
from loraplex_memory.partition import ROW_PARALLEL

#: `ranks[layer][projection]`, projections in the order of `PROJECTIONS`; 0 is "no module here".
AdapterRanks = tuple[tuple[int, ...], ...]


def out_scale(projection: Projection) -> str:
    """`y = out_scale * (W x + b + s B A x) + bias`; `[1, out]`, in pages `[2, out]` to be added."""
    return f"out_scale.{projection}"


def is_out_scale(name: str) -> bool:
    """Whether a part is an `out_scale`."""
    return name.startswith("out_scale.")


def bias(projection: Projection) -> str:
    """Added to the projection's output, after its scale; `[1, out]`."""
    return f"bias.{projection}"


def in_scale(site: Site) -> str:
    """Multiplies the input of a site, before the base and before A; `[1, in]`."""
    return f"in_scale.{site}"


#: Replace the weights of a layer's norms; `[1, H]`, and `[1, head_dim]` of q and k.
INPUT_NORM: Final = "norm.input"
POST_NORM: Final = "norm.post"
Q_NORM: Final = "norm.q"
K_NORM: Final = "norm.k"
#: K and V of the tokens before the prompt, as the cache holds them (rotated, if they ever were);
#: `[n, 2 * kv_heads * head_dim]`, K first. The prompt's own positions begin at n.
KV_PREFIX: Final = "kv_prefix"

#: Embeddings of the tokens before the prompt; `[n, H]`.
SOFT_PROMPT: Final = "soft_prompt"
#: Replace the embeddings of the tokens `AdapterSpec.token_ids`; `[m, H]`.
TOKEN_ROWS: Final = "token_rows"
#: Replace the head's rows of the tokens `AdapterSpec.head_token_ids`; `[m, H]`.
HEAD_ROWS: Final = "head_rows"
#: Replaces the weight of the last norm; `[1, H]`.
FINAL_NORM: Final = "norm.final"
#: LoRA on the embedding: `A^T[token] B` is added; `[V, R]` and `[R, H]`, scale folded into B.
EMBEDDING_A: Final = "embedding.A"
EMBEDDING_B: Final = "embedding.B"
#: LoRA on the head: `(x A^T) B` is added; `[R, H]` and `[R, V]`, scale folded into B.
HEAD_A: Final = "head.A"
HEAD_B: Final = "head.B"
#: Replace the embedding, and the head; `[V, H]`.
EMBEDDING: Final = "embedding"
HEAD: Final = "head"

#: In the order in which they lie behind the LoRA pairs of a layer.
LAYER_PARTS: Final[tuple[str, ...]] = (
    *(out_scale(p) for p in PROJECTIONS),
    *(bias(p) for p in PROJECTIONS),
    *(in_scale(site) for site in SITES),
    INPUT_NORM,
    POST_NORM,
    Q_NORM,
    K_NORM,
    KV_PREFIX,
)

#: In the order in which they lie behind the layers' pages.
MODEL_PARTS: Final[tuple[str, ...]] = (
    SOFT_PROMPT,
    TOKEN_ROWS,
    HEAD_ROWS,
    FINAL_NORM,
    EMBEDDING_A,
    EMBEDDING_B,
    HEAD_A,
    HEAD_B,
    EMBEDDING,
    HEAD,
)

#: Change a linear's output in its own epilogue; all other parts need `adapter_edits`.
EPILOGUE_PARTS: Final = frozenset(LAYER_PARTS[: 2 * len(PROJECTIONS)])

#: Those of them that belong to row-parallel linears.
ROW_PARALLEL_PARTS: Final = frozenset(part(p) for p in ROW_PARALLEL for part in (out_scale, bias))


@dataclass(frozen=True)
class Part:
    """The shape of one part, the same in all layers that have it.

    Attributes:
        name: one of `LAYER_PARTS` or `MODEL_PARTS`.
        num_rows: rows of the matrix.
        row_elems: elements of one.
        layers: which layers have it, ascending; empty for a part of the whole model.
    """

    name: str
    num_rows: int
    row_elems: int
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class AdapterSpec:
    """Immutable, hashable, and small: it travels with every request that names the adapter.

    Attributes:
        ranks: true rank per layer and projection.
        parts: what else it has, in the order of `LAYER_PARTS`, then `MODEL_PARTS`.
        token_ids: whose embeddings `TOKEN_ROWS` replaces, ascending.
        head_token_ids: whose head rows `HEAD_ROWS` replaces, ascending.
        invocation_token_ids: an activated LoRA (aLoRA): it applies from the last place where the
            prompt holds these tokens, and nowhere if it does not. Empty for all others.
    """

    ranks: AdapterRanks
    parts: tuple[Part, ...] = ()
    token_ids: tuple[int, ...] = ()
    head_token_ids: tuple[int, ...] = ()
    invocation_token_ids: tuple[int, ...] = ()

    def part(self, name: str) -> Part | None:
        """Return the part of this name, if the adapter has it."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}

    @cached_property
    def num_virtual_tokens(self) -> int:
        """Tokens that stand before every prompt: of a soft prompt or of a prefix of keys."""
        return sum(part.num_rows for part in self.parts if part.name in (SOFT_PROMPT, KV_PREFIX))

    @cached_property
    def is_additive(self) -> bool:
        """Whether it only adds `B A x` to linears, so that it can be weighted and mixed."""
        return not self.parts and not self.invocation_token_ids


def part_row_elems(name: str, geometry: ModelGeometry) -> int | None:
    """Return the row length that a part must have; None where it is the rank or the vocabulary."""
    kind, _, of = name.partition(".")
    if kind in ("out_scale", "bias"):
        return next(geometry.out_features(p) for p in PROJECTIONS if p == of)
    if kind == "in_scale":
        return next(geometry.in_features(ps[0]) for site, ps in SITES.items() if site == of)
    if name in (Q_NORM, K_NORM):
        return geometry.head_dim
    if name == KV_PREFIX:
        return geometry.kv_elems_per_token
    return None if name in (EMBEDDING_A, HEAD_B) else geometry.hidden_size


def ordered(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Return parts in the order in which an `AdapterSpec` holds them."""
    order = {name: at for at, name in enumerate((*LAYER_PARTS, *MODEL_PARTS))}
    return tuple(sorted(parts, key=lambda part: order[part.name]))
