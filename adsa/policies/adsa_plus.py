"""A policy of this project's own: keep what attention could least do without, and merge what leaves into what stays."""

import torch
from torch import Tensor

from adsa.policies.base import Policy


class AdsaPlus(Policy):
    """Keep the tokens without which the outputs would move most; merge the others into the nearest key.

    A token's worth is how far the outputs of the last line's queries, attending to what is cached now, would move if it
    left: with weight a, value v and output o, the others' weights grow to fill the gap, and o moves by exactly

        |o - v| * a / (1 - a),

    where 1 - a counts as at least 0.0001, as little is known of it beyond.
    So both redundant values, which ADSA looks for, and values that nobody attends to are worth little. What leaves is
    not lost (``merges``): the nearest key among those that stay, other than the last line's, stands for both from then
    on, by the mean of keys and values and the count as a bias of the score. Equal keys lose nothing by that.

    By default an eighth of the budget, up to four, are first tokens that always stay, and a quarter, up to one line of
    24, the newest; one ranking serves twelve steps, where the budget allows.
    """

    name = "adsa_plus"
    query_lines = 1
    merges = True
    renewal = 12

    def split(self, budget: int) -> tuple[int, int]:
        return min(4, budget // 8), max(1, min(24, budget // 4))

    def score(self, layer) -> Tensor:
        numbers = layer.queries.queries[0, :, :, 0].numel() * (layer.condition_slots + layer.filled)
        return torch.cat([self._moves(layer, rows) for rows in layer.chunks(numbers)])

    @staticmethod
    def _moves(layer, rows: slice) -> Tensor:
        """ln of the mean movement, ``[rows, G, N]``."""
        keys, values, bias = layer.held(rows)
        wide = torch.promote_types(keys.dtype, torch.float32)
        keys, values = keys.to(wide), values.to(wide)
        queries = layer.queries.read(rows).to(wide).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)  # [R, H, Q, D]
        scores = queries @ keys.mT * queries.shape[-1] ** -0.5
        weights = (scores if bias is None else scores + bias).softmax(-1)
        outputs = weights @ values
        weights, values = weights[..., layer.condition_slots :], values[:, :, layer.condition_slots :]
        # The distance of each output from each value, [R, H, Q, N], by one product.
        square = outputs.square().sum(-1, keepdim=True) + values.square().sum(-1).unsqueeze(-2)
        distance = (square - 2 * outputs @ values.mT).clamp(min=0).sqrt()
        moves = (distance * weights / (1 - weights).clamp(min=1e-4)).mean(2)
        if layer.groups == 1:
            moves = moves.square().sum(1, keepdim=True).sqrt()
        return moves.log()
