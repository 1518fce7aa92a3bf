"""Policies that look at keys, which carry the tokens' places by RoPE."""

from torch import Tensor

from adsa.policies.base import Policy


class KeyDiff(Policy):
    """The keys least like the mean of all unit keys (arXiv 2504.15364): :class:`~adsa.policies.adsa.Adsa`, of K.

    Nothing else is protected by default.
    """

    name = "keydiff"
    similarity_of = "k"

    def split(self, budget: int) -> tuple[int, int]:
        return 0, 1

    def score(self, layer) -> Tensor:
        return layer.similarities().neg_()


class KNorm(Policy):
    """The shortest keys, which get the most attention (arXiv 2406.11430); nothing else is protected by default.

    In the first layer all copies of a token are equally long but for RoPE's rounding: lengths count as equal if their
    inverses agree to 16 bits after the point.
    """

    name = "knorm"
    similarity_of = "k"

    def split(self, budget: int) -> tuple[int, int]:
        return 0, 1

    def score(self, layer) -> Tensor:
        return (layer.similarity.inverse_norm[..., : layer.filled] * 2**16).round() / 2**16


class RKV(Policy):
    """Attention of the last 8 queries against redundancy of keys, one part to nine (after arXiv 2505.24133).

    Both sum to 1 over the cache. The paper's redundancy spares the newest of similar keys, and its attention is pooled;
    this one has neither. By default the 8 most recent tokens stay, as in the paper.
    """

    name = "r_kv"
    similarity_of = "k"
    attention_window = 8
    balance = 0.1

    def split(self, budget: int) -> tuple[int, int]:
        return 0, min(self.attention_window, budget)

    def score(self, layer) -> Tensor:
        redundancy = layer.similarities().softmax(-1)
        mass = layer.attention.mass(layer.filled)
        importance = mass / mass.sum(-1, keepdim=True)
        return self.balance * importance - (1 - self.balance) * redundancy
