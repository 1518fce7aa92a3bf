"""Controls that look at where tokens are, and at nothing else: at random, evenly, or near in the plane."""

import torch
from torch import Tensor

from adsa.policies.base import Policy


class Random(Policy):
    """By a hash of position and head: the same for every row, and no better than chance.

    Nothing else is protected by default.
    """

    name = "random"

    def split(self, budget: int) -> tuple[int, int]:
        return 0, 1

    def score(self, layer) -> Tensor:
        positions = layer.positions.long()
        x = positions + 2**18 * torch.arange(1, 1 + positions.shape[1], device=positions.device).unsqueeze(-1)
        for _ in range(2):
            x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return (x ^ (x >> 16)).float() / 2**32


class Uniform(Policy):
    """Evenly over the past, which grows: odd positions go first, then odd multiples of 2, then of 4, and so on.

    These are the largest of the positions with their bits mirrored, which also spreads those of one kind; of 2 K
    previous tokens every second one stays. Nothing else is protected by default.
    """

    name = "uniform"

    def split(self, budget: int) -> tuple[int, int]:
        return 0, 1

    def score(self, layer) -> Tensor:
        x = layer.positions.long()
        for shift, mask in ((1, 0x55555555), (2, 0x33333333), (4, 0x0F0F0F0F), (8, 0x00FF00FF), (16, 0x0000FFFF)):
            x = ((x & mask) << shift) | ((x >> shift) & mask)
        return -(x.float() / 2**32)


class Neighborhood(Policy):
    """The tokens nearest to the newest one, in rows and columns, as the crow flies.

    What is evicted does not return, so that in mode "evict" a token far to the side is missed by the rows below;
    mode "select" has the neighbourhood proper. Nothing else is protected by default.
    """

    name = "neighborhood"
    planar = True

    def split(self, budget: int) -> tuple[int, int]:
        return 0, 1

    def score(self, layer) -> Tensor:
        positions, newest = layer.positions, layer.newest
        rows = positions // layer.columns - newest // layer.columns
        columns = positions % layer.columns - newest % layer.columns
        return -(rows.square() + columns.square()).float()
