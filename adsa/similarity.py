"""How redundant a token is: the mean cosine similarity of its features with those of all tokens (Eqs. 2 and 3).

:func:`mean_cosine_similarity` is the definition, quadratic in the number of tokens. :class:`RunningSimilarity` gives
the same numbers in one pass over the features: with unit vectors u_j and their sum U = sum_j u_j,

    s_i = mean_j u_i . u_j = (u_i . U) / N,

where U is kept up to date as tokens enter and leave.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from adsa.fused import fused
from adsa.storage import ALL

# Scores that differ by less than this are ties. Equal features must tie, whatever the order of summation did to their
# last bits: in the first layer, every repeated token has the same V.
TIE = {torch.float64: 2.0**-28}
TIE_SINGLE = 2.0**-16


def mean_cosine_similarity(v: Tensor) -> Tensor:
    """The definition (Eqs. 2, 3), by the full matrix of similarities. For reference; costs N^2.

    Args:
        v: ``[..., N, D]``.

    Returns:
        ``[..., N]``; a zero vector counts as similar to nothing.
    """
    unit = torch.nn.functional.normalize(v, dim=-1, eps=torch.finfo(v.dtype).tiny)
    return (unit @ unit.mT).mean(-1)


def inverse_norms(v: Tensor, *, joint: bool) -> Tensor:
    """1 / |v|, or 0 of a vector of zeros: ``[B, H, N, D]`` -> ``[B, G, N]``; G = 1 if joint else H."""
    square = v.square().sum(-1)
    if joint:
        square = square.sum(1, keepdim=True)
    return torch.where(square > 0, square.rsqrt(), square)


def mean_similarities(dots: Tensor, inverse_norm: Tensor) -> Tensor:
    """s_i (Eq. 3) of the first N tokens, written over ``dots``, :meth:`RunningSimilarity.dots` of theirs."""
    count, tie = dots.shape[2], TIE.get(dots.dtype, TIE_SINGLE)
    return dots.mul_(inverse_norm[:, :, :count]).mul_(1 / (count * tie)).round_().mul_(tie)


class RunningSimilarity:
    """Mean cosine similarities of the tokens in a cache, kept by a running sum.

    Args:
        batch, heads, slots, head_dim: shape of the cache, ``[B, H, N, D]``.
        joint: whether a token's features are those of all heads together (one score per layer) or of each head.
        dtype: dtype of the features; sums are at least float32.
        device: where.

    Attributes:
        total: ``[B, H, D]``, the sum U of unit vectors.
        inverse_norm: ``[B, G, N]``, 1 / |v_i|, with G = 1 if joint else H.
        fused: whether a kernel computes the scores.
    """

    def __init__(self, batch, heads, slots, head_dim, *, joint: bool, dtype: torch.dtype, device):
        wide = torch.promote_types(dtype, torch.float32)
        self.joint, self.fused = joint, fused(torch.device(device), wide)
        self.total = torch.zeros(batch, heads, head_dim, dtype=wide, device=device)
        self.inverse_norm = torch.zeros(batch, 1 if joint else heads, slots, dtype=wide, device=device)

    def add(self, slot: int | Tensor, v: Tensor, rows: slice = ALL) -> None:
        """A token enters each of these rows. ``slot``: int64 ``[B, G, 1]``, or one for all; ``v``: ``[B, H, 1, D]``."""
        inverse = inverse_norms(v.to(self.total.dtype), joint=self.joint)
        self.total[rows] += (v * inverse.unsqueeze(-1)).squeeze(2)
        if isinstance(slot, int):
            self.inverse_norm[rows, :, slot : slot + 1] = inverse
        else:
            self.inverse_norm[rows].scatter_(2, slot, inverse)

    def remove(self, slot: Tensor, v: Tensor) -> None:
        """A token leaves. ``slot``: int64 ``[B, G, 1]``; ``v``: ``[B, H, 1, D]``, as it was added."""
        self.total -= (v * self.inverse_norm.gather(2, slot).unsqueeze(-1)).squeeze(2)

    def score(self, v: Tensor, rows: slice = ALL) -> Tensor:
        """s_i (Eq. 3) of the first N tokens.

        Args:
            v: ``[B, H, N, D]``, the features that were added in slots 0 .. N - 1.
            rows: those that these are of.

        Returns:
            ``[B, G, N]`` in the dtype of the sums, rounded so that equal features have equal scores.
        """
        if self.fused and not torch.compiler.is_compiling():
            from adsa import kernels  # needs Triton

            return kernels.similarity(v, self.total[rows], self.inverse_norm[rows], TIE_SINGLE)
        return mean_similarities(self.dots(v, rows), self.inverse_norm[rows])

    def dots(self, v: Tensor, rows: slice = ALL) -> Tensor:
        """u_i . U * |v_i|, ``[B, G, N]``. ``v``: ``[B, H, N, D]``."""
        # In half precision a product is rounded to 8 or 11 bits, too few to rank by, and may overflow.
        dots = (self.total[rows].unsqueeze(2) @ v.to(self.total.dtype).mT).squeeze(2)
        return dots.sum(1, keepdim=True) if self.joint else dots

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total, "inverse_norm": self.inverse_norm}

    def keep(self, kept: Callable[[Tensor], Tensor]) -> None:
        """Put what this function makes of each tensor in its place: other rows."""
        self.total, self.inverse_norm = kept(self.total), kept(self.inverse_norm)
