"""How much attention each cached token has had, for the policies that rank by it."""

from collections.abc import Callable

import torch
from torch import Tensor

from adsa.storage import ALL


class AttentionRecord:
    """Attention weights of past queries, by the token that they went to.

    Args:
        batch, groups, slots: ``[B, G, N]``, as the cache chooses; weights of a group's query heads are added up.
        window: how many of the last queries count; 0: all since the token came.
        dtype: of the sums.
        device: where.

    Attributes:
        weights: ``[B, G, max(1, window), N]``, one row for each of the last queries, or their sum.
    """

    def __init__(self, batch: int, groups: int, slots: int, *, window: int, dtype: torch.dtype, device):
        self.window = window
        self.weights = torch.zeros(batch, groups, max(1, window), slots, dtype=dtype, device=device)

    def add(self, clock: Tensor, back: int, weights: Tensor, slots: Tensor | None = None, rows: slice = ALL) -> None:
        """The weights of one query.

        Args:
            clock: tokens that have come by now, int without dimensions.
            back: 1 for the query of the last of them, and so on. Of a window, the oldest query's row is overwritten.
            weights: ``[B, G, M]``.
            slots: int64 ``[B, G, M]``, where they belong; None: slots 0 .. M - 1, and all others are empty.
            rows: those of this query.
        """
        mine = self.weights[rows]
        if slots is None:
            mine = mine[..., : weights.shape[-1]]
        elif self.window:
            weights = torch.zeros_like(mine[:, :, 0]).scatter_(2, slots, weights)
        if self.window:
            mine.index_copy_(2, ((clock - back) % self.window).long().view(1), weights.unsqueeze(2))
        elif slots is None:
            mine[:, :, 0].add_(weights)
        else:
            mine[:, :, 0].scatter_add_(2, slots, weights)

    def forget(self, slot: Tensor) -> None:
        """Another token comes here, and has had no attention yet. ``slot``: int64 ``[B, G, 1]``."""
        self.weights.scatter_(3, slot.unsqueeze(2).expand(-1, -1, self.weights.shape[2], -1), 0.0)

    def merge(self, slot: Tensor, into: Tensor) -> None:
        """A token becomes part of another, with the attention that it has had. int64 ``[B, G, 1]`` each."""
        slot, into = (index.unsqueeze(2).expand(-1, -1, self.weights.shape[2], -1) for index in (slot, into))
        self.weights.scatter_add_(3, into, self.weights.gather(3, slot))

    def mass(self, count: int) -> Tensor:
        """Attention that the tokens in the first slots have had in all, ``[B, G, count]``."""
        return self.weights[..., :count].sum(2)

    def tensors(self) -> dict[str, Tensor]:
        return {"attention": self.weights}

    def keep(self, kept: Callable[[Tensor], Tensor]) -> None:
        """Put what this function makes of each tensor in its place: other rows."""
        self.weights = kept(self.weights)
