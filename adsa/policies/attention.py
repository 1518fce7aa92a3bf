"""Policies that look at attention: what was attended to stays.

A query that was not shown a token gave it no attention. So in mode "select" what is left out hardly comes back.
"""

import torch
from torch import Tensor

from adsa.policies.base import Policy


class H2O(Policy):
    """Heavy hitters: all the attention that a token has had since it came (arXiv 2306.14048).

    By default half of the budget are the most recent tokens, as in the paper, and none the first.
    """

    name = "h2o"
    attention_window = 0

    def split(self, budget: int) -> tuple[int, int]:
        return 0, budget - budget // 2

    def score(self, layer) -> Tensor:
        return layer.attention.mass(layer.filled).log()  # by ratio, as most tokens of a peaked head have next to none


class Tova(H2O):
    """The attention of the last query alone (arXiv 2401.06104); nothing else is protected by default.

    In the paper the heads of a layer choose together, which is granularity "layer".
    """

    name = "tova"
    attention_window = 1

    def split(self, budget: int) -> tuple[int, int]:
        return 0, 1


class SnapKV(H2O):
    """The attention of the last 32 queries (after arXiv 2404.14469, which votes once, after the prompt, and pools).

    The default keeps these queries' own tokens too, where the budget allows.
    """

    name = "snapkv"
    attention_window = 32

    def split(self, budget: int) -> tuple[int, int]:
        return 0, min(self.attention_window, budget - budget // 2)


class Lines(Policy):
    """Whole lines of the image leave, those with the least attention first.

    A coarse relative of LineAR (arXiv 2512.04857), which also keeps first tokens and recent lines, but lets single
    tokens go, line after line, by the attention of the newest line.

    A line's worth is its tokens' mean attention per query since they came; a line that has begun to leave goes on
    leaving, from the left. By default an eighth of the budget holds the first tokens, half of it the most recent.
    """

    name = "lines"
    attention_window = 0
    planar = True

    def score(self, layer) -> Tensor:
        positions, columns = layer.positions.long(), layer.columns
        line = positions // columns
        mass = layer.attention.mass(layer.filled) / layer.age.clamp(min=1)
        sums = mass.new_zeros(2, *mass.shape[:2], -(-layer.max_tokens // columns))
        total, count = sums.scatter_add_(3, line.expand(2, *line.shape), torch.stack([mass, torch.ones_like(mass)]))
        mean = (total / count.clamp(min=1)).clamp(min=torch.finfo(total.dtype).tiny)
        worth = mean.log() - 1000.0 * (count < layer.came())  # no logarithm is below -1000
        return worth.gather(2, line)
