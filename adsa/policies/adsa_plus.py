"""A policy of this project's own: merge what attention misses least into what is most like it."""

import torch
from torch import Tensor

from adsa.policies.base import Policy

CANDIDATES = 2  # for each token that a ranking names


class AdsaPlus(Policy):
    """Keep the tokens that merging would cost most; merge the others into the nearest key.

    What leaves is not lost (``merges``): the nearest key among those that stay, other than the last line's, stands for
    both from then on, by the mean of keys and values and the count as a bias of the score. Equal keys lose nothing by
    that. So a token's worth is

        max_q a_q / (1 - a_q) * |k - k'|,

    with the weights a that the queries q of the last line give it among what is cached now, whose odds are how far the
    outputs move if it leaves, in units of the distance to its value (1 - a counts as at least 0.0001); and the distance
    of its key k to that which it would be merged into, k', also where nothing is merged. The latter is looked at for
    the tokens of least odds, twice as many as are to leave; it would cost N^2 for all.

    By default an eighth of the budget are first tokens that always stay; no others do but the newest, as attention sees
    to them. One ranking serves twelve steps, where the budget allows.
    """

    name = "adsa_plus"
    query_lines = 1
    merges = True
    renewal = 12

    def split(self, budget: int) -> tuple[int, int]:
        return budget // 8, 1

    def score(self, layer) -> Tensor:
        numbers = layer.queries.queries[0, :, :, 0].numel() * (layer.condition_slots + layer.filled)
        return layer.in_parts(lambda rows: self._worth(layer, rows), numbers)

    def victims(self, layer) -> tuple[Tensor, Tensor | None]:
        return super().victims(layer) if layer.loops is None else layer.victims_by_queries(self._few(layer))

    @staticmethod
    def _few(layer) -> int:
        return min(CANDIDATES * max(layer.ranked, layer.filled - layer.budget), layer.filled)

    def _worth(self, layer, rows: slice) -> Tensor:
        """ln of the worth, ``[rows, G, N]``; beyond the candidates only in the order of odds, above these."""
        most = layer.most_weight(layer.queries.read(rows), rows)
        odds = (most / (1 - most).clamp(min=1e-4)).clamp(min=torch.finfo(most.dtype).tiny)
        if layer.groups == 1:
            odds = odds.amax(1, keepdim=True)
        stays = layer.staying(rows)
        _, candidates = odds.masked_fill(stays, torch.inf).topk(self._few(layer), largest=False)
        leave = torch.zeros_like(stays).scatter_(2, candidates, True) & ~stays
        distance, _ = layer.nearest(candidates, rows, leave)
        worth = odds.log()
        return worth.add(1000).scatter_(2, candidates, worth.gather(2, candidates) + distance.log() / 2)
