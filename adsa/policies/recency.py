"""Policies that look at positions only: everything, the most recent, or the first and the most recent."""

from torch import Tensor

from adsa.policies.base import Policy


class Full(Policy):
    """The dense cache: nothing is ever evicted, and no budget applies."""

    name = "full"


class Streaming(Policy):
    """The first tokens and the most recent (StreamingLLM, arXiv 2309.17453)."""

    name = "streaming"

    def split(self, budget: int) -> tuple[int, int]:
        prefix = budget // 8
        return prefix, budget - prefix

    def score(self, layer) -> Tensor:
        return layer.arrivals.float()


class Window(Streaming):
    """The most recent tokens only."""

    name = "window"

    def split(self, budget: int) -> tuple[int, int]:
        return 0, budget
