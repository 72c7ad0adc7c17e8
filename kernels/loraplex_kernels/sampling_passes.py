"""Passes over one row of logits, from which `sampling_triton` puts a row's choice together.

A row is seen as distances `d = peak - logit >= 0` from its maximum. The weight of a token is
`exp2(-d log2(e) / temperature)`, 1 for the likeliest: float32 like the softmax of the server's
`draw.py`, and summed in float64. Two logits are told apart even where `draw.py`, which compares
quotients, finds both quotients rounded to the same number.

**No sort.** A filter keeps the tokens within some distance. The least distance that keeps enough is
found by bisection over the bits of `d` (its *key*), which order as integers because `d >= 0`, three
keys to a pass. As soon as no more than `CAPACITY` tokens can be kept, these are moved together, and
what is left of the search and the draw reads them alone.

Everywhere: `values_ptr` points to `n` logits, float32. `IS_ALIGNED`: all pointers are multiples of
16 bytes and all lengths multiples of 4, so that reads are 16 bytes wide.
"""

# Triton reads the annotations of a kernel as types of its own: only constexprs have one.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

#: Blocks in flight, so that a lone row does not wait for memory block after block.
_STAGES = tl.constexpr(3)


@triton.jit
def find_peak(row_ptr, n, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the maximum, the lowest id that has it, and whether it is finite with no NaN.

    A lane keeps the maximum of four neighbours and the block it was first seen in; which of the
    four it was is asked once, at the end. NaN counts as infinite.
    """
    best = tl.full([BLOCK // 4], float("-inf"), tl.float32)
    best_start = tl.zeros([BLOCK // 4], tl.int32)
    for start in tl.range(0, n, BLOCK, num_stages=_STAGES):
        x = _load(row_ptr, start, n, float("-inf"), IS_ALIGNED, BLOCK)
        x = tl.where(x != x, float("inf"), x)
        most = tl.max(tl.reshape(x, [BLOCK // 4, 4]), 1)
        best_start = tl.where(most > best, start, best_start)
        best = tl.maximum(most, best)
    peak = tl.max(best, 0)
    first_four = tl.min(tl.where(best == peak, best_start + 4 * tl.arange(0, BLOCK // 4), n), 0)
    ids = first_four + tl.arange(0, 4)
    x = tl.load(row_ptr + ids, mask=ids < n, other=float("-inf"))
    token = tl.min(tl.where(x == peak, ids, n - 1), 0)
    return peak, token, tl.abs(peak) < float("inf")


@triton.jit
def narrow_to(
    values_ptr,
    n,
    is_moved,
    peak,
    scale,
    near,
    half,
    far,
    least,
    share,
    near_logits_ptr,
    near_ids_ptr,
    CAPACITY: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the least distance up to `far` that keeps `least` tokens and `share` of far's mass.

    Keys are the bits of distances. The bracket is `(out_key, in_key]`: `out_key` keeps too little,
    `in_key` enough, or it is `far`. `near` and `half` are where to look first.

    Returns:
        Where the tokens that may be kept lie now, how many, whether they were moved, and the key.
    """
    out_key = tl.full([], -1, tl.int32)
    out_count = tl.full([], 0, tl.int32)
    in_key, in_count, least_mass = far, n, tl.full([], 0.0, tl.float64)
    is_first = 1
    while (is_first != 0) | ((in_key - out_key > 1) & (in_count - out_count > 1)):
        c1, c2, c3, m1, m2, m3 = _measure(
            values_ptr, n, peak, scale, near, half, far, IS_ALIGNED, BLOCK
        )
        if is_first != 0:
            in_count, least_mass, is_first = c3, share * m3, 0
        out_key, out_count, in_key, in_count = _narrow(
            out_key, out_count, in_key, in_count,
            near, half, far, c1, c2, c3, m1, m2, m3, least, least_mass,
        )  # fmt: skip
        if (in_count <= CAPACITY) & (is_moved == 0):
            n = _move(values_ptr, n, peak, in_key, near_logits_ptr, near_ids_ptr, IS_ALIGNED, BLOCK)
            tl.debug_barrier()  # what other threads of the program moved is read from now on
            values_ptr, is_moved = near_logits_ptr, 1
        step = (in_key - out_key) // 4
        near, half, far = out_key + step, out_key + (in_key - out_key) // 2, in_key - step
    return values_ptr, n, is_moved, in_key


@triton.jit
def _narrow(
    out_key,
    out_count,
    in_key,
    in_count,
    near,
    half,
    far,
    c1,
    c2,
    c3,
    m1,
    m2,
    m3,
    least,
    least_mass,
):
    """Return the bracket between the largest of three keys that keeps too little and the next."""
    is_1 = (c1 >= least) & (m1 >= least_mass)
    is_2 = (c2 >= least) & (m2 >= least_mass)
    is_3 = (c3 >= least) & (m3 >= least_mass)
    above = tl.where(is_1, near, tl.where(is_2, half, tl.where(is_3, far, in_key)))
    above_count = tl.where(is_1, c1, tl.where(is_2, c2, tl.where(is_3, c3, in_count)))
    below = tl.where(is_1, out_key, tl.where(is_2, near, tl.where(is_3, half, far)))
    below_count = tl.where(is_1, out_count, tl.where(is_2, c1, tl.where(is_3, c2, c3)))
    return below, below_count, above, above_count


@triton.jit
def _measure(
    values_ptr, n, peak, scale, near, half, far, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return how many tokens each of three distances keeps (int32), and their mass (float64)."""
    d1, d2, d3 = distance_of(near), distance_of(half), distance_of(far)
    c1 = tl.zeros([BLOCK // 4], tl.int32)
    m1 = tl.zeros([BLOCK // 4], tl.float64)
    c2, c3, m2, m3 = c1, c1, m1, m1
    for start in tl.range(0, n, BLOCK, num_stages=_STAGES):
        distance = peak - _load(values_ptr, start, n, float("nan"), IS_ALIGNED, BLOCK)
        weight = tl.exp2(-distance * scale)
        c1, m1 = _add_kept(c1, m1, distance <= d1, weight, BLOCK)
        c2, m2 = _add_kept(c2, m2, distance <= d2, weight, BLOCK)
        c3, m3 = _add_kept(c3, m3, distance <= d3, weight, BLOCK)
    return (
        tl.sum(c1, 0), tl.sum(c2, 0), tl.sum(c3, 0), tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)
    )  # fmt: skip


@triton.jit
def _add_kept(count, mass, is_kept, weight, BLOCK: tl.constexpr):
    """Add a block to the sums of `BLOCK // 4` lanes."""
    fours = tl.reshape(is_kept.to(tl.int32), [BLOCK // 4, 4])
    return count + tl.sum(fours, 1), mass + _mass_of_fours(tl.where(is_kept, weight, 0.0), BLOCK)


@triton.jit
def _mass_of_fours(weight, BLOCK: tl.constexpr):
    """Return float64 `[BLOCK // 4]`: the four neighbours that one thread has read, summed by it."""
    return tl.sum(tl.reshape(weight, [BLOCK // 4, 4]), 1).to(tl.float64)


@triton.jit
def _move(
    row_ptr,
    n,
    peak,
    key,
    near_logits_ptr,
    near_ids_ptr,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the tokens that `key` keeps side by side, in vocabulary order.

    Returns:
        How many, rounded up to a multiple of 4: the rest are NaN, which nothing keeps.
    """
    furthest = distance_of(key)
    num_moved = 0
    for start in tl.range(0, n, BLOCK, num_stages=_STAGES):
        x = _load(row_ptr, start, n, float("nan"), IS_ALIGNED, BLOCK)
        is_kept = peak - x <= furthest
        num_kept = tl.sum(is_kept.to(tl.int32), 0)
        if num_kept > 0:
            at = num_moved + tl.cumsum(is_kept.to(tl.int32), 0) - 1
            tl.store(near_logits_ptr + at, x, mask=is_kept)
            tl.store(near_ids_ptr + at, start + tl.arange(0, BLOCK), mask=is_kept)
        num_moved += num_kept
    rest = tl.arange(0, 4)
    tl.store(near_logits_ptr + num_moved + rest, float("nan"), mask=rest < -num_moved & 3)
    return (num_moved + 3) // 4 * 4


@triton.jit
def invert_cumulative(
    values_ptr, n, peak, scale, cut, min_p, uniform, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the position of the first token whose cumulative mass exceeds `uniform` of it all."""
    total = tl.full([], 0.0, tl.float64)
    for start in tl.range(0, n, BLOCK, num_stages=_STAGES):
        weight = _weights(values_ptr, start, n, peak, scale, cut, min_p, IS_ALIGNED, BLOCK)
        total += tl.sum(_mass_of_fours(weight, BLOCK), 0)
    # The same sums in the same order, so some block exceeds the target, which is below the total.
    target = total * uniform
    before = tl.full([], 0.0, tl.float64)
    block = 0
    weight = _weights(values_ptr, 0, n, peak, scale, cut, min_p, IS_ALIGNED, BLOCK)
    mass = tl.sum(_mass_of_fours(weight, BLOCK), 0)
    while (before + mass <= target) & ((block + 1) * BLOCK < n):
        before += mass
        block += 1
        weight = _weights(values_ptr, block * BLOCK, n, peak, scale, cut, min_p, IS_ALIGNED, BLOCK)
        mass = tl.sum(_mass_of_fours(weight, BLOCK), 0)
    # A scan adds in another order than a sum: it may end just short of the target, and then the
    # last token with a weight is meant; nor may it stop at a token that has none.
    lanes = tl.arange(0, BLOCK)
    cumulative = before + tl.cumsum(weight.to(tl.float64), 0)
    first = tl.min(tl.where((cumulative > target) & (weight > 0), lanes, BLOCK), 0)
    last = tl.max(tl.where(weight > 0, lanes, 0), 0)
    return block * BLOCK + tl.minimum(first, last)


@triton.jit
def _weights(
    values_ptr,
    start,
    n,
    peak,
    scale,
    cut,
    min_p,
    IS_ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the weights of a block, float32 `[BLOCK]`: 0 where a filter excludes a token."""
    distance = peak - _load(values_ptr, start, n, float("nan"), IS_ALIGNED, BLOCK)
    weight = tl.exp2(-distance * scale)
    return tl.where((distance <= cut) & (weight >= min_p), weight, 0.0)


@triton.jit
def _load(values_ptr, start, n, beyond, IS_ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return a block of logits, float32 `[BLOCK]`, and `beyond` from `n` on."""
    ids = start + tl.arange(0, BLOCK)
    at = values_ptr + ids
    if IS_ALIGNED:  # what the compiler cannot see where it does not know which pointer this is
        at = tl.multiple_of(at, 16)
        n = n // 4 * 4
    return tl.load(at, mask=ids < n, other=beyond)


@triton.jit
def key_of(distance):
    return distance.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def distance_of(key):
    """Return the distance of a key; that of -1 is NaN, which keeps nothing."""
    return key.to(tl.float32, bitcast=True)
