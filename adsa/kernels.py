"""Ranking in one pass over the features: Triton kernels for CUDA, of the results of PyTorch's operations.

Those make a copy of the features in single precision, and a dozen passes over the scores. To import this needs Triton;
:func:`~adsa.fused.fused` tells where it is of use. Sums are in another order than PyTorch's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 64  # tokens of a program


@triton.jit
def _round(x):
    """To whole numbers, ties to even: from 2^23 on there are no others."""
    whole = tl.where(x < 0, -8388608.0, 8388608.0)
    return tl.where(tl.abs(x) < 8388608.0, (x + whole) - whole, x)


@triton.jit
def _similarity(
    v,
    total,
    inverse_norm,
    scores,
    groups,
    heads,
    count,
    v_row,
    v_head,
    v_slot,
    norm_group,
    scale,
    tie,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    row, head = group // groups, (group % groups) * (heads // groups)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, WIDTH)
    here = slot < count
    dots = tl.zeros([BLOCK], dtype=tl.float32)
    for other in range(TOGETHER):
        mine = head + other
        summed = tl.load(total + (row * heads + mine) * DIM + dim, mask=dim < DIM, other=0.0)
        place = v + row * v_row + mine * v_head + slot[:, None] * v_slot + dim[None, :]
        features = tl.load(place, mask=here[:, None] & (dim < DIM)[None, :], other=0.0)
        dots += tl.sum(features.to(tl.float32) * summed[None, :], axis=1)
    norm = tl.load(inverse_norm + group * norm_group + slot, mask=here, other=0.0)
    tl.store(scores + group * count + slot, _round(dots * norm * scale) * tie, mask=here)


@triton.jit
def _rank(
    scores,
    arrivals,
    clock,
    ranks,
    count,
    arrival_group,
    prefix,
    local,
    LARGEST: tl.constexpr,
    FRACTION: tl.constexpr,
    ARRIVALS: tl.constexpr,
    NEVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = slot < count
    score = tl.load(scores + group * count + slot, mask=here, other=0.0)
    score = tl.minimum(tl.maximum(score, -LARGEST), LARGEST) * FRACTION
    arrival = tl.load(arrivals + group * arrival_group + slot, mask=here, other=0)
    stays = (arrival > tl.load(clock) - local) | (slot < prefix)
    rank = _round(score).to(tl.int64) * ARRIVALS + arrival + tl.where(stays, NEVER, 0)
    tl.store(ranks + group * count + slot, rank, mask=here)


def similarity(v: Tensor, total: Tensor, inverse_norm: Tensor, tie: float) -> Tensor:
    """Mean cosine similarities, as :meth:`adsa.similarity.RunningSimilarity.score` tells them.

    Args:
        v: ``[R, H, N, D]``, the features, of any strides but the last.
        total: float32 ``[R, H, D]``, sums of unit vectors, without gaps.
        inverse_norm: float32 ``[R, G, N or more]``, G = 1 or H, without gaps.
        tie: scores are multiples of it.

    Returns:
        float32 ``[R, G, N]``.
    """
    rows, heads, count, dim = v.shape
    groups = inverse_norm.shape[1]
    scores = torch.empty(rows, groups, count, dtype=total.dtype, device=v.device)
    with torch.cuda.device_of(v):
        _similarity[rows * groups, triton.cdiv(count, _BLOCK)](
            v,
            total,
            inverse_norm,
            scores,
            groups,
            heads,
            count,
            *v.stride()[:3],
            inverse_norm.stride(1),
            1 / (count * tie),
            tie,
            DIM=dim,
            WIDTH=triton.next_power_of_2(dim),
            TOGETHER=heads // groups,
            BLOCK=_BLOCK,
        )
    return scores


def ranks(
    scores: Tensor,
    arrivals: Tensor,
    clock: Tensor,
    *,
    prefix: int,
    local: int,
    largest: float,
    fraction: float,
    bits: int,
    never: int,
) -> Tensor:
    """Numbers of which the least one's token leaves: by score, then by arrival.

    Args:
        scores: float32 ``[R, G, N]``.
        arrivals: int32 ``[R, G, N]``, a part of the slots of a tensor that has no gaps.
        clock: int32 without dimensions, the number of the token that the choice is made for.
        prefix, local: how many of the first slots, and of the last arrivals, stay.
        largest, fraction: scores up to the one count, in steps of 1 / the other.
        bits: that arrivals have.
        never: is added for tokens that stay.

    Returns:
        int64 ``[R, G, N]``.
    """
    scores = scores.contiguous()
    rows, groups, count = scores.shape
    found = torch.empty_like(scores, dtype=torch.int64)
    with torch.cuda.device_of(scores):
        _rank[rows * groups, triton.cdiv(count, _BLOCK)](
            scores,
            arrivals,
            clock,
            found,
            count,
            arrivals.stride(1),
            prefix,
            local,
            LARGEST=largest,
            FRACTION=fraction,
            ARRIVALS=1 << bits,
            NEVER=never,
            BLOCK=_BLOCK,
        )
    return found
