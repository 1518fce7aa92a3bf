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

    def add(self, count: int, clock: Tensor | None, q: Tensor, rows: slice) -> None:
        """Queries of the newest tokens, ``[B, Hq, S, D]``, of these rows.

        ``count``, ``clock``: tokens that have come by now, these included, on the host and on the device; None: the
        host's number may be part of what is done.
        """
        self.count = count
        if clock is None:
            for back in range(min(q.shape[2], self.window), 0, -1):
                self.queries[rows, :, (count - back) % self.window] = q[:, :, -back]
            return
        last = clock + torch.arange(-q.shape[2], 0, dtype=torch.int64, device=clock.device)
        self.queries[rows].index_copy_(2, last % self.window, q.to(self.queries.dtype))

    def read(self, rows: slice) -> Tensor:
        """Those there are, in no particular order: ``[R, Hq, up to W, D]``."""
        return self.queries[rows, :, : self.filled]

    @property
    def filled(self) -> int:
        """How many there are."""
        return min(self.window, self.count)

    def tensors(self) -> dict[str, Tensor]:
        return {"queries": self.queries}

    def keep(self, kept: Callable[[Tensor], Tensor]) -> None:
        """Put what this function makes of each tensor in its place: other rows."""
        self.queries = kept(self.queries)
