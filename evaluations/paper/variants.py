"""Other readings of what the paper leaves open, as policies to measure. Configs don't know them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from adsa.policies import POLICIES
from adsa.policies.adsa import Adsa
from adsa.similarity import TIE, TIE_SINGLE


class AdsaOf(Adsa):
    """The mean over other tokens than all that are cached. Ranked as in :class:`RunningSimilarity`."""

    def others(self, layer, unit: Tensor) -> Tensor:
        """Sum of the unit vectors that count, ``[B, H, D]``, of those cached, ``[B, H, N, D]``."""
        raise NotImplementedError

    def score(self, layer) -> Tensor:
        inverse = layer.similarity.inverse_norm[:, :, : layer.filled]
        unit = layer.v.to(inverse.dtype) * inverse.unsqueeze(-1)
        dots = (unit * self.others(layer, unit).unsqueeze(2)).sum(-1) / layer.filled
        if layer.groups == 1:
            dots = dots.sum(1, keepdim=True)
        tie = TIE.get(layer.dtype, TIE_SINGLE)
        return -(dots / tie).round() * tie


class OfPrevious(AdsaOf):
    """Neither the prefix nor the local window counts."""

    name = "adsa_previous"

    def others(self, layer, unit: Tensor) -> Tensor:
        last = layer.clock - layer.local  # in mode "select" the newest is cached already
        counts = layer.arrivals <= (last - 1 if layer.selects else last)
        counts[..., : layer.prefix].fill_(False)
        return (unit * counts.unsqueeze(-1)).sum(2)


class WithCondition(AdsaOf):
    """The condition tokens count as well. The cache must not fold them, as their own V are wanted."""

    name = "adsa_condition"

    def others(self, layer, unit: Tensor) -> Tensor:
        tokens = layer.condition_tokens
        v = layer.stored_v.read(0, tokens).to(unit.dtype)  # [R, H, T, D]
        square = v.square().sum(-1)
        if layer.groups == 1:
            square = square.sum(1, keepdim=True)
        inverse = torch.where(square > 0, square.rsqrt(), 0.0)
        if layer.valid is not None:
            inverse = inverse * layer.valid.unsqueeze(1).repeat(layer.layers, 1, 1)
        return layer.similarity.total + (v * inverse.unsqueeze(-1)).sum(2)


class SharedByGuidance(Adsa):
    """The two halves of guidance choose together, by the mean of their scores."""

    name = "adsa_shared"

    def score(self, layer) -> Tensor:
        score = super().score(layer).unflatten(0, (layer.layers, 2, -1))
        return score.mean(1, keepdim=True).expand_as(score).flatten(0, 2)


@contextmanager
def known() -> Iterator[None]:
    """The variants are among the policies, for a while."""
    more = {policy.name: policy for policy in (OfPrevious(), WithCondition(), SharedByGuidance())}
    POLICIES.update(more)
    try:
        yield
    finally:
        for name in more:
            del POLICIES[name]
