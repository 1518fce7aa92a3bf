"""The queries of the last tokens, for the policies that ask what these would attend to."""

from collections.abc import Callable

import torch
from torch import Tensor


class QueryRecord:
    """A ring of queries.

    Args:
        rows, heads, head_dim: ``[R, Hq, D]``.
        window: W, how many queries are remembered.
        dtype, device: of the cache.
    """

    def __init__(self, rows: int, heads: int, head_dim: int, *, window: int, dtype: torch.dtype, device):
        self.window, self.count = window, 0
        self.queries = torch.zeros(rows, heads, window, head_dim, dtype=dtype, device=device)

    def add(self, first: int, q: Tensor, rows: slice) -> None:
        """Queries of the tokens that came as number ``first`` and on; ``[B, Hq, S, D]``, of these rows."""
        for index, one in enumerate(q.split(1, dim=2)):
            at = (first + index) % self.window
            self.queries[rows, :, at : at + 1] = one
        self.count = first + q.shape[2]

    def read(self, rows: slice) -> Tensor:
        """Those there are, in no particular order: ``[R, Hq, up to W, D]``."""
        return self.queries[rows, :, : min(self.window, self.count)]

    def tensors(self) -> dict[str, Tensor]:
        return {"queries": self.queries}

    def keep(self, kept: Callable[[Tensor], Tensor]) -> None:
        """Put what this function makes of each tensor in its place: other rows."""
        self.queries = kept(self.queries)
